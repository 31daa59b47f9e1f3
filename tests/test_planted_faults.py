"""The list of planted faults stays true: each can still be planted, its tests are there, and no file is left out."""

from pathlib import Path

import faults

ROOT = Path(__file__).parents[1]
ROOMS = ("shards", "training", "encoders", "partlearn", "pretrain", "evaluate", "pipeline")
COMPUTES_NOTHING = (
    *("config", "errors", "__init__", "__main__", "protocol", "stored_labels", "task", "objective"),
    "pretrain/masking/learned",
    *("pipeline/bench", "pipeline/cli", "pipeline/help", "pipeline/cluster", "pipeline/creatures", "pipeline/demo"),
)
"""Settings, types and command lines; what draws examples and times; the cluster, whose faults are other machines'."""


def test_each_fault_can_be_planted_and_its_tests_are_there():
    stale = []
    for fault in faults.listed():
        try:
            changed = fault.planted(ROOT) != (ROOT / fault.file).read_text()
        except (OSError, ValueError) as error:
            stale.append(str(error))
            continue
        if not (changed and fault.tests and all((ROOT / test).is_file() for test in fault.tests)):
            stale.append(f"{fault.name}: changes nothing, or its tests {fault.tests} are not there")

    assert stale == []


def test_no_two_faults_have_one_name():
    names = [fault.name for fault in faults.listed()]

    assert [name for name in names if names.count(name) > 1] == []


def test_every_file_that_computes_has_a_fault():
    files = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    nothing = {one for one in files if Path(one).stem in COMPUTES_NOTHING or one.startswith(COMPUTES_NOTHING)}

    assert sorted(files - nothing - {fault.file for fault in faults.listed()}) == []
