"""A set holds labels of one precision and one type of device: plan and sidecars say which, and another is refused."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import photographs, tars
from PIL import Image

from partlearn.config import ExtractConfig
from pipeline.config import VerifyConfig
from pipeline.extract import extract
from pipeline.verify import verify as verify_verb
from shards.atomic import read_json, sha256_file, sha256_json, write_json
from shards.info import digests as field_digests
from shards.verify import verify
from training.config import RunConfig

CUDA = {"device": "cuda", "precision": "bf16"}


def settings(out: Path, device="cpu", precision="fp32", **changes) -> ExtractConfig:
    options = {"parts": Path("heads"), "encoder": "random:vit_tiny_patch16_224", "grid": 4, "size": 32} | changes
    run = RunConfig(out=out, device=device, precision=precision)
    return ExtractConfig(run=run, samples_per_shard=4, batch_size=4, backend="local", **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return str(photographs(tmp_path_factory.mktemp("images") / "photos", 8))


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory) -> Path:
    """Two shards in bf16."""
    out = tmp_path_factory.mktemp("made") / "set"
    extract(settings(out, images=photos, precision="bf16"))
    return out


@pytest.fixture
def mine(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "mine"))


def told(folder: Path, **fields: str | None) -> Path:
    """The same set, whose plan, sidecars and dataset.json tell that it was made otherwise (None: do not tell)."""

    def changed(file: dict) -> dict:
        return {name: value for name, value in (file | fields).items() if value is not None}

    plan = changed(read_json(folder / "plan.json"))
    write_json(folder / "plan.json", plan)
    for sidecar in (folder / "shards").glob("*.json"):
        write_json(sidecar, changed(read_json(sidecar)) | {"plan": sha256_json(plan)})
    info = read_json(folder / "dataset.json")
    info["producer"]["labels"] |= {name: value for name, value in fields.items() if value}
    del info["plan"], info["digests"]
    if None not in fields.values():  # releases that kept neither did not keep these
        info["plan"] = plan
        info["digests"] = field_digests(info)
    write_json(folder / "dataset.json", info)
    return folder


def half(folder: Path) -> Path:
    """A build that was killed before its second shard was done."""
    (folder / "dataset.json").unlink()
    (folder / "shards/000001.json").unlink()
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_plan_and_sidecars_say_what_labels_were_computed_with(made):
    files = [made / "plan.json", *sorted((made / "shards").glob("*.json"))]

    assert [(read_json(file)["device"], read_json(file)["precision"]) for file in files] == [("cpu", "bf16")] * 3
    labels = read_json(made / "dataset.json")["producer"]["labels"]
    assert (labels["device"], labels["precision"]) == ("cpu", "bf16")


def test_auto_writes_down_what_it_found(photos, tmp_path):
    extract(settings(tmp_path / "set", images=photos, precision="auto"))

    plan = read_json(tmp_path / "set/plan.json")
    assert plan["device"] == "cpu"
    assert plan["precision"] in ("fp32", "bf16")
    assert read_json(tmp_path / "set/dataset.json")["producer"]["labels"]["precision"] == plan["precision"]


def test_another_precision_is_refused_with_the_way_out_and_the_same_goes_on(mine, made, photos):
    before = digests(half(mine))

    with pytest.raises(
        ValueError,
        match=r"computed with --device cpu --precision bf16, now it would be --device cpu --precision fp32, .*"
        r"pass --device cpu --precision bf16 .*, or choose another --out",
    ):
        extract(settings(mine, images=photos))
    assert digests(mine) == before

    extract(settings(mine, images=photos, precision="bf16"))
    assert tars(mine) == tars(made)


@pytest.mark.parametrize("options", [{}, {"retry_failed": True}])
def test_what_was_begun_on_another_device_is_refused_before_anything_is_taken_back(options, mine, photos):
    sidecar = told(mine, **CUDA) / "shards/000000.json"
    rejected = {"source": "x", "ordinal": 0, "step": "read", "reason": "gone"}
    write_json(sidecar, read_json(sidecar) | {"rejected": [rejected]})
    if not options:
        half(mine)
    before = digests(mine)

    with pytest.raises(ValueError, match="were computed with --device cuda --precision bf16, now it would be"):
        extract(settings(mine, images=photos, device="cpu" if not options else "auto", precision="auto", **options))

    assert digests(mine) == before


def test_a_whole_set_is_reused_on_any_machine_unless_something_else_is_asked_for(mine, photos):
    before = digests(told(mine, **CUDA))

    info = extract(settings(mine, images=photos, device="auto", precision="auto"))

    assert digests(mine) == before
    assert info["producer"]["labels"]["device"] == "cuda"
    with pytest.raises(ValueError, match="now it would be --device cuda --precision fp32"):
        extract(settings(mine, images=photos, device="auto", precision="fp32"))
    with pytest.raises(ValueError, match="now it would be --device cpu --precision bf16"):
        extract(settings(mine, images=photos, device="cpu", precision="auto"))


def test_a_repair_that_computes_no_label_needs_no_such_device_and_one_that_does_is_refused(mine):
    told(mine, **CUDA)
    (mine / "index.parquet").unlink()

    verify_verb(VerifyConfig(data=mine, level="deep", repair=True))

    assert read_json(mine / "dataset.json")["producer"]["labels"]["device"] == "cuda"
    (mine / "shards/000001.tar").unlink()
    before = digests(mine)
    with pytest.raises(ValueError, match="were computed with --device cuda --precision bf16"):
        verify_verb(VerifyConfig(data=mine, level="deep", repair=True))
    assert digests(mine) == before


def test_a_repair_computes_as_the_set_was_computed(mine, made):
    (mine / "shards/000001.tar").unlink()

    verify_verb(VerifyConfig(data=mine, level="deep", repair=True))

    assert tars(mine) == tars(made)
    assert read_json(mine / "shards/000001.json")["precision"] == "bf16"


def test_a_set_of_an_earlier_release_is_verified_reused_and_repaired_and_half_a_one_refused(mine, photos, made):
    told(mine, device=None, precision=None, encoder_mean=None, encoder_std=None)
    before = digests(mine)

    assert verify(mine, "deep") == []
    extract(settings(mine, images=photos, device="auto", precision="auto"))
    assert digests(mine) == before

    (mine / "shards/000001.tar").unlink()
    verify_verb(VerifyConfig(data=mine, level="deep", repair=True))
    assert tars(mine) == tars(made)
    assert "device" not in read_json(mine / "plan.json")
    with pytest.raises(ValueError, match="started by a release that did not keep on which device"):
        extract(settings(half(mine), images=photos, precision="bf16"))


def test_other_settings_are_told_first(mine, photos):
    with pytest.raises(ValueError, match=r"other settings \(--precision was 'bf16', now 'fp32'; --seed was 0, now 7\)"):
        extract(settings(half(mine), images=photos, seed=7))


def test_drawn_truth_depends_on_no_device_and_goes_on_with_any(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (32, 32)).save(tmp_path / f"set/images/{number}.jpg")
        Image.new("L", (32, 32), 255).save(tmp_path / f"set/masks/{number}.png")
    truth = {"images": str(tmp_path / "set"), "parts": Path("truth"), "encoder": None}
    extract(settings(tmp_path / "out", precision="bf16", **truth))

    info = extract(settings(half(tmp_path / "out"), precision="fp32", **truth))

    assert info["samples"] == 8
    assert not {"device", "precision"} & set(read_json(tmp_path / "out/plan.json"))
    assert pq.read_table(tmp_path / "out/rejected.parquet").num_rows == 0
