"""The sections of benchmarks/gpu.py: what they are configured with, count, record and report."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.mae_flops import forward_of_mae
from torch._dynamo import OptimizedModule
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.on_gpu import against_cpu, parts, step, study, verbs
from benchmarks.on_gpu.against_cpu import CPU, relative_error
from benchmarks.on_gpu.case import Bench, Case, Section, Unfinished
from benchmarks.on_gpu.drawn import BODY, HEAD, KINDS, LEGS, TAIL, draw, drawn
from benchmarks.on_gpu.flops import step_flops
from benchmarks.on_gpu.ledger import Ledger
from benchmarks.on_gpu.report import as_json, as_markdown, as_text, reported
from benchmarks.on_gpu.timing import seconds_of
from benchmarks.rounds import exact
from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from training.device import plain_attention_on_cpu


def test_a_line_that_a_kill_cut_short_is_not_read_and_not_added_to(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", "commit")
    ledger.begin("step", "one")
    ledger.row("step", "one", exact("rate", 5.0, "images/s", 1))
    with open(ledger.path, "a") as file:
        file.write('{"section": "step", "case": "one", "ev')

    cut = ledger.outcomes("step")["one"]
    ledger.end("step", "one", "done")

    assert (cut.state, [row.value for row in cut.rows]) == ("cut", [5.0])
    assert ledger.outcomes("step")["one"].state == "done"


def test_a_new_try_of_a_case_drops_the_rows_of_the_one_before(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", "commit")
    for value in (1.0, 2.0):
        ledger.begin("step", "one")
        ledger.row("step", "one", exact("rate", value, "images/s", 1))
        ledger.end("step", "one", "done")

    assert [row.value for row in ledger.outcomes("step")["one"].rows] == [2.0]


def test_a_report_says_of_every_case_how_it_ended_and_of_every_row_whether_its_bar_holds(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", "abc")
    cases = [Case(name, list) for name in ("good", "large", "unseen")]
    section = Section("step", 1.0, lambda bench: cases, {"share": (">=", 0.36)})
    for name, state, why in (("good", "done", ""), ("large", "does not fit", "tried to allocate 97 GB")):
        ledger.begin("step", name)
        ledger.row("step", name, exact("share", 0.4 if name == "good" else 0.3, "share", 7))
        ledger.end("step", name, state, why)

    one = reported(section, cases, ledger, held=True)

    text, page = as_text("heading", [one]), as_markdown("heading", [one])
    for shown in (text, page):
        assert "does not fit: tried to allocate 97 GB" in shown
        assert "not reached" in shown
    assert [row["verdict"] for row in as_json({}, [one])["rows"]] == ["holds", "fails"]
    assert {row["verdict"] for row in as_json({}, [reported(section, cases, ledger, held=False)])["rows"]} == {""}
    assert [case["commit"] for case in as_json({}, [one])["cases"]] == ["abc", "abc", ""]
    later = reported(section, cases, Ledger(ledger.path, "def"), held=True)
    assert as_text("", [later]).count("at commit abc") == 2
    assert "at commit" not in text
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}


def test_a_figure_that_is_no_number_fails_its_bar_and_is_null_in_json(tmp_path):
    ledger, cases = Ledger(tmp_path / "ledger.jsonl", "abc"), [Case("one", list)]
    ledger.begin("verbs", "one")
    ledger.row("verbs", "one", exact("error", float("nan"), "relative", 1))
    ledger.end("verbs", "one", "done")

    one = reported(Section("verbs", 1.0, lambda bench: cases, {"error": ("<=", 1e-4)}), cases, ledger, held=True)

    (row,) = as_json({}, [one])["rows"]
    assert (row["value"], row["low"], row["verdict"]) == (None, None, "fails")
    assert "nan" in as_text("", [one])


def test_an_error_on_the_device_shows_in_its_row():
    def stepped(device: torch.device, precision: str) -> tuple[float, torch.Tensor]:
        off = {"fp32": 0.0, "bf16": 0.5}[precision] * (device.type == "meta")
        return 2.0 * (1 + off), torch.tensor([3.0, 4.0]) * (1 + 2 * off)

    bench = Bench(Path(), "cpu", True, (), "builtin", None, 1, 0.0)
    object.__setattr__(bench, "device", "meta")
    rows = {row.name: row.value for row in verbs._against_cpu(bench, stepped)}

    assert rows == pytest.approx(
        {"loss_error_fp32": 0, "gradient_error_fp32": 0, "loss_error_bf16": 0.5, "gradient_error_bf16": 1.0}
    )
    assert np.isnan(relative_error(torch.tensor([float("nan"), 1.0]), torch.ones(2)))
    assert relative_error(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(5**0.5)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """A folder of a bench that has its drawings already."""
    out = tmp_path_factory.mktemp("drawings") / "out"
    drawn(out, count=16, size=224, cores=2)
    return out


def real(drawings, **changes) -> Bench:
    """A bench of real size, on few drawings."""
    settings = {
        "out": drawings, "device": "cpu", "rehearse": False, "photographs": (), "encoder": "builtin", "data": None,
        "cores": 5, "ends": 0.0,
    }  # fmt: skip
    return Bench(**(settings | changes))


def test_the_step_that_is_measured_is_the_one_that_its_name_says(drawings):
    def sizes(model: str) -> tuple[int, float, int, int, int]:
        config = step.config_of(real(drawings), model, 512)
        assert (config.masking, config.batch_size, config.run.precision, config.run.threads) == (
            "semmae",
            512,
            "bf16",
            3,
        )
        return config.patch, config.keep_share, config.embed_dim, config.depth, config.decoder_depth

    assert sizes("ViT-B/16") == (16, 1.0, 768, 12, 8)
    assert sizes("ViT-B/8 foreground quarter") == (8, 0.25, 768, 12, 8)
    assert sizes("ViT-L/16") == (16, 1.0, 1024, 24, 8)
    named = [case.name for case in step.cases(real(drawings))]
    assert {
        f"ViT-B/16 {how}, batch {batch}" for how in ("eager", "compiled") for batch in (256, 512, 1024, 2048)
    } < set(named)
    with step.bed(real(drawings, rehearse=True), "ViT-B/16", 4, compiled=True) as on:
        assert isinstance(on.stepped, OptimizedModule)


def test_masks_are_computed_where_and_as_they_are_asked_for(drawings):
    bench = real(drawings, rehearse=True)
    config = against_cpu.pretrain_config(bench, bench.out)

    inside, whole = (against_cpu.masked_batch(bench, config, CPU, alpha).ids_masked for alpha in (0.0, 1.0))

    assert (inside != whole).any()
    there = against_cpu.masked_batch(bench, config, torch.device("meta"))
    assert (there.ids_visible.device.type, there.ids_masked.device.type) == ("meta", "meta")


def test_parts_are_learned_by_every_method_on_images_that_are_not_scored(drawings, tmp_path):
    bench = real(drawings, out=tmp_path, photographs=(drawings / "drawn",), encoder="random:other")

    images, sets = parts.halves(bench)

    learned = {Path(line).name for line in images.read_text().splitlines()}
    (scored,) = ({file.name for file in folder.glob("images/*/*")} for folder in sets.values())
    assert (len(learned), len(scored), len(learned & scored)) == (8, 8, 0)
    assert list(sets) == ["out/drawn"]
    assert all(link.resolve().is_file() for folder in sets.values() for link in folder.glob("labels/*/*"))
    told = {name: parts.config_of(bench, name, images, 50) for name in parts.METHODS}
    assert {config.encoder for config in told.values()} == {"random:other"}
    default, tokens, paper = told.values()
    assert (default.updates, default.init, default.paper) == (0, "kmeans", False)
    assert (tokens.updates, tokens.init, tokens.target, tokens.paper) == (50, "kmeans", "features", False)
    assert (paper.updates, paper.init, paper.target, paper.paper) == (50, "random", "pixels", True)
    learns = [against_cpu.learn_config(real(drawings), tmp_path, paper=paper) for paper in (False, True)]
    assert [config.paper for config in learns] == [False, True]


def test_parts_are_learned_on_the_train_folder_beside_the_scored_one(drawings, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "people" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "people" / split).symlink_to(drawings.absolute() / "drawn")

    images, sets = parts.halves(real(drawings, out=tmp_path / "out", photographs=(tmp_path / "people" / "val",)))

    learned = images.read_text().splitlines()
    assert len(learned) == 16
    assert all("/people/train/" in line for line in learned)
    assert len(list(sets["people/val"].glob("images/*/*"))) == 16


def test_few_images_of_a_large_folder_are_scored(drawings, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SCORED", 3)

    _, sets = parts.halves(real(drawings, out=tmp_path, photographs=(drawings / "drawn",)))

    assert 2 <= len(list(sets["out/drawn"].glob("images/*/*"))) <= 3


def test_a_training_of_too_few_steps_is_no_answer(drawings):
    toy = real(drawings, rehearse=True, encoder="random:vit_tiny_patch16_224")
    config = parts.config_of(toy, "k-means, then tokens", drawings / "drawn", 1)

    with pytest.raises(Unfinished, match="0 steps fit, and 200 are needed"):
        parts._steps_that_fit(replace(toy, rehearse=False, ends=time.monotonic() + 5), config, 0.5, 60.0)
    much = replace(toy, rehearse=False, ends=time.monotonic() + 1e6)
    assert parts._steps_that_fit(much, config, 0.5, 60.0) == parts.MOST


def test_a_study_compares_runs_of_one_seed_that_differ_in_their_masking(drawings, tmp_path):
    bench = real(drawings, out=tmp_path, data=str(drawings / "drawn-shards-224"))
    runs = {(masking, seed): study.config_of(bench, masking, seed) for masking in study.MASKINGS for seed in (0, 1)}
    for (masking, seed), config in runs.items():
        assert (config.masking, config.seed, config.data) == (masking, seed, bench.data)
        assert config.epochs * 16 == study.STEPS * study.BATCH
        config.run.out.mkdir(parents=True)
        value = {"random": 10.0, "semmae": 13.0 + 2 * seed}[masking]
        (config.run.out / "results.jsonl").write_text(json.dumps({"metric": "top1", "value": value}) + "\n")

    with pytest.raises(Unfinished, match="4 runs are not finished"):
        list(study._compared(bench, (0, 1)))
    for config in runs.values():
        (config.run.out / "DONE.json").write_text("{}")

    assert [row.value for row in study._compared(bench, (0, 1))] == pytest.approx([4.0, 1.0])


def pretraining(**changes) -> PretrainConfig:
    return PretrainConfig(data="", run=StreamRun(out=Path()), **changes)


def test_a_step_of_vit_b_takes_58_7_gflop_an_image():
    assert step_flops(pretraining(), 224) / 1e9 == pytest.approx(58.7, abs=0.05)


@pytest.mark.parametrize("predicted", [None, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 64, "depth": 2, "heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
        {
            "embed_dim": 48,
            "depth": 1,
            "heads": 3,
            "decoder_dim": 16,
            "decoder_depth": 3,
            "decoder_heads": 2,
            "patch": 32,
        },
    ],
)
def test_the_formula_counts_what_a_counter_counts_in_maes_own_forward(changes, predicted):
    config = pretraining(**changes, predicted=predicted)
    model = MAE(size=224, **{"patch": config.patch} | changes)
    plain_attention_on_cpu(model, torch.device("cpu"))

    with FlopCounterMode(display=False) as counter:
        forward_of_mae(model, torch.zeros(1, 3, 224, 224), mask_ratio=config.mask_ratio, predicted=predicted)

    assert step_flops(config, 224) == 3 * counter.get_total_flops()


def test_blocks_share_the_time_and_are_of_single_calls():
    calls = []

    taken = seconds_of(lambda: calls.append(time.sleep(0.002)), device="cpu", seconds=0.7)  # some fifty calls a block

    assert len(taken) == 7
    assert all(0.002 <= seconds < 0.02 for seconds in taken)
    assert len(calls) > 70
    assert len(seconds_of(list, device="cpu", seconds=0.0)) == 2


def test_drawings_are_functions_of_their_number_and_have_every_part():
    for number in range(2 * KINDS):
        (image, labels), (again, _) = draw(number), draw(number)

        assert np.array_equal(np.asarray(image), np.asarray(again))
        assert set(np.unique(np.asarray(labels))) == {0, BODY, HEAD, LEGS, TAIL}
        assert image.size == labels.size
