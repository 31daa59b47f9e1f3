"""The house: every list that names the rooms names all of them, in the one order of who may import whom."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import SLOW

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def checked_shapes() -> list[str]:
    options = SETTINGS["tool"]["pytest"]["ini_options"]["addopts"].split()
    named = next(option for option in options if option.startswith("--jaxtyping-packages="))
    return [package for package in named.partition("=")[2].split(",") if "." not in package]


def layers() -> list[str]:
    order, knows_ray = SETTINGS["tool"]["importlinter"]["contracts"]
    below = [room for layer in order["layers"] for room in layer.split(" | ")]
    assert sorted(knows_ray["source_modules"]) == sorted(set(below) - {"pipeline"})
    return below


@pytest.mark.parametrize(
    "named",
    [
        checked_shapes(),
        layers(),
        SETTINGS["tool"]["importlinter"]["root_packages"],
        SETTINGS["tool"]["pyrefly"]["project-includes"],
        SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
        SETTINGS["tool"]["ruff"]["lint"]["isort"]["known-first-party"],
        list(yaml.safe_load((ROOT / "pipeline/cluster/cluster.yaml").read_text())["file_mounts"].values()),
    ],
    ids=["jaxtyping", "layers", "import-linter", "pyrefly", "wheel", "ruff", "cluster.yaml"],
)
def test_no_room_is_missing(named):
    assert len(ROOMS) == 8
    assert [room for room in ROOMS if room not in named] == []


def test_the_slow_files_are_those_that_exist_and_all_that_start_processes():
    tests = Path(__file__).parent
    slow = {tests / folder / f"{name}.py" for folder, names in SLOW.items() for name in names}
    starts = {
        path for path in tests.rglob("test_*.py") if re.search("^import (subprocess|warm)$", path.read_text(), re.M)
    }

    assert [path for path in slow if not path.is_file()] == []
    assert [path for path in starts - slow if "@pytest.mark.slow" not in path.read_text()] == []
