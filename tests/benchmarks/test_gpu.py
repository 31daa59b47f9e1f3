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

import pytest
import torch
from filelock import FileLock

from benchmarks.on_gpu import verbs
from benchmarks.on_gpu.case import Case
from benchmarks.on_gpu.config import GpuConfig
from benchmarks.on_gpu.ledger import Ledger
from benchmarks.on_gpu.measure import _claim, bench_gpu
from benchmarks.on_gpu.sections import SECTIONS
from benchmarks.rounds import Row, verdict

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


def test_two_calls_do_not_measure_into_one_folder(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="in use by another call"):
        bench_gpu(GpuConfig(out=tmp_path, rehearse=True))

    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_of_another_card_is_refused(tmp_path):
    _claim(tmp_path / "settings.json", {"card": "NVIDIA H100 80GB HBM3", "rehearse": False})

    _claim(tmp_path / "settings.json", {"card": "NVIDIA H100 80GB HBM3", "rehearse": False})
    with pytest.raises(ValueError, match="card was 'NVIDIA H100 80GB HBM3', now 'NVIDIA H200'"):
        _claim(tmp_path / "settings.json", {"card": "NVIDIA H200", "rehearse": False})
