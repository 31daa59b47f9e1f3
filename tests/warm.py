"""A Python that has imported torch already: processes of their own, without the seconds that each of them waits.

They are forked from a server that has imported other people's packages and none of ours, so what ours imports, and
how, is tried in every one of them. They can be killed, stopped and refused like any other process. What a test does
not show with them: that a new Python finds its packages, and what the launcher of the ranks does.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

import pytest
import torch

IMPORTED = [
    *("pytest", "torch", "torch.distributed", "timm", "timm.optim", "webdataset", "pyarrow.parquet"),
    *("scipy.ndimage", "scipy.optimize", "tensorboard", "torch.utils.tensorboard", "tyro", "rich.table", "simplejpeg"),
]


@dataclass(frozen=True, slots=True)
class Running:
    """A process, in the words of `subprocess`."""

    arguments: tuple[str, ...]
    process: Any

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 200) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutExpired(self.arguments, timeout)
        return self.process.exitcode

    def finished(self, timeout: float = 200) -> CompletedProcess[str]:
        status = self.wait(timeout)
        said, told = ((_outputs() / f"{self.process.pid}.{name}").read_text() for name in ("out", "err"))
        return CompletedProcess(self.arguments, status, said, told)


def python(
    *arguments: object,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    threads: int = 1,
    most_bytes: int | None = None,
) -> Running:
    """Start `python ARGUMENTS`, where they begin with -m MODULE, -c CODE or the path of a script.

    Args:
        env: All of its environment; default: ours.
        threads: Of torch.
        most_bytes: No file may become larger; as on a full disk, the write fails.
    """
    _server_runs()
    texts = tuple(map(str, arguments))
    told = (texts, cwd or Path.cwd(), os.environ.copy() if env is None else env, threads, most_bytes, _outputs())
    process: Any = multiprocessing.get_context("forkserver").Process(target=_be_python, args=told)
    process.start()
    return Running(texts, process)


def ranks(count: int, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> list[Running]:
    """The same, as many times as torchrun would, with its environment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    whole = os.environ.copy() if env is None else env
    return [
        python(*arguments, cwd=cwd, env=whole | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


@cache
def _outputs() -> Path:
    """Where what they print is kept until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _server_runs() -> None:
    """Start the server, with one thread: a fork has only the one that forked."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        forkserver.ensure_running()


def _be_python(
    arguments: tuple[str, ...], cwd: Path, env: dict[str, str], threads: int, most_bytes: int | None, outputs: Path
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(outputs / f"{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to interruptions
    first, *rest = arguments
    sys.argv = [first, *rest] if first not in ("-m", "-c") else [first, *rest[1:]]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(rest[0], {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")
