"""Benchmarks of a second: what their rows hold, and that neither a neighbour nor a drift gets into them."""

import json
import os
from pathlib import Path

import pytest
from conftest import photographs, small_parts

from benchmarks.learn import bench_learn
from benchmarks.loader import bench_loader
from benchmarks.masking import bench_masking
from benchmarks.prepared import prepare
from benchmarks.quiet import foreign_cores
from benchmarks.rounds import ENOUGH, Block, Case, Row, interleaved, ratios, summary, verdict
from pipeline.bench import bench
from pipeline.config import BenchConfig
from pretrain.masking.strategies import STRATEGIES
from training.config import RunConfig

FIELDS = {"name", "value", "unit", "n", "low", "high"}


@pytest.mark.filterwarnings(r"ignore:unclosed file .*\.tar:ResourceWarning")  # webdataset leaves its tars open
def test_bench_loader_tells_every_row_and_reuses_what_it_made(tmp_path):
    photos = photographs(tmp_path / "photos", 8)

    report = bench_loader(str(photos), out=tmp_path / "out", minutes=0.001, most=6, block_s=0.02)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    prepare(str(photos), tmp_path / "out", most=6)

    names = {row.name for row in report.rows}
    one_core = {"stream", "imagefolder_mae", "webdataset", "decode_limit", "order_1_28m", "seek_1_28m"}
    one_core |= {"local_626", "cached_626", "cached_626/local_626"}
    assert names >= one_core | {"stream/decode_limit", "stream/webdataset", "stream/imagefolder_mae"}
    assert names >= set(report.bars) or os.cpu_count() == 1
    assert all(row.value > 0 and row.low <= row.value <= row.high for row in report.rows)
    exact = {row.name: row for row in report.rows if row.unit == "bytes"}
    assert exact["label_bytes_per_image"].value == 4096
    assert exact["label_bytes_per_image"].n == 6
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_bench_extract_writes_its_rows_and_where_they_are_from(tmp_path):
    photos, parts = photographs(tmp_path / "photos", 8), small_parts(tmp_path / "parts")

    bench(
        BenchConfig(
            name="extract",
            images=str(photos),
            parts=parts,
            out=tmp_path / "out",
            json=tmp_path / "rows.json",
            minutes=0.001,
            build=4,
            device="cpu",
        )
    )

    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["images_per_second", "seconds_in_models", "share_outside_models"]
    assert all(set(row) - {"noisy"} == FIELDS for row in rows.values())
    assert 0 < rows["share_outside_models"]["value"] < 1
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["versions"]["webdataset"]
    assert not list((tmp_path / "out").glob("extract.*"))


def test_bench_learn_counts_the_forwards_that_a_step_takes(tmp_path):
    photos = photographs(tmp_path / "photos", 4)

    report = bench_learn(
        str(photos), minutes=0.001, run=RunConfig(out=tmp_path, device="cpu", precision="fp32"), grid=7
    )

    rows = {row.name: row.value for row in report.rows}
    assert set(report.bars) == {"encoder_forward/step_fresh", "encoder_forward/step_cached"}
    assert set(report.bars) < set(rows)
    assert all(value > 0 for value in rows.values())


def test_bench_masking_has_a_row_and_a_bar_for_every_strategy():
    report = bench_masking(minutes=0.001, block_s=0.01)

    assert [row.name for row in report.rows] == list(report.bars) == [*STRATEGIES, "hpm", "automae"]
    assert {row.unit for row in report.rows} == {"us/image"}
    assert all(0 < row.low <= row.value <= row.high < 10_000 for row in report.rows)


def test_bench_step_tells_what_a_scorer_in_every_step_costs(tmp_path, capsys):
    to = tmp_path / "rows.json"

    bench(BenchConfig(name="step", out=tmp_path, json=to, minutes=0.001, device="cpu", rehearse=True))

    rows = {row["name"]: row for row in json.loads(to.read_text())}
    assert list(rows) == ["ours", "automae", "automae_with_scorer", "automae/ours", "automae_with_scorer/automae"]
    assert all(set(row) - {"noisy"} == FIELDS and row["value"] > 0 for row in rows.values())
    assert not (tmp_path / "creatures").exists()
    told = capsys.readouterr()
    assert "A toy" in told.out
    assert "GFLOP" not in told.out + told.err, "operations of ViT-B/16, not of a toy"


def test_blocks_beside_a_neighbour_are_dropped():
    alone = Block(5000.0, foreign_cores(machine_s=0.72, ours_s=0.70, wall_s=0.7))
    beside = Block(2500.0, foreign_cores(machine_s=1.30, ours_s=0.65, wall_s=0.7))

    row = summary("stream", "images/s", [alone] * ENOUGH + [beside] * 50)

    assert (row.value, row.low, row.high, row.n, row.noisy) == (5000.0, 5000.0, 5000.0, ENOUGH, False)


def test_too_few_quiet_blocks_give_figures_but_no_verdict():
    bars = {"stream/webdataset": (">=", 2.0)}

    few = summary("stream/webdataset", "ratio", [Block(2.5, 0.0)] * (ENOUGH - 1) + [Block(1.0, 0.9)])
    none = summary("stream/webdataset", "ratio", [Block(2.5, 0.9)] * 30)

    assert (few.value, few.n, verdict(few, bars)) == (2.5, ENOUGH - 1, "noisy")
    assert (none.value, none.n, verdict(none, bars)) == (2.5, 0, "noisy")
    assert few.as_json()["noisy"]


@pytest.mark.parametrize(("value", "said"), [(2.0, "holds"), (1.9, "fails")])
def test_a_quiet_row_is_held_against_its_bar(value, said):
    row = Row(name="stream/webdataset", value=value, unit="ratio", n=ENOUGH, low=value, high=value)

    assert verdict(row, {"stream/webdataset": (">=", 2.0)}) == said
    assert set(row.as_json()) == FIELDS


def test_a_drift_that_both_rows_share_cancels():
    speeds = [1.0, 0.2, 0.7, 3.0, 0.4] * 4
    over = [Block(600.0 * speed, 0.0) for speed in speeds]
    under = [Block(200.0 * speed, 0.0) for speed in speeds]

    row = summary("over/under", "ratio", ratios(over, under))

    assert (row.low, row.value, row.high) == pytest.approx((3.0, 3.0, 3.0))


def test_a_ratio_is_quiet_where_both_of_its_blocks_are():
    over = [Block(2.0, 0.0), Block(2.0, 0.5), Block(2.0, 0.0)]
    under = [Block(1.0, 0.0), Block(1.0, 0.0), Block(1.0, 0.5)]

    assert [block.quiet for block in ratios(over, under)] == [True, False, False]


def test_every_round_holds_every_case_once_and_the_first_is_thrown_away():
    ran = []

    def case(name: str) -> Case:
        return Case(name, lambda seconds: ran.append(name) or 1)

    blocks = interleaved(list(map(case, "abc")), pairs=[("a", "b")], minutes=1e-9, what="test", block_s=0.0)

    assert [sorted(ran[:3]), sorted(ran[3:])] == [list("abc"), list("abc")]
    assert {name: len(told) for name, told in blocks.items()} == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("gpu", {"threads": 8}, "bench gpu takes no --threads"),
        ("gpu", {"images": "photos"}, "bench gpu takes no --images"),
        ("gpu", {"parts": Path("parts")}, "--parts belongs to bench extract"),
        ("loader", {"rehearse": True}, "belongs to bench gpu and bench step, not to bench loader"),
    ],
)
def test_a_flag_of_another_benchmark_is_refused(name, given, said):
    with pytest.raises(ValueError, match=said):
        BenchConfig(name=name, **given)
