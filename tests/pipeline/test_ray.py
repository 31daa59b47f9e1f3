"""On Ray: a local head node with the Jobs API, extraction as a submitted job, and pretraining on two workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import photographs, small_parts, tars

from pipeline.cluster import refuse_paths_of_the_upload
from shards.verify import verify

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PORT, DASHBOARD = 26379, 28265


def run(*command: object, env: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> dict[str, str]:
    """The environment of a client of a head node started here on loopback."""
    env = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": f"http://127.0.0.1:{DASHBOARD}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    start = f"--head --port {PORT} --dashboard-host 127.0.0.1 --dashboard-port {DASHBOARD} --num-cpus 2"
    without = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    run(BIN / "ray", "start", *start.split(), "--disable-usage-stats", env=without)
    yield env
    run(BIN / "ray", "stop", "--force", env=without)


def test_extraction_and_pretraining_as_ray_jobs(head, tmp_path):
    photos, parts = photographs(tmp_path / "photos", 10), small_parts(tmp_path / "parts")
    options = [
        "--size",
        "32",
        "--samples-per-shard",
        "4",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--threads",
        "1",
    ]
    extract = ["extract", "--images", photos, "--parts", parts, *options]
    submit = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "pipeline"]
    model = "--patch 8 --embed-dim 32 --depth 1 --heads 2 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
    pretrain = f"--epochs 2 --warmup-epochs 0 --batch-size 4 --backend ray --num-workers 2 --device cpu {model}".split()

    run(*submit, *extract, "--out", tmp_path / "ray", env=head)
    run(sys.executable, "-m", "pipeline", *extract, "--out", tmp_path / "local", "--backend", "local", env=head)
    run(*submit, "pretrain", "--data", tmp_path / "ray", "--out", tmp_path / "semmae", *pretrain, env=head)

    assert verify(tmp_path / "ray", "deep") == []
    assert tars(tmp_path / "ray") == tars(tmp_path / "local")
    assert (tmp_path / "semmae/DONE.json").is_file()


def test_a_relative_path_in_an_uploaded_folder_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)

    with pytest.raises(ValueError, match="give an absolute path"):
        refuse_paths_of_the_upload(Path("runs/shards"))
