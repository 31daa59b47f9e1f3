"""What goes into an upload, what is refused before it is sent, and the files that `ray submit` takes."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import photographs

from pipeline.cluster.upload import RAY_LEAVES_OUT, check_size, largest, packed

ROOT = Path(__file__).parents[3]
MIB = 2**20


def tree(root: Path, files: dict[str, str | int]) -> Path:
    """Files with a text, or of a size (sparse: they take no space)."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.truncate(content) if isinstance(content, int) else file.write(content)
    return root


def command(*arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


CHECKOUT = {
    ".gitignore": "runs/\n*.log\n!kept.log\n",
    ".rayignore": "movies\n",
    ".git/HEAD": "ref",
    "pipeline/__main__.py": "pass",
    "pipeline/big.log": "out",
    "pipeline/kept.log": "in",
    "pipeline/runs/1.txt": "out",
    "pipeline/.gitignore": "/local.py\n",
    "pipeline/local.py": "out",
    "pipeline/inner/local.py": "in",
    "movies/1.mp4": "out",
    "data/1.jpg": "out",
    "pretrain/data/1.txt": "in",
    "runs/1.txt": "out",
    "cache/.gitignore": "*\n",
    "cache/1.txt": "out",
    "name with space/é.txt": "in",
}


def test_the_walk_obeys_gitignore_rayignore_and_excludes(tmp_path):
    folder = tree(tmp_path, CHECKOUT)

    files = dict(packed(folder, [*RAY_LEAVES_OUT, "/data"]))

    assert {name for name in files if (folder / name).read_text() in ("in", "out")} == {
        "pipeline/kept.log",
        "pipeline/inner/local.py",
        "pretrain/data/1.txt",
        "name with space/é.txt",
    }


@pytest.mark.filterwarnings("ignore")
def test_the_walk_finds_exactly_the_files_that_ray_packs(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    folder, package = tree(tmp_path / "checkout", CHECKOUT), tmp_path / "package.zip"
    (tree(tmp_path / "linked", {"1.txt": "in"}) / "2.txt").write_text("in")
    (folder / "link").symlink_to(tmp_path / "linked")
    excludes = [*RAY_LEAVES_OUT, "/data"]
    files = dict(packed(folder, excludes))

    create_package(str(folder), package, include_gitignore=True, excludes=excludes)

    with zipfile.ZipFile(package) as archive:
        assert {info.filename: info.file_size for info in archive.infolist()} == files
    with pytest.raises(ValueError, match="Ray takes less than"):  # never lighter than the zip
        check_size(folder, files, limit_mib=package.stat().st_size / MIB)


def test_the_upload_of_this_checkout_is_its_code(tmp_path):
    excludes = yaml.safe_load((ROOT / "pipeline/cluster/runtime_env.yaml").read_text())["excludes"]

    files = dict(packed(ROOT, excludes))

    assert {"pipeline/cli.py", "pipeline/cluster/runtime_env.yaml", "pyproject.toml"} <= files.keys()
    assert not {name.split("/")[0] for name in files} & {".git", ".venv", "docs", "runs", "tests"}
    check_size(ROOT, files, limit_mib=20)


def test_the_largest_are_named_where_they_lie():
    files = {"data/a/1": 30, "data/b/1": 30, "partlearn/weights/vit.pth": 90, "partlearn/train.py": 1, "x": 5, "y": 1}

    assert largest(files) == [("partlearn/weights/vit.pth", 90), ("data/", 60), ("x", 5)]


def test_an_upload_over_the_limit_is_refused_before_anything_is_sent(tmp_path):
    sizes = {"photos/a/1.jpg": 40 * MIB, "photos/b/2.jpg": 40 * MIB, "weights/vit.pth": 30 * MIB, "notes.bin": 3 * MIB}
    folder = tree(tmp_path, {"pipeline/__main__.py": "pass", "small.txt": "x"} | sizes)

    done = command("-m", "pipeline", "submit", "--working-dir", folder, "--", "demo", cwd=ROOT, RAY_ADDRESS="nowhere:1")

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "would send 113 MiB in 6 files" in done.stderr
    assert "photos/ (80 MiB), weights/vit.pth (30 MiB), notes.bin (3 MiB)" in done.stderr
    assert ".rayignore" in done.stderr


def test_no_cluster_is_one_sentence():
    done = command("-m", "pipeline", "submit", "--address", "http://127.0.0.1:9", "--", "demo", cwd=ROOT)

    assert done.returncode == 1
    assert done.stderr.startswith("semmae: no Ray cluster answers")
    assert done.stderr.count("\n") == 1


def test_the_script_runs_by_its_path_from_any_folder(learned, tmp_path):
    """In the checkout, and as a copied file that SEMMAE_HOME tells where the packages are."""
    photos = photographs(tmp_path / "photos", 5)
    small = "--size 32 --batch-size 4 --device cpu --precision fp32 --threads 1 --backend local"
    extract = ["extract", "--images", photos, "--parts", learned, "--out", "shards", *small.split()]
    copied = shutil.copy(ROOT / "pipeline/cluster/on_cluster.py", tmp_path)

    built = command(copied, *extract, cwd=tmp_path, SEMMAE_HOME=str(ROOT))
    checked = command(
        ROOT / "pipeline/cluster/on_cluster.py", "verify", "--data", "shards", "--level", "deep", cwd=tmp_path
    )

    assert built.returncode == 0, built.stderr
    assert json.loads((tmp_path / "shards/dataset.json").read_text())["samples"] == 5
    assert checked.returncode == 0, checked.stderr
    assert "no fault at level deep" in checked.stdout


def test_the_script_finds_the_packages_where_cluster_yaml_puts_them(tmp_path):
    shutil.copy(ROOT / "pipeline/cluster/on_cluster.py", tmp_path)
    (tmp_path / "semmae").symlink_to(ROOT)

    done = command(tmp_path / "on_cluster.py", "verify", "--help", cwd=tmp_path, HOME=str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert "usage: semmae verify" in done.stdout


@pytest.mark.parametrize("home", [{}, {"SEMMAE_HOME": "/nowhere"}], ids=["no SEMMAE_HOME", "a wrong SEMMAE_HOME"])
def test_the_script_says_so_where_nothing_is_installed(tmp_path, home):
    shutil.copy(ROOT / "pipeline/cluster/on_cluster.py", tmp_path)

    # -S leaves out site-packages, and with them this environment's installed semmae
    done = command("-S", tmp_path / "on_cluster.py", "verify", cwd=tmp_path, HOME=str(tmp_path), PYTHONPATH="", **home)

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "set SEMMAE_HOME" in done.stderr


def test_the_script_names_what_the_python_of_the_node_lacks(tmp_path):
    done = command("-S", ROOT / "pipeline/cluster/on_cluster.py", "verify", cwd=tmp_path, PYTHONPATH="")

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs tyro" in done.stderr


def test_cluster_yaml_is_what_ray_up_takes():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(find_spec("ray").origin).parent / "autoscaler" / "ray-schema.json").read_text())

    config = yaml.safe_load((ROOT / "pipeline/cluster/cluster.yaml").read_text())

    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert sum(node.get("min_workers", 0) for node in config["available_node_types"].values()) <= config["max_workers"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    mounts = {local: remote for remote, local in config["file_mounts"].items() if not local.startswith("~")}
    assert packages <= mounts.keys()
    assert all((ROOT / local).exists() for local in mounts)
    assert all(remote == f"~/semmae/{local}" for local, remote in mounts.items())
