"""A plan binds a folder from its first shard on, and says in words what differs."""

import pytest
from conftest import write_set

from shards.atomic import read_json
from shards.build import open_plan

PLAN = {"batch_size": 64, "inputs_sha256": "a1", "learner_sha256": "b2", "encoder_sha256": "c3"}


def test_where_no_shard_was_built_another_plan_is_taken(tmp_path):
    """The first try was refused, or ran out of memory."""
    first = open_plan(tmp_path, PLAN)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/.000000.tar.0123").touch()  # a killed writer's

    second = open_plan(tmp_path, PLAN | {"batch_size": 32})

    assert first != second
    assert read_json(tmp_path / "plan.json")["batch_size"] == 32


def test_once_a_shard_is_there_another_plan_is_refused(tmp_path):
    write_set(tmp_path, count=4, seed=0)

    with pytest.raises(ValueError, match=r"started with other settings \(--seed was 0, now 1\)"):
        open_plan(tmp_path, {"seed": 1, "inputs": 4})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learner_sha256", "(other parts)"),
        ("encoder_sha256", "(other encoder weights)"),
        ("inputs_sha256", "(other images, names or classes)"),
        ("batch_size", "(--batch-size was 64, now 'z')"),
    ],
)
def test_what_differs_is_said_in_words_and_not_in_digests(name, words, tmp_path):
    open_plan(tmp_path, PLAN)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/000000.tar").touch()

    with pytest.raises(ValueError, match="choose another --out") as refused:
        open_plan(tmp_path, PLAN | {name: "z"})
    assert words in str(refused.value)
