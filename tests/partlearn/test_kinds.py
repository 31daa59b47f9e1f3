"""Images are read with the part centres of their kind of object, which is told from the mean token alone."""

import pytest
import torch
from conftest import photographs
from torch.nn import functional as F

from encoders.load import load_encoder
from encoders.whitening import mean_token
from partlearn.config import LearnConfig
from partlearn.crops import TokenCrops
from partlearn.initialise import PROTOTYPE_SCALE
from partlearn.kinds import Kinds
from partlearn.kmeans import settled
from partlearn.learner import LearnerShape, PartLearner, load_learner, shape_as_json
from partlearn.train import learn
from shards.images import list_images
from training.checkpoint import write_tensors
from training.config import RunConfig

DIM, WIDTH, PARTS = 12, 5, 3


def scenes(seed: int, views: int = 40):
    """Views of two kinds by turns: their means lie apart, and so do the directions of their parts."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(2, DIM, generator=generator)
    directions = F.normalize(torch.eye(PARTS, WIDTH) + 0.4 * torch.randn(2, PARTS, WIDTH, generator=generator), dim=2)
    kind = torch.arange(views) % 2
    means = 7 + 5 * places[kind] + 0.1 * torch.randn(views, DIM, generator=generator)
    points = directions[kind] + 0.05 * torch.randn(views, PARTS, WIDTH, generator=generator)
    return means, F.normalize(points, dim=2), kind, directions


def fitted(means, points, centres, kinds: int) -> Kinds:
    found = Kinds(DIM, WIDTH, kinds, PARTS)
    view = torch.arange(len(points)).repeat_interleave(points.shape[1])
    found.fit(means, points.flatten(0, 1), view, centres, torch.Generator().manual_seed(0))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_kind_has_the_parts_of_its_own_images(seed):
    means, points, kind, directions = scenes(seed)
    start = F.normalize(directions.sum(dim=0), dim=1)

    own = fitted(means, points, start, 2).centres(means)

    expected = F.normalize(torch.stack([points[kind == one].mean(dim=0) for one in (0, 1)]), dim=2)[kind]
    assert (own * expected).sum(dim=2).min() > 0.99  # in the order of the centres they began as


def test_the_kind_is_the_nearest_whitened_direction_of_the_mean_token():
    """Written out from the equation, an image at a time."""
    found, generator = Kinds(DIM, WIDTH, 4, PARTS), torch.Generator().manual_seed(1)
    for buffer in found.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    means = torch.randn(30, DIM, generator=generator)

    seen = set()
    for mean, own in zip(means, found.centres(means), strict=True):
        place = [sum((mean[d] - found.mean[d]) * found.whitening[d, j] for d in range(DIM)) for j in range(DIM)]
        cosines = [sum(p * c for p, c in zip(place, centre, strict=True)) for centre in found.kinds]
        seen.add(cosines.index(max(cosines)))
        assert torch.equal(own, found.parts[cosines.index(max(cosines))])
    assert len(seen) == 4


def test_of_few_images_all_kinds_have_the_same_parts():
    means, points, _, directions = scenes(0, views=20)

    own = fitted(means, points, directions[0], 4).centres(means)

    assert (own == own[0]).all()


def test_a_kind_without_cells_enough_keeps_the_parts_of_all():
    means, points, _, directions = scenes(0)
    view = torch.zeros(PARTS, dtype=torch.int64)  # all points are of the first view

    found = Kinds(DIM, WIDTH, 2, PARTS)
    found.fit(means, points[0], view, directions[1], torch.Generator().manual_seed(0))

    assert torch.equal(found.centres(means[1:2])[0], directions[1])
    assert not torch.equal(found.centres(means[:1])[0], directions[1])


def new_shape() -> LearnerShape:
    return LearnerShape(
        dim=DIM,
        width=WIDTH,
        heads=2,
        grid=4,
        parts=PARTS,
        background=True,
        foreground="contrast",
        foreground_share=None,
        where="foreground",
        relative=True,
        from_class=False,
        whitened=True,
        unit=True,
        diffusion=3,
        softmax="parts",
        target="features",
        decoder_size=16,
    )


def config(folder, **changes) -> LearnConfig:
    photos = folder / "photos" if (folder / "photos").exists() else photographs(folder / "photos", 40)
    run = RunConfig(out=folder / "run", device="cpu", precision="fp32")
    settings = {"grid": 4, "num_parts": 3, "batch_size": 20, "encoder": "random:vit_tiny_patch16_224"} | changes
    return LearnConfig(images=str(photos), run=run, **settings)


def test_a_learner_reads_each_image_with_its_kinds_centres_and_so_does_the_saved_one(tmp_path):
    settings = config(tmp_path, kinds=2)
    encoder = load_encoder(settings.encoder, grid=4, precision="fp32")
    learn(settings, encoder=encoder)
    learner, _, _ = load_learner(tmp_path / "run")
    images = torch.randint(0, 256, (12, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = encoder(torch.cat([images, images // 8]))
    cells = learner.learned_cells(tokens)

    logits, read = learner.read(tokens, cells)

    assert learner.shape.kinds == 2
    used = set()
    for image, inside in enumerate(cells):
        mean = tokens.block_tokens[image, 1:][inside].mean(dim=0)
        place = F.normalize((mean - learner.kinds.mean) @ learner.kinds.whitening, dim=0)
        kind = int((learner.kinds.kinds @ place).argmax())
        used.add(kind)
        expected = PROTOTYPE_SCALE * learner.kinds.parts[kind] @ read[image].T
        assert torch.allclose(logits[image], expected, atol=1e-4)
    parts, _ = learner.label(tokens)
    assert torch.equal(parts, logits.argmax(dim=1).masked_fill(~cells, 3))
    assert len(used) == 2
    assert not torch.allclose(learner.kinds.parts[0], learner.kinds.parts[1], atol=1e-2)


def test_each_kinds_centres_have_settled_on_the_cells_of_its_own_views(tmp_path):
    """All cells of an object are drawn here, so what the start saw is known: another round of Lloyd's moves nothing."""
    settings = config(tmp_path, kinds=2, foreground_share=0.5, batch_size=40)
    encoder = load_encoder(settings.encoder, grid=4, precision="fp32")
    learn(settings, encoder=encoder)
    learner, _, _ = load_learner(tmp_path / "run")
    view = next(TokenCrops(settings, encoder, list_images(settings.images)).batches(step=0))
    cells = learner.learned_cells(view.tokens)
    means = mean_token(view.tokens.block_tokens[:, 1:], cells)
    points = learner.read(view.tokens, cells)[1]

    assert torch.allclose(learner.kinds.mean, means.mean(dim=0), atol=1e-3)
    own = (learner.kinds.centres(means)[:, None] == learner.kinds.parts).all(dim=(2, 3))
    for kind, parts in enumerate(learner.kinds.parts):
        again = settled(
            torch.cat([p[c] for p, c in zip(points, cells, strict=True)])[own[:, kind].repeat_interleave(8)], parts, 1
        )
        assert (again * parts).sum(dim=1).min() > 0.999


def test_a_learner_from_before_there_were_kinds_is_read_as_it_was(tmp_path):
    learner = PartLearner(new_shape())
    shape = shape_as_json(learner.shape)
    del shape["kinds"]
    file = tmp_path / "old.safetensors"
    write_tensors(file, learner.state_dict(), {"learner": shape, "encoder": {}, "learner_sha256": ""})

    assert load_learner(file)[0].shape == learner.shape


def test_by_default_there_are_four_kinds_and_one_where_steps_are_taken(tmp_path):
    assert config(tmp_path).kinds == 4
    assert config(tmp_path, steps=3).kinds == 1
    assert config(tmp_path, paper=True).kinds == 1


@pytest.mark.parametrize("changes", [{"steps": 3}, {"paper": True}])
def test_kinds_are_not_trained(changes, tmp_path):
    with pytest.raises(ValueError, match="kinds of objects are not trained; set kinds to 1"):
        config(tmp_path, kinds=2, **changes)
