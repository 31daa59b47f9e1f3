"""Checkpoints: a folder written aside and renamed, so a reader sees a whole one or none."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class CheckpointError(Exception):
    """A checkpoint that is missing, torn or of another model."""


class Clock:
    """Says when the next checkpoint is due; the one place of a loop that looks at the time."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self._last = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


def save(
    run: Path,
    step: int,
    tensors: dict[str, Tensor],
    *,
    metadata: dict[str, Any],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write `run/checkpoints/step-NNNNNNNN/` whole, then remove all but the newest `keep`.

    Args:
        tensors: The model, saved as model.safetensors without pickle.
        metadata: Everything needed to rebuild the model; each value becomes JSON in the file's header.
        state: What resuming needs besides the model (optimizer, step, generators), saved as state.pt.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    if final.is_dir():
        return final
    aside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_tensors(aside / "model.safetensors", tensors, metadata)
    torch.save(state | {"step": step}, aside / "state.pt")
    for file in aside.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    os.replace(aside, final)
    for old in _steps(run)[:-keep]:
        shutil.rmtree(old)
    return final


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Tensors as safetensors, with `metadata` as JSON values in the header; whole or not at all.

    The file's mode follows the umask (safetensors gives everything to its owner alone).
    """
    aside = path.with_name(f".{path.name}.partial")
    aside.touch()
    mode = aside.stat().st_mode
    header = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, aside, metadata=header)
    aside.chmod(mode)
    os.replace(aside, path)


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint folder of a run, or None."""
    steps = _steps(run)
    return steps[-1] if steps else None


def find(path: Path) -> Path:
    """The model.safetensors meant by `path`: that file, a checkpoint folder, or a run's newest checkpoint.

    Raises:
        FileNotFoundError: There is no such path.
        CheckpointError: The folder holds no whole checkpoint.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: expected a run folder or a model.safetensors file")
    for candidate in (path / "model.safetensors", (newest(path) or path) / "model.safetensors"):
        if candidate.is_file():
            return candidate
    if newest(path.parent):
        raise CheckpointError(f"{path} is a folder inside a run; pass the run, {path.parent}")
    raise CheckpointError(f"{path} holds no whole checkpoint yet; let its run go on until it has written one")


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: The file is torn or no safetensors file.
        OSError: It is not there, or may not be read.
    """
    open(path, "rb").close()  # safetensors says "No such file" of one that may not be read
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            header = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}); delete it and run again") from None
    return tensors, {name: _decoded(value) for name, value in header.items()}


def load_state(checkpoint: Path) -> dict[str, Any]:
    """state.pt of a checkpoint folder, loaded without running any code in it."""
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # headers of other people's files hold plain text
        return value


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-????????"))
