"""Checkpoints: a folder written aside and renamed, so a reader sees a whole one or none; what a power cut or a bad disk
makes of it later is seen by digests."""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shards.atomic import json_bytes, sha256_file, sync_folder
from training import distributed
from training.damage import DIGESTS, MODEL, STATE, damage

STAYS = "stays"
"""An empty file of this name keeps a checkpoint from being removed."""


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
    stays: bool = False,
) -> Path:
    """Write `run/checkpoints/step-NNNNNNNN/`, then remove all earlier ones but the newest `keep` and those that stay.

    A whole one of this step is left as it is, a torn one is written again; what killed writers left aside goes.

    Args:
        stays: This one is never removed.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    for killed in final.parent.glob(".step-*.partial"):
        shutil.rmtree(killed)
    if not final.is_dir() or damage(final):
        write(final, step, tensors, metadata=metadata, state=state, beside={STAYS: b""} if stays else {})
    older = [one for one in _steps(run) if one <= final]
    for old in older[:-keep]:
        if not (old / STAYS).is_file():
            shutil.rmtree(old)
    return final


def write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    *,
    metadata: dict[str, Any],
    state: dict[str, Any],
    beside: Mapping[str, bytes],
) -> None:
    """A checkpoint in `folder`, whole or not at all.

    Args:
        tensors: The model, saved as model.safetensors without pickle.
        metadata: Everything needed to rebuild the model; each value becomes JSON in the file's header.
        state: What resuming needs besides the model (optimizer, step, generators), saved as state.pt.
        beside: Further files, by name.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_tensors(aside / MODEL, tensors, metadata)
    torch.save(state | {"step": step}, aside / STATE)
    digests = {name: sha256_file(aside / name) for name in (MODEL, STATE)}
    for name, content in {DIGESTS: json_bytes(digests), **beside}.items():
        (aside / name).write_bytes(content)
    for file in aside.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    sync_folder(aside)
    if folder.is_dir():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    sync_folder(folder.parent)


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


def newest(run: Path, needed: Sequence[str] = (MODEL, STATE)) -> Path | None:
    """The newest checkpoint folder of a run whose `needed` files are whole, or None where there is no checkpoint.

    Newer ones that are torn are told on stderr.

    Raises:
        CheckpointError: There are checkpoints, and each is torn.
    """
    torn = []
    for folder in reversed(_steps(run)):
        if not (found := damage(folder, needed)):
            if torn and distributed.is_main():
                print(f"{'; '.join(torn)}: {folder.name}, the one before, is used", file=sys.stderr)
            return folder
        torn.append(f"{folder} is torn ({found})")
    if torn:
        raise CheckpointError(f"{'; '.join(torn)}; no checkpoint of {run} is whole: begin it again, in another folder")
    return None


def find(path: Path) -> Path:
    """The model.safetensors meant by `path`: that file, a checkpoint folder, or a run's newest whole checkpoint.

    Raises:
        FileNotFoundError: There is no such path.
        CheckpointError: The folder holds no whole checkpoint, or the one that was named is torn.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: expected a run folder or a model.safetensors file")
    file = path / MODEL if path.is_dir() else path
    if file.is_file():
        if file.name == MODEL and (found := damage(file.parent, (MODEL,))):
            raise CheckpointError(f"{file.parent} is torn ({found}); take another checkpoint of its run")
        return file
    if folder := newest(path, (MODEL,)):
        return folder / MODEL
    if _steps(path.parent):
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
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # headers of other people's files hold plain text
        return value


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-????????"))
