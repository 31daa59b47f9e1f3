"""What the steps of `learn-parts` receive and do, beside numbers written out and sums over cells."""

import math

import numpy as np
import pytest
import torch
from conftest import photographs
from timm.layers import PatchEmbed
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from watch import watching

from encoders.load import load_encoder
from partlearn.config import LearnConfig
from partlearn.decoder import blur
from partlearn.kmeans import spherical_kmeans
from partlearn.train import PartLearning, learn, parts_loss
from shards.image_batches import ImageBatches
from shards.images import list_images
from training.config import RunConfig
from training.metrics import read_metrics

RATES = {0: 0.0, 1: 0.0005, 2: 0.001, 5: 0.00093301270, 11: 0.0005}
"""Two of twenty steps up to 0.064 · 4 / 256, then half a cosine down."""
PIXELS = {
    "target": "pixels", "where": "everywhere", "init": "heads", "softmax": "positions", "relative": False,
    "whiten": 0, "diffusion": 0, "background": False, "decoder_size": 8,
}  # fmt: skip


def config(folder, **changes) -> LearnConfig:
    photos = folder / "photos"
    settings = {"grid": 4, "num_parts": 3, "crops": 0, "steps": 20, "batch_size": 4, "base_lr": 0.064} | changes
    return LearnConfig(
        images=str(photos if photos.exists() else photographs(photos, 6)),
        encoder="random:vit_tiny_patch16_224",
        run=RunConfig(out=folder / "run", device="cpu", precision="fp32"),
        **settings,
    )


@pytest.mark.parametrize("changes", [{"consistency": 0.5}, PIXELS], ids=["features", "pixels"])
def test_rates_groups_crops_and_the_sum_of_the_loss_are_those_that_were_asked_for(changes, tmp_path):
    settings = config(tmp_path, **changes)
    with watching(PatchEmbed) as watched:
        learn(settings, stop_after_steps=12)

    assert len(watched.steps) == 12
    for step, expected in RATES.items():
        assert watched.rates()[step] == pytest.approx([expected] * 2, rel=1e-6)
    matrices, others = watched.steps[0]
    assert [group["weight_decay"] for group in (matrices, others)] == [0.01, 0.0]
    assert [group["betas"] for group in (matrices, others)] == [(0.9, 0.99)] * 2
    assert all(one.ndim > 1 for one in matrices["params"])
    for (crops,) in watched.inputs:  # bytes over 255, less a mean of .5, over a deviation of .5: this ViT's own
        bytes_ = (crops * 0.5 + 0.5) * 255
        assert (bytes_ - bytes_.round()).abs().max() < 1e-3
        assert bytes_.min() > -1e-3
        assert 150 < bytes_.max() < 255.001
    for line in read_metrics(settings.run.out):
        others = 0.1 * line.get("balance", 0) + 0.5 * line.get("unlike", 0)
        assert line["diversity"] > 0
        assert line["loss"] == pytest.approx(line["rebuilding"] + 0.03 * line["diversity"] + others, rel=1e-5)
        assert ("balance" in line, "unlike" in line) == ((False, False) if changes is PIXELS else (True, True))


def test_gradients_are_scaled_down_to_a_norm_of_1(tmp_path):
    norms = []

    def note(optimizer, *_) -> None:
        weights = [one for group in optimizer.param_groups for one in group["params"]]
        norms.append(math.sqrt(sum(float(one.grad.square().sum()) for one in weights if one.grad is not None)))

    hook = register_optimizer_step_pre_hook(note)
    try:
        learn(config(tmp_path, diversity=300.0), stop_after_steps=3)
    finally:
        hook.remove()

    assert norms == pytest.approx([1.0] * 3, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, PIXELS], ids=["features", "pixels"])
def test_the_loss_of_a_batch_is_eq_5_to_7_cell_by_cell(changes, tmp_path):
    settings = config(tmp_path, **changes)
    encoder = load_encoder(settings.encoder, grid=4, precision="fp32")
    task = PartLearning(settings, encoder)
    task.open(0)
    view = next(task.batches)
    with torch.no_grad():
        loss, terms, _, cells = parts_loss(task.learner, settings, encoder, view)
        logits, tokens = task.learner.read(view.tokens, cells)
    task.close()

    maps = [slow_maps(*one, settings.softmax) for one in zip(logits.tolist(), cells.tolist(), strict=True)]
    diversity = np.mean([slow_diversity(one) for one in maps])
    expected = 0.03 * diversity
    if settings.target == "features":
        vectors = task.learner.vectors.detach().double().numpy()
        rebuilding = np.mean([slow_features(*one, vectors) for one in zip(maps, tokens.double().numpy(), strict=True)])
        use = np.sum([one.sum(axis=1) for one in maps], axis=0) / cells.sum().item()
        expected += 0.1 * sum(share * math.log(3 * share) for share in use)
    else:
        square = torch.tensor(np.stack(maps), dtype=torch.float32).unflatten(2, (4, 4))
        with torch.no_grad():
            rebuilt = task.learner.decoder(square, view.tokens.class_token)
        seen = (view.pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        rebuilding = (rebuilt - F.avg_pool2d(seen, 64 // 8)).square().mean().item()
    assert terms["diversity"] == pytest.approx(diversity, rel=1e-4)
    assert terms["rebuilding"] == pytest.approx(rebuilding, rel=1e-4)
    assert loss.item() == pytest.approx(rebuilding + expected, rel=1e-4)


def test_the_block_the_seed_and_a_crop_of_each_image_are_those_that_were_asked_for(tmp_path):
    tasks = []
    for seed in (0, 1):
        settings = config(tmp_path, seed=seed, encoder_block=2, target="both", batch_size=6)
        task = PartLearning(settings)
        tasks.append(task)
        task.open(0)
        view = next(task.batches)
        task.close()
        with ImageBatches(list_images(settings.images), size=64, batch_size=6, seed=seed) as batches:
            whole, _ = next(iter(batches))
        for one, image in zip(view.pixels, whole, strict=True):
            assert (one.int() - image.int()).abs().float().mean() > 2
            assert (one.int() - image.flip(1).int()).abs().float().mean() > 2
        assert task.encoder.block == 2
        assert task.learner.attention.log_scale.exp().item() == pytest.approx(10)
    drawn = [task.learner.decoder.to_pixels.weight for task in tasks]
    assert not torch.equal(*drawn)


def test_the_blur_is_a_gaussian_of_deviation_1_4_that_keeps_the_sum():
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 4, 4] = 1.0

    blurred = blur(maps)[0, 0]

    assert blurred.sum().item() == pytest.approx(1.0)
    for away in range(4):
        expected = math.exp(-(away**2) / (2 * 1.4**2))
        assert (blurred[4, 4 + away] / blurred[4, 4]).item() == pytest.approx(expected, rel=1e-4)
        assert (blurred[4 + away, 4] / blurred[4, 4]).item() == pytest.approx(expected, rel=1e-4)


def test_of_several_starts_of_kmeans_the_best_is_taken():
    points = F.normalize(torch.randn(200, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    better = 0
    for seed in range(8):
        one, four = (
            spherical_kmeans(points, 6, generator=torch.Generator().manual_seed(seed), starts=starts)
            for starts in (1, 4)
        )
        first, best = ((points @ centres.T).amax(dim=1).mean().item() for centres in (one, four))
        assert best >= first - 1e-6  # the first start is one of the four
        better += best > first + 1e-4
    assert better


def slow_maps(logits: list[list[float]], inside: list[bool], softmax: str) -> np.ndarray:
    """M of Eq. 2: each inside cell shares itself out, or each part its mass, of one a cell, over the inside cells."""
    scores = np.exp(np.array(logits, dtype=np.float64) - np.max(logits)) * inside
    if softmax == "parts":
        return np.divide(scores, scores.sum(axis=0), where=np.array(inside), out=np.zeros_like(scores))
    return scores / scores.sum(axis=1, keepdims=True) * sum(inside)


def slow_diversity(maps: np.ndarray) -> float:
    """Eq. 6: cos² of every two different maps, over the square of their number."""
    parts, total = len(maps), 0.0
    for i in range(parts):
        for j in range(parts):
            if i != j:
                total += (maps[i] @ maps[j] / np.linalg.norm(maps[i]) / np.linalg.norm(maps[j])) ** 2
    return total / parts**2


def slow_features(maps: np.ndarray, tokens: np.ndarray, vectors: np.ndarray) -> float:
    """Eq. 5 on tokens: how far each inside token is from the mean of part vectors by its shares."""
    missed = whole = 0.0
    for cell in range(maps.shape[1]):
        if maps[:, cell].sum():
            shares = maps[:, cell] / maps[:, cell].sum()
            missed += ((tokens[cell] - shares @ vectors) ** 2).sum()
            whole += (tokens[cell] ** 2).sum()
    return missed / whole
