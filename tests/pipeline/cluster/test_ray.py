"""On Ray: a local head node that wants a token, extraction and pretraining as jobs, and the script of `ray submit`."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
import yaml
from conftest import photographs, tars

from pipeline.cluster.connect import refuse_paths_of_the_upload
from shards.verify import verify

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
RAY_JOB = [
    BIN / "ray",
    "job",
    "submit",
    "--working-dir",
    ".",
    "--runtime-env",
    "pipeline/cluster/runtime_env.yaml",
    "--",
]
SUBMIT = [sys.executable, "-m", "pipeline", "submit", "--"]
VERB = ["python", "-m", "pipeline"]


def call(*command: object, env: dict[str, str], cwd: Path = ROOT, timeout=280) -> subprocess.CompletedProcess:
    """A command without a terminal."""
    return subprocess.run(
        [*map(str, command)],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        start_new_session=True,
    )


def run(*command: object, env: dict[str, str], cwd: Path = ROOT) -> str:
    done = call(*command, env=env, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment, token included, of a client of a head node started here on loopback, in a session of its own."""
    # Ray puts sockets into its folder, and their paths must stay short: pytest's folders are too deep on some machines.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = free_port()
        env = without(dict(os.environ), "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH") | {
            "HOME": folder,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        options = f"--head --block --port 0 --dashboard-host 127.0.0.1 --dashboard-port {port} --num-cpus 2"
        command = [BIN / "ray", "start", *options.split(), "--disable-usage-stats"]
        with (Path(folder) / "head.log").open("w") as log:
            ray = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/api/version", ray, Path(folder) / "head.log")
            yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        finally:
            stop(ray)


def wait_for(url: str, ray: subprocess.Popen, log: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and ray.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the head node did not start:\n{log.read_text()[-3000:]}")


def stop(ray: subprocess.Popen) -> None:
    """End this head node at once, and no other Ray of this machine; its workers end with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(ray.pid, signal.SIGKILL)
    ray.wait()


@pytest.fixture(scope="module")
def extraction(learned, tmp_path_factory) -> tuple[list, dict[str, str]]:
    """A small extraction, all but its --out, and the files that it gives without Ray."""
    folder = tmp_path_factory.mktemp("extraction")
    small = "--size 32 --samples-per-shard 4 --batch-size 4 --device cpu --precision fp32 --threads 1"
    extract = ["extract", "--images", photographs(folder / "photos", 10), "--parts", learned, *small.split()]
    done = warm.python("-m", "pipeline", *extract, "--out", folder / "local", "--backend", "local").finished()
    assert done.returncode == 0, done.stderr
    return extract, tars(folder / "local")


def test_extraction_and_pretraining_as_ray_jobs(head, extraction, tmp_path):
    extract, expected = extraction
    model = "--patch 8 --embed-dim 32 --depth 1 --heads 2 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
    pretrain = f"--epochs 2 --warmup-epochs 0 --batch-size 4 --backend ray --num-workers 2 --device cpu {model}"
    token = tmp_path / "token"
    token.write_text(head["RAY_AUTH_TOKEN"])
    token_file = without(head, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN") | {"RAY_AUTH_TOKEN_PATH": str(token)}

    run(*RAY_JOB, *VERB, *extract, "--out", tmp_path / "ray", env=head)
    to = ["--data", tmp_path / "ray", "--out", tmp_path / "semmae"]
    log = run(*SUBMIT, "pretrain", *to, *pretrain.split(), env=token_file)

    assert verify(tmp_path / "ray", "deep") == []
    assert tars(tmp_path / "ray") == expected
    assert (tmp_path / "semmae/DONE.json").is_file()
    assert "python -m pipeline pretrain" in log


def test_ray_submit_with_the_shipped_cluster_yaml(head, extraction, tmp_path):
    """Ray's launcher, with its ssh and rsync to a folder that plays the head's home; the token is the mounted file."""
    extract, expected = extraction
    cluster = yaml.safe_load((ROOT / "pipeline/cluster/cluster.yaml").read_text())
    cluster |= {"provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}, "max_workers": 0}
    cluster["setup_commands"].remove("make -C ~/semmae venv")
    cluster["setup_commands"].append(f"ln -sfn {BIN.parent} ~/semmae/.venv")
    cluster["head_start_ray_commands"] = []
    del cluster["available_node_types"], cluster["head_node_type"]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    laptop, node = tmp_path / "laptop", tmp_path / "node"
    for path, text in {
        laptop / ".ray" / "auth_token": head["RAY_AUTH_TOKEN"],
        laptop / "bin" / "ssh": SSH.format(home=node),
        laptop / "bin" / "rsync": RSYNC.format(home=node),
        node / ".bashrc": "",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o700)
    env = without(head, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS")
    env |= {"HOME": str(laptop), "PATH": f"{laptop / 'bin'}:{head['PATH']}"}

    run(BIN / "ray", "up", "--yes", "--no-config-cache", tmp_path / "cluster.yaml", env=env)
    submit = ["submit", "--no-config-cache", tmp_path / "cluster.yaml", "pipeline/cluster/on_cluster.py", "--"]
    run(BIN / "ray", *submit, *extract, "--out", tmp_path / "shards", env=env)

    assert (node / "semmae" / "pipeline" / "cli.py").is_file()
    assert tars(tmp_path / "shards") == expected


SSH = """#!/bin/bash
export HOME={home}
while [[ $1 == -* ]]; do if [[ $1 == -o ]]; then shift 2; else shift; fi; done
shift  # user@host
cd && exec bash -c "$*"
"""
RSYNC = """#!/bin/bash
export HOME={home}
source=${{@: -2:1}} target=${{@: -1}}
target=${{target#*:}} target=${{target/#[~]/$HOME}}
if [[ -d $source ]]; then mkdir -p "$target" && cp -r "$source". "$target"; else cp "$source" "$target"; fi
"""


def test_submit_ends_as_its_job_ends(head, tmp_path):
    done = call(*SUBMIT, "verify", "--data", tmp_path / "nothing", env=head, timeout=60)

    assert done.returncode == 1
    assert "no shard set at" in done.stdout
    assert "ended as FAILED" in done.stderr


@pytest.mark.parametrize("token", [None, "0" * 32], ids=["no token", "a wrong token"])
@pytest.mark.parametrize("command", [[*RAY_JOB, *VERB], SUBMIT], ids=["ray job submit", "semmae submit"])
def test_a_cluster_with_tokens_refuses(head, command, token):
    env = without(head, "RAY_AUTH_TOKEN") | ({"RAY_AUTH_TOKEN": token} if token else {})

    done = call(*command, "verify", "--help", env=env, timeout=60)

    assert done.returncode == 1
    assert "token" in done.stderr
    assert "usage: semmae verify" not in done.stdout


def test_workers_of_a_running_cluster_import_what_the_script_found(head, tmp_path):
    """The packages that SEMMAE_HOME names come before any that are installed, in the driver and in its workers."""
    package = tmp_path / "home" / "pipeline"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import ray\n"
        "def where(): return __file__\n"
        "def main():\n"
        "    ray.init('auto', log_to_driver=False)\n"
        "    print(ray.get(ray.remote(where).remote()))\n"
        "    return 0\n"
    )
    script = tmp_path / "on_cluster.py"
    script.write_text((ROOT / "pipeline/cluster/on_cluster.py").read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    told = run("python", script, env=head | {"SEMMAE_HOME": str(tmp_path / "home")}, cwd=elsewhere)

    assert told.strip() == str(package / "cli.py")


def test_a_relative_path_in_an_uploaded_folder_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)

    with pytest.raises(ValueError, match="give an absolute path"):
        refuse_paths_of_the_upload(Path("runs/shards"))
