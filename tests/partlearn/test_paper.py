"""`--paper` is Eq. 1 to 7 as printed, and each departure from them is a setting that changes nothing else."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import photographs
from oracle import Oracle
from reference.semmae_parts import eq7
from torch.utils._python_dispatch import TorchDispatchMode

from encoders.frozen import Tokens
from encoders.load import load_encoder
from partlearn.config import PAPER, LearnConfig
from partlearn.crops import TokenCrop, image_target
from partlearn.labelling.learned import open_token_labeller
from partlearn.learner import LearnerShape, PartLearner, load_learner, shape_as_json
from partlearn.train import learn, new_learner, parts_loss
from training import checkpoint
from training.config import RunConfig

PARTS, GRID, SIDE = 3, 4, 8
DEPARTURES: dict[str, dict[str, Any]] = {
    "literal": {},
    "gate": {"gate": "double"},
    "projections": {"projections": "part"},
    "temperature": {"temperature": "trained"},
    "channels": {"pixel_error": "mean"},
    "all": {"gate": "double", "projections": "part", "temperature": "trained", "pixel_error": "mean"},
}


def settings(**changes: Any) -> LearnConfig:
    small: dict[str, Any] = {"grid": GRID, "num_parts": PARTS, "decoder_size": SIDE, "crops": 0, "batch_size": 2}
    run = RunConfig(out=Path("unused"), device="cpu", precision="fp32")
    return LearnConfig(**{"images": "unused", "encoder": "oracle", "run": run} | small | changes)


class Seen(Oracle):
    """An encoder of which only the preparation of images is asked, for 16-pixel images."""

    def __init__(self):
        super().__init__()
        self.dim, self.heads, self.size, self.grid = 12, 3, 16, GRID
        self._mean, self.std = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.25)


def a_step(form: dict[str, Any]) -> tuple[PartLearner, LearnConfig, Seen, TokenCrop]:
    """A learner whose weights are all at work, and two images."""
    generator = torch.Generator().manual_seed(3)
    encoder, config = Seen(), settings(**PAPER | form)
    learner = new_learner(config, encoder)
    learner.attention.start_at_random(generator)
    with torch.no_grad():
        for name, weight in learner.named_parameters():
            if weight.requires_grad:
                weight.add_(
                    (0.1 if name.startswith("attention") else 0.02) * torch.randn(weight.shape, generator=generator)
                )
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=generator)
    drawn = torch.randn(2, 1 + GRID**2, encoder.dim, generator=generator)
    style = torch.randn(2, encoder.dim, generator=generator)
    return learner, config, encoder, TokenCrop(pixels, Tokens(style, drawn[:, 1:], drawn, torch.zeros(2, 3, GRID**2)))


def twin_of(learner: PartLearner, config: LearnConfig, encoder: Seen, view: TokenCrop, form: dict[str, Any]):
    """Eq. 7 as a function of the weights."""
    read, style = (tokens.double().numpy() for tokens in (view.tokens.block_tokens, view.tokens.class_token))
    images = image_target(view, config.rebuilt_size, encoder).double().numpy()
    return lambda weights: eq7(weights, read, style, images, parts=PARTS, blocks=len(learner.decoder.blocks), **form)


@pytest.mark.parametrize("departure", DEPARTURES)
def test_a_step_is_the_equations_written_out(departure):
    form = DEPARTURES[departure]
    learner, config, encoder, view = a_step(form)

    loss, _, maps, _ = parts_loss(learner, config, encoder, view)

    weights = {name: weight.double().numpy() for name, weight in learner.state_dict().items()}
    expected, shares = twin_of(learner, config, encoder, view, form)(weights)
    assert np.allclose(maps.detach().numpy() / GRID**2, shares, atol=1e-5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("departure", ["literal", "all"])
def test_the_gradient_of_a_step_is_that_of_the_equations(departure):
    """Along one direction of each weight, by differences of the twin."""
    form = DEPARTURES[departure]
    learner, config, encoder, view = a_step(form)

    parts_loss(learner, config, encoder, view)[0].backward()

    twin = twin_of(learner, config, encoder, view, form)
    weights = {name: weight.double().numpy() for name, weight in learner.state_dict().items()}
    for name in ("gate_in", "gate_out", "query", "key", *(("log_scale",) if departure == "all" else ())):
        gradient = learner.attention.get_parameter(name).grad
        assert gradient is not None
        along, whole = gradient.double().numpy(), f"attention.{name}"
        along = along / np.linalg.norm(along)
        h = 1e-5
        ahead, behind = (twin(weights | {whole: weights[whole] + sign * h * along})[0] for sign in (1, -1))
        assert (ahead - behind) / (2 * h) == pytest.approx(gradient.norm().item(), rel=2e-2), name


def test_paper_takes_every_literal_value():
    literal = settings(paper=True)

    assert {name: getattr(literal, name) for name in PAPER} == PAPER
    assert (literal.gate, literal.projections, literal.temperature) == ("sigmoid", "shared", "none")
    assert (literal.pixel_error, literal.foreground, literal.init) == ("sum", "maps", "random")
    assert (literal.softmax, literal.target, literal.where) == ("positions", "pixels", "everywhere")
    assert not literal.relative
    assert not literal.background


def test_paper_beside_another_foreground_is_refused():
    with pytest.raises(ValueError, match="--paper means --foreground maps, and --foreground contrast was asked for"):
        settings(paper=True, foreground="contrast")
    assert settings().foreground == "contrast"


def test_a_shared_pair_of_projections_cannot_start_as_heads():
    with pytest.raises(ValueError, match="one shared pair of projections cannot start as separate heads"):
        settings(**PAPER | {"init": "heads"})


def test_heads_that_start_without_a_temperature_give_the_maps_of_those_with_one():
    encoder = load_encoder("random:vit_tiny_patch16_224", grid=GRID, precision="fp32")
    tokens = encoder(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    scores = []
    for temperature in ("trained", "none"):
        config = settings(**PAPER | {"projections": "part", "init": "heads", "temperature": temperature})
        learner = new_learner(config, encoder)
        learner.attention.start_at_heads(encoder.blocks[-1].attn, torch.Generator().manual_seed(0))
        scores.append(learner.read(tokens, learner.learned_cells(tokens))[0])

    assert torch.allclose(*scores, atol=1e-5)


def test_centres_that_start_without_a_temperature_are_as_sure_of_their_cells():
    scores = []
    for temperature in ("trained", "none"):
        learner = new_learner(settings(steps=5, temperature=temperature), Seen())
        learner.attention.start_at_prototypes(torch.eye(PARTS, 12), 10.0, torch.Generator().manual_seed(0))
        scores.append(learner.attention.logits(torch.ones(1, 12), torch.eye(12)[None]))

    assert torch.allclose(*scores, atol=1e-5)
    assert scores[0].max().item() == pytest.approx(10)


def test_a_literal_learner_is_read_back_as_it_was(tmp_path):
    config = settings(
        images=str(photographs(tmp_path / "photos", 4)),
        encoder="random:vit_tiny_patch16_224",
        paper=True,
        steps=2,
        run=RunConfig(out=tmp_path / "run", device="cpu", precision="fp32"),
    )

    learn(config)

    shape = load_learner(tmp_path / "run")[0].shape
    assert (shape.gate, shape.projections, shape.temperature) == ("sigmoid", "shared", "none")
    names = set(checkpoint.load_tensors(checkpoint.find(tmp_path / "run"))[0])
    assert not names & {
        f"attention.{n}" for n in ("gate_in_bias", "gate_out_bias", "query_bias", "key_bias", "log_scale")
    }
    assert (
        open_token_labeller(tmp_path / "run", precision="fp32")(np.zeros((1, 64, 64, 3), np.uint8)).parts.max() < PARTS
    )


def test_a_shape_that_does_not_say_is_that_of_an_older_learner():
    config = settings(**PAPER | DEPARTURES["all"])
    said = shape_as_json(new_learner(config, Seen()).shape)
    older = {name: value for name, value in said.items() if name not in ("gate", "projections", "temperature")}

    assert LearnerShape(**older) == LearnerShape(**said)


class NothingReadBack(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [PAPER, {"steps": 5}, {"steps": 5, "target": "both"}], ids=["paper", "tokens", "both"])
def test_a_step_reads_nothing_back_from_the_device(form):
    _, _, encoder, view = a_step({})
    config = settings(**form)
    learner = new_learner(config, encoder)

    with NothingReadBack():
        parts_loss(learner, config, encoder, view)[0].backward()


@pytest.mark.parametrize("crops", [0, 2])
@pytest.mark.parametrize("broken_call", [1, 2, 3])
def test_an_error_at_any_time_leaves_no_reader_of_images_behind(crops, broken_call, tmp_path):
    """While the error is still held, as a notebook holds its last one."""

    class Breaking(Oracle):
        calls = 0

        def __call__(self, images, ids_visible=None):
            self.calls += 1
            if self.calls == broken_call:
                raise RuntimeError("out of memory")
            return super().__call__(images, ids_visible)

    run = RunConfig(out=tmp_path / "run", device="cpu", precision="fp32")
    photos = str(photographs(tmp_path / "photos", 40))
    config = LearnConfig(
        images=photos, encoder="oracle", grid=16, num_parts=3, crops=crops, steps=3, batch_size=20, run=run
    )
    before = set(threading.enumerate())

    with pytest.raises(RuntimeError, match="out of memory") as held:
        learn(config, encoder=Breaking())

    assert held.value is not None
    assert not [one.name for one in set(threading.enumerate()) - before if one.name.startswith("images")]
