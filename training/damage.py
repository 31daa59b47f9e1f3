"""Whether the files of a checkpoint are what was written: a power cut, a full or a bad disk may have spoilt them."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from shards.atomic import sha256_file

MODEL, STATE = "model.safetensors", "state.pt"
DIGESTS = "digests.json"
"""SHA-256 of MODEL and STATE."""


def damage(folder: Path, needed: Sequence[str] = (MODEL, STATE)) -> str:
    """What is wrong with the `needed` files of a checkpoint; empty where they are what was written.

    Checkpoints of earlier releases have no digests. In them a file that was cut short is seen, and a flipped bit in
    state.pt, whose format has checksums.
    """
    for name in needed:
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not (folder / DIGESTS).is_file():
        return next((found for name in needed if (found := _format_damage(folder / name))), "")
    try:
        told = json.loads((folder / DIGESTS).read_bytes())
        wrong = [name for name in needed if sha256_file(folder / name) != told[name]]
    except (ValueError, KeyError, TypeError):
        return f"{DIGESTS} does not say what was written"
    return f"{wrong[0]} is not what was written: its SHA-256 differs" if wrong else ""


def _format_damage(path: Path) -> str:
    try:
        if path.name == MODEL:
            with safe_open(path, framework="pt"):
                return ""
        with zipfile.ZipFile(path) as parts:
            first = parts.testzip()
            return f"{path.name} is damaged in {first}" if first else ""
    except (SafetensorError, zipfile.BadZipFile) as error:
        return f"{path.name}: {error}"
