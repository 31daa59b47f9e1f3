"""What benchmarks/gpu.py promises: it rehearses on any machine, loses one case at most, and continues."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from reference.mae_flops import forward_of_mae
from torch._dynamo import OptimizedModule
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.on_gpu import against_cpu, parts, step, study, verbs
from benchmarks.on_gpu.against_cpu import CPU, relative_error
from benchmarks.on_gpu.case import Bench, Case, Section, Unfinished
from benchmarks.on_gpu.config import GpuConfig
from benchmarks.on_gpu.drawn import BODY, HEAD, KINDS, LEGS, TAIL, draw
from benchmarks.on_gpu.flops import step_flops
from benchmarks.on_gpu.ledger import Ledger
from benchmarks.on_gpu.measure import _claim, bench_gpu
from benchmarks.on_gpu.report import as_json, as_markdown, as_text, reported
from benchmarks.on_gpu.sections import SECTIONS
from benchmarks.on_gpu.timing import seconds_of
from benchmarks.rounds import Row, exact, verdict
from pretrain.config import PretrainConfig, StreamRun
from pretrain.mae import MAE
from training.device import plain_attention_on_cpu

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)  # the first test waits for a whole rehearsal
ABSENT = ("ray", "tyro", "webdataset", "beartype", "rich", "tensorboard", "simplejpeg", "moto")
"""Packages that a machine with a card and no internet may lack."""


SCRIPT = str(ROOT / "benchmarks" / "gpu.py")
STUBS = str(Path(__file__).parent / "stub_sections.py")


@dataclass(frozen=True, slots=True)
class Run:
    """A command that was started; its folder, and what it says."""

    folder: Path
    process: subprocess.Popen[str]

    def finished(self) -> subprocess.CompletedProcess[str]:
        said, told = self.process.communicate(timeout=540)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, said, told)


def started(folder: Path, *arguments: str, absent: Path | None = None) -> Run:
    path = os.pathsep.join(map(str, filter(None, (absent, ROOT))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return Run(folder, subprocess.Popen([sys.executable, *arguments], env=environment, **pipes))


@pytest.fixture(scope="module")
def absent(tmp_path_factory) -> Path:
    """A folder in which every package that may be absent cannot be imported."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not installed here')\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, absent) -> Iterator[dict[str, Run]]:
    """Three commands at once: each waits for itself more than for the others."""
    out, none, stubs = (tmp_path_factory.mktemp(name) / "out" for name in ("gpu", "none", "stubs"))
    stubs.mkdir()
    Ledger(stubs / "ledger.jsonl", "earlier").begin("troubled", "cut in an earlier call")
    begun = {
        "rehearsal": started(
            out, SCRIPT, "--rehearse", "--out", str(out), "--json", str(out.parent / "rows.json"), absent=absent
        ),
        "no card": started(none, SCRIPT, "--out", str(none)),
        "stubs": started(stubs, STUBS, str(stubs), "--real"),
    }
    yield begun
    for one in begun.values():
        one.process.kill()


@pytest.fixture(scope="module")
def rehearsal(runs) -> tuple[Path, subprocess.CompletedProcess[str]]:
    return runs["rehearsal"].folder, runs["rehearsal"].finished()


def test_the_rehearsal_measures_every_case_of_every_section_without_the_packages_it_may_not_need(rehearsal):
    out, done = rehearsal

    told = json.loads((out / "gpu.json").read_text())
    states = {f"{case['section']}/{case['case']}": (case["state"], case["why"]) for case in told["cases"]}
    assert done.returncode == 0, done.stderr
    assert {section.name for section in SECTIONS} == {case["section"] for case in told["cases"]}
    assert {state for state, _ in states.values()} == {"done"}, states
    rows = {row["name"] for row in told["rows"]}
    assert all(any(row.startswith(f"{case}/") for row in rows) for case in states)
    assert json.loads((out.parent / "rows.json").read_text()) == told["rows"]
    assert all({"name", "value", "unit", "n", "low", "high"} <= set(row) for row in told["rows"])


def test_on_a_cpu_nothing_differs_from_the_cpu_but_what_bf16_rounds(rehearsal):
    rows = json.loads((rehearsal[0] / "gpu.json").read_text())["rows"]
    held = [row | {"name": row["name"].rpartition("/")[2]} for row in rows if row["name"].startswith("verbs/")]

    fp32 = [row for row in held if row["name"].endswith("error_fp32") or row["name"] == "one_rank_loss_error"]
    bf16 = [row for row in held if row["name"].startswith("gradient_error_bf16")]
    assert len(fp32) == 11
    assert {row["value"] for row in fp32} == {0.0}
    assert all(row["value"] > 0 for row in bf16)
    assert {row["value"] for row in held if row["name"] == "resumed_error"} == {0.0}
    seen = {row["name"] for row in held}
    assert seen >= set(verbs.BARS)
    for row in held:
        said = verdict(Row(**{name: row[name] for name in ("name", "value", "unit", "n", "low", "high")}), verbs.BARS)
        assert said in ("", "holds"), row


def test_the_rows_of_a_step_are_of_one_loop_and_agree_with_each_other(rehearsal):
    rows = {row["name"]: row["value"] for row in json.loads((rehearsal[0] / "gpu.json").read_text())["rows"]}

    for case in ("ViT-B/16 eager, batch 4", "ViT-B/16 compiled, batch 8", "ViT-B/8 foreground quarter eager, batch 8"):
        alone = rows[f"step/{case}/gpu_alone"]
        assert rows[f"step/{case}/lost_to_feeding"] == pytest.approx(
            1 - rows[f"step/{case}/with_stream_and_masks"] / alone
        )
        for share in ("host_waits_for_stream", "host_makes_masks"):
            assert 0 < rows[f"step/{case}/with_stream_and_masks_{share}"] < 1
    assert rows["step/ViT-B/16 compiled, batch 8/compiling"] > 0
    assert sum("/kernel " in name for name in rows) == 20


def test_the_tables_hold_every_row_and_say_where_they_are_from(rehearsal):
    out, done = rehearsal
    told, page = json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()

    for text in (done.stdout, page):
        assert all(row["name"].rpartition("/")[2][:40] in text for row in told["rows"])
        assert f"torch {torch.__version__.partition('+')[0]}" in text
        assert "simplejpeg" in text
        assert str(told["machine"]["commit"]) in text
    assert "rehearsal" in page.splitlines()[0]


@pytest.fixture(scope="module")
def later(rehearsal, absent) -> dict[str, Run]:
    """Three calls after it, at once: the same; the same where a case had failed, with no time left; another encoder."""
    out = rehearsal[0]
    failed, other = (shutil.copytree(out, out.with_name(name)) for name in ("failed", "other"))
    ledger = Ledger(failed / "ledger.jsonl", "earlier")
    ledger.begin("step", "masks")
    ledger.end("step", "masks", "failed", "ValueError: it broke")
    encoder = ("--encoder", "random:vit_small_patch16_224")
    return {
        "same": started(out, SCRIPT, "--rehearse", "--out", str(out), absent=absent),
        "failed": started(failed, SCRIPT, "--rehearse", "--out", str(failed), "--minutes", "0.0001"),
        "other": started(other, SCRIPT, "--rehearse", "--out", str(other), *encoder),
    }


def test_a_second_call_measures_nothing_and_prints_the_same(rehearsal, later):
    out, first = rehearsal
    measured = [line for line in (out / "ledger.jsonl").read_text().splitlines() if '"begin"' in line]

    again = later["same"].finished()

    assert again.returncode == 0
    assert len(measured) == len(json.loads((out / "gpu.json").read_text())["cases"])
    assert again.stdout.splitlines()[1:] == first.stdout.splitlines()[1:]


def test_a_failed_case_is_the_exit_status_of_the_call(later):
    done = later["failed"].finished()

    assert done.returncode == 1
    assert "failed: ValueError: it broke at commit earlier" in done.stdout
    assert "1 cases failed, step/masks" in done.stderr


def test_a_call_with_other_settings_is_refused_by_a_folder_that_has_figures(later):
    done = later["other"].finished()

    assert done.returncode == 2
    assert "encoder was 'random:vit_tiny_patch16_224', now 'random:vit_small_patch16_224'" in done.stderr
    assert not done.stdout


def test_without_a_card_or_a_folder_the_call_is_refused_in_a_sentence(runs, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")

    no_card = runs["no card"].finished()
    no_folder = started(tmp_path, SCRIPT, "--photographs", "nowhere", "--out", str(tmp_path / "out")).finished()

    assert (no_card.returncode, no_folder.returncode) == (2, 2)
    assert no_card.stderr.strip().endswith("--rehearse runs everything at toy size on a CPU")
    assert "--photographs nowhere needs images/ beside labels/ or masks/" in no_folder.stderr
    assert not (runs["no card"].folder / "drawn").exists()


def test_what_fails_dies_or_hangs_loses_itself_alone_and_is_tried_again_last(runs):
    first, folder = runs["stubs"].finished(), runs["stubs"].folder

    ledger = Ledger(folder / "ledger.jsonl", "commit")
    found = {
        (section, name): (outcome.state, outcome.why, [row.name for row in outcome.rows])
        for section in ("troubled", "hanging", "last")
        for name, outcome in ledger.outcomes(section).items()
    }
    assert first.returncode == 0, first.stderr
    assert found == {
        ("troubled", "breaks"): ("failed", "ValueError: it broke", ["before"]),
        ("troubled", "is too large"): ("does not fit", "tried to allocate 97 GB", ["fits"]),
        ("troubled", "is too large for cuBLAS"): (
            "does not fit",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
            [],
        ),
        ("troubled", "cut in an earlier call"): ("cut", "", []),
        ("troubled", "dies"): ("failed", "its process ended with status -11", ["last words"]),
        ("troubled", "goes on"): ("unfinished", "1 of 4", ["stretch"]),
        ("troubled", "fine"): ("done", "", ["one"]),
        ("hanging", "hangs"): ("cut", "", []),
        ("last", "fine"): ("done", "", ["one"]),
    }
    assert "it broke\non two lines" in first.stderr
    assert not _lives(int((folder / "child").read_text()))
    times = {name: ledger.outcomes(name)["fine" if name == "last" else "hangs"].began for name in ("hanging", "last")}
    assert times["last"] - times["hanging"] < 20
    troubled = [Case(name, list, 0) for name in ("breaks", "is too large", "dies", "goes on", "fine", "takes long")]
    hanging = [Case(name, list, 0) for name in ("hangs", "fine")]
    assert [case.name for case in ledger.waiting("troubled", troubled)] == ["takes long", "breaks", "dies", "goes on"]
    assert [case.name for case in ledger.waiting("hanging", hanging)] == ["fine", "hangs"]


def test_a_kill_of_the_one_who_watches_ends_the_section_at_its_bound(tmp_path):
    environment, silent = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.DEVNULL
    watcher = subprocess.Popen([sys.executable, STUBS, str(tmp_path)], env=environment, stdout=silent, stderr=silent)
    deadline = time.monotonic() + 120
    while not (tmp_path / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    measuring = _child_of(watcher.pid)

    watcher.kill()
    watcher.wait()

    ends = time.monotonic() + 20
    while _lives(measuring) and time.monotonic() < ends:
        time.sleep(0.1)
    os.kill(int((tmp_path / "child").read_text()), 9)
    assert not _lives(measuring)


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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


def test_two_calls_do_not_measure_into_one_folder(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="in use by another call"):
        bench_gpu(GpuConfig(out=tmp_path, rehearse=True))

    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_of_another_card_is_refused(tmp_path):
    _claim(tmp_path / "settings.json", {"card": "NVIDIA H100 80GB HBM3", "rehearse": False})

    _claim(tmp_path / "settings.json", {"card": "NVIDIA H100 80GB HBM3", "rehearse": False})
    with pytest.raises(ValueError, match="card was 'NVIDIA H100 80GB HBM3', now 'NVIDIA H200'"):
        _claim(tmp_path / "settings.json", {"card": "NVIDIA H200", "rehearse": False})


def test_an_error_on_the_device_shows_in_its_row():
    def stepped(device: torch.device, precision: str) -> tuple[float, torch.Tensor]:
        off = {"fp32": 0.0, "bf16": 0.5}[precision] * (device.type == "meta")
        return 2.0 * (1 + off), torch.tensor([3.0, 4.0]) * (1 + 2 * off)

    bench = Bench(Path(), "meta", True, (), "small", None, 1, 0.0)  # type: ignore[arg-type]
    rows = {row.name: row.value for row in verbs._against_cpu(bench, stepped)}

    assert rows == pytest.approx(
        {"loss_error_fp32": 0, "gradient_error_fp32": 0, "loss_error_bf16": 0.5, "gradient_error_bf16": 1.0}
    )
    assert np.isnan(relative_error(torch.tensor([float("nan"), 1.0]), torch.ones(2)))
    assert relative_error(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(5**0.5)


def real(rehearsal, **changes) -> Bench:
    """A bench of real size, on the drawings of the rehearsal."""
    settings = {
        "out": rehearsal[0], "device": "cpu", "rehearse": False, "photographs": (), "encoder": "small", "data": None,
        "cores": 5, "ends": 0.0,
    }  # fmt: skip
    return Bench(**(settings | changes))


def test_the_step_that_is_measured_is_the_one_that_its_name_says(rehearsal):
    def sizes(model: str) -> tuple[int, float, int, int, int]:
        config = step.config_of(real(rehearsal), model, 512)
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
    named = [case.name for case in step.cases(real(rehearsal))]
    assert {
        f"ViT-B/16 {how}, batch {batch}" for how in ("eager", "compiled") for batch in (256, 512, 1024, 2048)
    } < set(named)
    with step.bed(real(rehearsal, rehearse=True), "ViT-B/16", 4, compiled=True) as on:
        assert isinstance(on.stepped, OptimizedModule)


def test_masks_are_computed_where_and_as_they_are_asked_for(rehearsal):
    bench = real(rehearsal, rehearse=True)
    config = against_cpu.pretrain_config(bench, bench.out)

    inside, whole = (against_cpu.masked_batch(bench, config, CPU, alpha).mask for alpha in (0.0, 1.0))

    assert (inside != whole).any()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        against_cpu.masked_batch(bench, config, torch.device("meta"))


def test_parts_are_learned_by_every_method_on_images_that_are_not_scored(rehearsal, tmp_path):
    bench = real(rehearsal, out=tmp_path, photographs=(rehearsal[0] / "drawn",), encoder="random:other")

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
    assert (paper.updates, paper.init, paper.target, paper.paper) == (50, "heads", "pixels", True)
    learns = [against_cpu.learn_config(real(rehearsal), tmp_path, paper=paper) for paper in (False, True)]
    assert [config.paper for config in learns] == [False, True]


def test_parts_are_learned_on_the_train_folder_beside_the_scored_one(rehearsal, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "people" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "people" / split).symlink_to(rehearsal[0].absolute() / "drawn")

    images, sets = parts.halves(real(rehearsal, out=tmp_path / "out", photographs=(tmp_path / "people" / "val",)))

    learned = images.read_text().splitlines()
    assert len(learned) == 16
    assert all("/people/train/" in line for line in learned)
    assert len(list(sets["people/val"].glob("images/*/*"))) == 16


def test_a_study_compares_runs_of_one_seed_that_differ_in_their_masking(rehearsal, tmp_path):
    bench = real(rehearsal, out=tmp_path, data=str(rehearsal[0] / "drawn-shards-224"))
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
def test_the_formula_counts_what_a_counter_counts_in_maes_own_forward(changes):
    config = pretraining(**changes)
    model = MAE(size=224, **{"patch": config.patch} | changes)
    plain_attention_on_cpu(model, torch.device("cpu"))

    with FlopCounterMode(display=False) as counter:
        forward_of_mae(model, torch.zeros(1, 3, 224, 224), mask_ratio=config.mask_ratio)

    assert step_flops(config, 224) == 3 * counter.get_total_flops()


def test_blocks_share_the_time_and_are_of_single_calls():
    calls = []

    taken = seconds_of(lambda: calls.append(time.sleep(0.002)), device="cpu", seconds=0.1)

    assert len(taken) == 7
    assert all(0.002 <= seconds < 0.02 for seconds in taken)
    assert len(calls) >= 11
    assert len(seconds_of(list, device="cpu", seconds=0.0)) == 2


def test_drawings_are_functions_of_their_number_and_have_every_part():
    for number in range(2 * KINDS):
        (image, labels), (again, _) = draw(number), draw(number)

        assert np.array_equal(np.asarray(image), np.asarray(again))
        assert set(np.unique(np.asarray(labels))) == {0, BODY, HEAD, LEGS, TAIL}
        assert image.size == labels.size
