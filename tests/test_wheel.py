"""The built wheel is whole: installed alone, away from the checkout, it labels images with the parts it brings."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import photographs

from shards.shard_set import ShardSet

ROOT = Path(__file__).parents[1]
UV = [path] if (path := shutil.which("uv")) else []
RUN = """
import sys
sys.path += sys.argv.pop(1).split(":")
import pipeline, encoders.load
print(pipeline.__file__, encoders.load.BUILTIN, sep="\\n", flush=True)
from pipeline.cli import main
sys.exit(main())
"""
"""Python starts without site-packages (-S), because an editable install would put the checkout on the path."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by uv without the internet; hatchling is in uv's cache since `make venv` installed the project."""
    out = tmp_path_factory.mktemp("wheel")
    if not UV:
        pytest.skip("needs uv, to build the wheel")
    command = [*UV, "build", "--wheel", "--offline", "--python", sys.executable, "--out-dir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "hatchling was not found in the cache" in built.stderr:
        pytest.skip("needs hatchling in uv's cache, to build the wheel without the internet")
    assert built.returncode == 0, built.stderr
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_packages_and_none_beside_them(wheel):
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if git.returncode:
        pytest.skip("needs a git checkout, to list its files")
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}

    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    expected = {name for name in git.stdout.splitlines() if name.split("/")[0] in rooms and (ROOT / name).is_file()}
    assert len(rooms) == 8
    assert expected - held == set()
    assert {name.split("/")[0] for name in held} == rooms


def test_the_wheel_alone_labels_images_with_the_parts_that_come_with_it(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [*UV, "pip", "install", "--offline", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run([*install, "--python", sys.executable], check=True, capture_output=True)
    photographs(elsewhere / "photos", 4)
    packages = f"{installed}:{sysconfig.get_path('purelib')}:{sysconfig.get_path('platlib')}"
    flags = ["--parts", "builtin", "--out", "shards", "--backend", "local", "--device", "cpu"]

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, packages, "extract", "--images", "photos", *flags],
        cwd=elsewhere,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    imported, builtin, *said = done.stdout.splitlines()
    assert imported == str(installed / "pipeline/__init__.py")
    assert builtin == str(installed / "encoders/builtin")
    assert said[-1] == "shards: 4 images in 1 shard; 0 rejected; left out: nothing; no classes"
    shards = ShardSet.open(elsewhere / "shards")
    assert (len(shards), shards.grid, shards.groups) == (4, 28, 7)
    shards.close()


def test_the_wheel_has_the_version_and_the_command_of_the_project(wheel):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with zipfile.ZipFile(wheel) as archive:
        (told,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))

        assert wheel.name.startswith(f"semmae-{version}-py3-none-any")
        assert "semmae = pipeline.cli:main" in archive.read(told).decode()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
