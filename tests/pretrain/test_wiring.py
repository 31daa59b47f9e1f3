"""What the steps of a pretraining receive and do, beside a slow twin of the whole."""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import drawn, write_samples, write_set
from reference import mae_step
from reference.vit import AdamW
from watch import Watched, watching

from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from pretrain.masking.config import MaskingConfig
from pretrain.train import pretrain
from shards.shard_set import ShardSet
from training import checkpoint
from training.metrics import read_metrics

STEPS, IMAGES, BATCH = 7, 40, 12
"""Two epochs; the last batch reaches into a third."""
RATES = [0, 0.000703125, 0.00140625, 0.00127196507, 0.00092040257, 0.00048584743, 0.00013428493]
"""Two steps up to 0.03 · 12 / 256, then half a cosine down over the other five."""
ALPHAS = [0, (1 / 7) ** 3, (2 / 7) ** 3, (3 / 7) ** 3, (4 / 7) ** 3, (5 / 7) ** 3, (6 / 7) ** 3]
SMALL = {
    "patch": 8, "embed_dim": 32, "depth": 2, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 4,
    "batch_size": BATCH, "epochs": 2, "base_lr": 0.03, "warmup_epochs": 0.6, "weight_decay": 0.5, "seed": 5,
}  # fmt: skip
RUNS = {
    "semmae": {"gamma": 3.0, "keep_share": 0.75, "mask_ratio": 0.6, "crop_scale": 0.5},
    "random": {"masking": "random", "mask_ratio": 0.5, "norm_pix_loss": False, "flip": False},
}


@dataclass
class Run:
    """A pretraining that was watched, and what it read."""

    config: PretrainConfig
    watched: Watched
    shards: ShardSet

    def expected(self, step: int) -> list[tuple[torch.Tensor, list[int], list[int]]]:
        progress = Fraction(step, STEPS)
        return [
            mae_step.shown(self.shards.read(index), self.config, self.shards.groups, epoch=epoch, progress=progress)
            for epoch, index in mae_step.taken(IMAGES, step, self.config)
        ]


def other_labels(folder: Path, data: Path) -> str:
    """A label set over the images of `data`: another number of parts, and none where it was."""
    with ShardSet.open(data) as shards:
        info = {"grid": 4, "groups": 6, "size": 32, "classes": list(shards.classes), "labels_of": shards.fingerprint}
    alone = (dataclasses.replace(sample, jpeg=b"") for sample in drawn(IMAGES, 32, 4, 6, 3, seed=7))
    return str(write_samples(folder, alone, info, samples_per_shard=16))


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    data = write_set(folder / "shards", count=IMAGES)
    labels = other_labels(folder / "labels", data) if request.param == "semmae" else None
    where = StreamRun(out=folder / "run", device="cpu", precision="fp32")
    config = PretrainConfig(data=str(data), labels=labels, run=where, **SMALL | RUNS[request.param])
    with watching(MAE) as watched:
        pretrain(config)
    with ShardSet.open(data, labels=labels) as shards:
        yield Run(config, watched, shards)


def test_every_step_sees_its_images_normalised_mirrored_and_cropped_as_they_were_drawn(run):
    assert len(run.watched.inputs) == STEPS
    for step, (images, _, _) in enumerate(run.watched.inputs):
        expected = torch.stack([pixels for pixels, _, _ in run.expected(step)])
        apart = (images - expected).abs()
        if run.config.crop_scale == 1:
            assert apart.max() < 1e-5
        else:  # torch's bicubic and Pillow's differ in where they round
            assert apart.max() < 3 / 255 / 0.224
            assert apart.mean() < 0.3 / 255


def test_every_image_is_masked_by_its_own_labels_and_draws_and_the_curriculum(run):
    for step, (_, visible, masked) in enumerate(run.watched.inputs):
        expected = run.expected(step)
        assert visible.tolist() == [one for _, one, _ in expected]
        assert masked.tolist() == [one for _, _, one in expected]


def test_the_rate_scales_with_the_batch_warms_up_and_falls_along_a_cosine(run):
    for rates, expected in zip(run.watched.rates(), RATES, strict=True):
        assert rates == pytest.approx([expected] * 2, rel=1e-6)


def test_adamw_has_the_papers_betas_and_decays_matrices_alone(run):
    names = {id(weight): name for name, weight in run.watched.modules[0].named_parameters()}
    for groups in run.watched.steps:
        decayed, plain = ([names[id(weight)] for weight in group["params"]] for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
        assert [group["betas"] for group in groups] == [(0.9, 0.95)] * 2
        assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
        assert sorted(decayed + plain) == sorted(set(names.values()) - {"encoder.pos_embed"})
        assert {"mask_token", "encoder.cls_token", "encoder.norm.weight", "decoder_pixels.bias"} <= set(plain)


def test_losses_and_weights_are_those_of_the_slow_twin(run):
    """Seven steps in float64 from the same first weights, through the twin's own masks, loss and AdamW."""
    weights = {name: weight.double() for name, weight in run.watched.initial.items() if not name.endswith("pos_embed")}
    matrices = {name for name in weights if name.endswith("weight") and "norm" not in name}
    optimizer = AdamW(weights, betas=(0.9, 0.95), decay=0.5, decayed=matrices)
    for step in range(STEPS):
        leaves = {name: weight.detach().requires_grad_() for name, weight in optimizer.weights.items()}
        images = run.watched.inputs[step][0].double()  # these are compared above; a crop's rounding is no loss's
        seen = [(pixels, *ids) for pixels, (_, *ids) in zip(images, run.expected(step), strict=True)]
        loss = mae_step.loss(leaves, run.config, seen)
        assert run.watched.outputs[step].item() == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        optimizer.step(dict(zip(leaves, gradients, strict=True)), RATES[step])

    final, _ = checkpoint.load_tensors(checkpoint.find(run.config.run.out))
    for name, weight in optimizer.weights.items():
        apart = (final[name] - weight).abs()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which Adam makes a whole step
            apart = apart.unflatten(0, (3, -1))[[0, 2]]
        assert apart.max() < 2e-5, name


def test_the_log_tells_loss_rate_alpha_and_purity_of_the_steps_they_belong_to(run):
    first, last = read_metrics(run.config.run.out)

    assert [first["step"], last["step"]] == [0, STEPS - 1]
    for line in (first, last):
        step = line["step"]
        assert line["loss"] == pytest.approx(run.watched.outputs[step].item(), rel=1e-6)
        assert line["lr"] == pytest.approx(RATES[step], rel=1e-6)
        if run.config.masking == "semmae":
            assert line["alpha"] == pytest.approx(ALPHAS[step])


def test_a_checkpoint_says_what_its_pixels_patches_and_masks_were(run):
    _, told = checkpoint.load_tensors(checkpoint.find(run.config.run.out))

    assert told["vit"] == {
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "source": "pretrain",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    names = (field.name for field in dataclasses.fields(MaskingConfig))
    assert told["mae"] == {name: getattr(run.config, name) for name in ("norm_pix_loss", *names)} | {
        "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 4
    }  # fmt: skip
    assert told["data_fingerprint"] == run.shards.identity


def test_the_first_weights_are_maes_drawn_from_the_seed(run):
    """Xavier-uniform matrices, the patch embedding as one matrix, biases 0, tokens of deviation 0.02."""
    names = ("patch", "embed_dim", "depth", "heads", "decoder_dim", "decoder_depth", "decoder_heads")
    torch.manual_seed(5)
    drawn = MAE(size=32, **{name: SMALL[name] for name in names})
    assert all(torch.equal(weight, run.watched.initial[name]) for name, weight in drawn.named_parameters())
    for name, weight in run.watched.initial.items():
        if name.endswith("weight") and "norm" not in name:
            matrix = weight.flatten(1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert 0.9 * bound < matrix.abs().max() <= bound, name
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif name.endswith("token"):
            assert 0.01 < weight.std() < 0.03, name


def test_a_window_and_substitutes_that_were_asked_for_are_used(make_shards, tmp_path, capsys):
    shards = make_shards(samples_per_shard=8)
    row, tar = shards.row(20), shards.path / "shards/000002.tar"
    data = bytearray(tar.read_bytes())
    data[row.begin + 140] ^= 1
    tar.write_bytes(data)
    where = StreamRun(out=tmp_path / "run", device="cpu", precision="fp32")

    pretrain(PretrainConfig(data=str(shards.path), run=where, **SMALL, window=2, substitutes=1), stop_after_steps=4)

    state = checkpoint.load_state(checkpoint.newest(tmp_path / "run"))
    assert state["stream"]["order"] == "window:2/v1"
    assert "its neighbour stands in (1 of 1)" in capsys.readouterr().err
