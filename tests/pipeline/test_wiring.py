"""What `extract` shows its encoder, and which image each label is stored beside."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photographs
from PIL import Image
from timm.layers import PatchEmbed
from torch.nn import functional as F
from watch import watching

from partlearn.config import ExtractConfig
from partlearn.foreground import confidence
from partlearn.labelling.learned import open_token_labeller
from pipeline.extract import extract
from shards.index import read_column
from shards.order import permutation
from shards.sample import Sample
from shards.shard_set import ShardSet
from training.config import RunConfig


def extracted(folder, **settings) -> tuple[list[Sample], list[str], list[torch.Tensor], dict]:
    """Samples, sources, what the encoder was shown, and dataset.json of an extraction of seven photographs."""
    run = RunConfig(out=folder / "shards", device="cpu", precision="fp32")
    common = {"size": 48, "samples_per_shard": 4, "batch_size": 3, "backend": "local", "seed": 6}
    photos = folder / "photos"
    if not photos.exists():
        photographs(photos, 7)
    with watching(PatchEmbed) as watched:
        info = extract(ExtractConfig(images=str(photos), run=run, **common | settings))
    with ShardSet.open(run.out) as shards:
        samples = [shards.read(index, attention=bool(shards.heads)) for index in range(len(shards))]
        return samples, shards.sources, [images for (images,) in watched.inputs], info


def stored(samples: list[Sample]) -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(sample.jpeg))) for sample in samples])


def test_the_encoder_is_shown_the_stored_pixels_of_the_seeds_order_in_its_own_normalisation(learned, tmp_path):
    samples, sources, shown, _ = extracted(tmp_path, parts=learned)

    assert sources == [f"{index:03d}.jpg" for index in permutation(7, seed=6, epoch=0)]
    assert [len(images) for images in shown] == [3, 1, 3]  # a batch spans no two shards
    assert stored(samples).shape == (7, 48, 48, 3)
    pixels = torch.from_numpy(stored(samples)).permute(0, 3, 1, 2) / 255
    read = F.interpolate(pixels, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(torch.cat(shown), (read - 0.5) / 0.5, atol=1e-5)  # this ViT's mean and deviation


def test_labels_and_ranks_are_stored_beside_the_image_they_are_of(learned, tmp_path):
    samples, _, _, _ = extracted(tmp_path, parts=learned)
    told = read_column(tmp_path / "shards/index.parquet", "confidence")

    labeller = open_token_labeller(learned, precision="fp32")
    for sample in samples:
        labels = labeller(stored([sample]))
        assert np.array_equal(sample.parts, labels.parts[0])
        assert np.array_equal(sample.fgrank, labels.fgrank[0])
        tokens = labeller.encoder(torch.from_numpy(stored([sample]))).patch_tokens
        hundredths = 100 * confidence(tokens, torch.from_numpy(sample.fgrank.astype(np.int64)).reshape(1, -1)).item()
        assert told[sample.index] == round(hundredths)


def test_another_seed_is_another_set(learned, tmp_path):
    extracted(tmp_path, parts=learned)

    with pytest.raises(ValueError, match="seed was 6, now 7"):
        extracted(tmp_path, parts=learned, seed=7)


def test_a_baseline_reads_the_block_grid_and_number_of_parts_asked_for(tmp_path):
    encoder = "random:vit_tiny_patch16_224"
    asked = {"encoder_block": 3, "num_parts": 4, "grid": 5}
    samples, _, _, info = extracted(tmp_path, parts=Path("kmeans-image"), encoder=encoder, **asked)

    labeller = open_token_labeller("kmeans-image", encoder=encoder, precision="fp32", block=3, grid=5, num_parts=4)
    assert np.array_equal(samples[0].parts, labeller(stored(samples[:1])).parts[0])
    assert (info["groups"], info["grid"], info["producer"]["labels"]["encoder"]["block"]) == (5, 5, 3)
