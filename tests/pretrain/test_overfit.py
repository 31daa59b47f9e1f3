"""Every kind of objective learns 64 photographs by heart, as far as 200 steps go."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import attention, write_samples
from PIL import Image
from watch import watching

from pretrain.config import PretrainConfig, StreamRun
from pretrain.objective import LEARNED, Objective
from pretrain.train import pretrain
from shards.sample import LabelledImage

SHEET = Path(__file__).parents[2] / "docs/photos.jpg"
"""Its first column is eight photographs of 112 px, below a header."""
LOSS = {"random": 0.75, "semmae": 0.75, "automae": 0.95, "hpm": 1.4}
"""Mean of the last 20 steps. Who predicts each patch's mean has 1; the judge of automae adds up to 0.2, and the order
of the losses 0.69 where it is guessed."""
SETTINGS = {
    "patch": 8, "embed_dim": 64, "depth": 1, "heads": 2, "decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2,
    "epochs": 50, "warmup_epochs": 2, "batch_size": 16, "base_lr": 8e-2, "flip": False, "weight_decay": 0.0,
    "mask_ratio": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight squares of 32 px out of each photograph, with quarters as parts."""
    sheet, random = np.asarray(Image.open(SHEET).convert("RGB")), np.random.default_rng(0)
    top = sheet.shape[0] - 8 * (112 + 4)
    samples = []
    for number in range(64):
        row, place = divmod(number, 8)
        y, x = top + row * 116 + place // 4 * 40, 4 + place % 4 * 26
        buffer = io.BytesIO()
        Image.fromarray(sheet[y : y + 32, x : x + 32]).save(buffer, "JPEG", quality=95)
        quarters = np.arange(4)[:, None] // 2 * 2 + np.arange(4) // 2
        samples.append(
            LabelledImage(
                key=f"{number:08d}", source=f"{number}.jpg", class_id=-1, jpeg=buffer.getvalue(),
                parts=quarters.astype(np.uint8), fgrank=random.permutation(16).reshape(4, 4).astype(np.uint16),
                src_width=32, src_height=32, box=(0.0, 0.0, 32.0, 32.0), **attention(random, 3, 4),
            )
        )  # fmt: skip
    info = {"grid": 4, "groups": 4, "size": 32, "classes": [], "heads": 3}
    return write_samples(tmp_path_factory.mktemp("photographs") / "shards", samples, info, samples_per_shard=64)


@pytest.mark.parametrize("masking", ["random", "semmae", *sorted(LEARNED)])
def test_64_photographs_are_learned_by_heart_in_200_steps(masking, data, tmp_path):
    run = StreamRun(out=tmp_path / "run", device="cpu", precision="fp32")

    with watching(Objective) as watched:
        pretrain(PretrainConfig(data=str(data), masking=masking, run=run, **SETTINGS))

    losses = [loss.item() for loss in watched.outputs]
    assert len(losses) == 200
    assert losses[0] > 1.2 * LOSS[masking]
    assert sum(losses[-20:]) / 20 < LOSS[masking]
