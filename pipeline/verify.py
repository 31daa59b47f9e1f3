"""The verb `verify`: faults of a shard set, each with shard, key and offset; and their repair."""

import dataclasses
from pathlib import Path
from typing import Any

from filelock import Timeout

from partlearn.config import TRUTH, ExtractConfig
from partlearn.labelling.protocol import folder_of
from pipeline.config import VerifyConfig
from shards import verify as checks
from shards.atomic import read_json, write_json
from shards.errors import ShardError
from shards.info import changed_fields
from shards.places import lock_of, refuse_unwritable
from shards.record import restore
from shards.verify import Fault
from training.config import RunConfig


def verify(config: VerifyConfig) -> None:
    """Print every fault found at `config.level`; with `config.repair`, build the bad shards once more.

    Raises:
        ShardError: There is at least one fault (left), or the set is not finished.
    """
    if config.json:
        refuse_unwritable(config.json, flag="--json", folder=False)
    if config.repair and (config.data / "dataset.json").is_file():
        for name in _restored(config.data):
            print(f"{name} is as it was written again, from what the other files tell")
    faults = checks.verify(config.data, config.level)
    for fault in faults:
        print(f"{fault.shard}  {fault.key or '-'}  offset {fault.offset}  {fault.what}")
    if faults and config.repair:
        repair(config.data, faults)
        faults = checks.verify(config.data, config.level)
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.json, [dataclasses.asdict(fault) for fault in faults])
    if faults:
        raise ShardError(f"{config.data} has {len(faults)} faults at level {config.level}; repair it with --repair")
    print(f"{config.data}: no fault at level {config.level}")


def _restored(folder: Path) -> list[str]:
    try:
        with lock_of(folder):
            return restore(folder)
    except Timeout:
        raise ShardError(f"{folder} is being built by another process; wait for it, then repair") from None


def repair(folder: Path, faults: list[Fault]) -> None:
    """Build the shards that `faults` name once more, and merge the index again.

    Raises:
        ShardError: dataset.json has lost what no other file tells; or shards came out with other bytes: the set is
            whole again, but no longer the one that runs used.
        FileNotFoundError: The images, the encoder or the part learner are not where dataset.json says.
    """
    from pipeline.extract import extract

    before = read_json(folder / "dataset.json")
    lost = [name for name in changed_fields(before) if name != "fingerprint"]  # which extract computes again
    if lost:
        raise ShardError(
            f"{folder / 'dataset.json'} has lost its {' and '.join(lost)}, which no other file tells: run the extract "
            "command that made the set once more, which labels nothing that is whole, or bring the file from a copy"
        )
    config = recorded_config(before, folder)
    try:
        after = extract(config, faulty={fault.shard for fault in faults})
    finally:
        if not (folder / "dataset.json").is_file():  # it holds the only record of what to build
            write_json(folder / "dataset.json", before)
    other = [one["name"] for one, old in zip(after["shards"], before["shards"], strict=True) if one != old]
    if other:
        then, now = (one["producer"]["versions"] | one["producer"]["labels"] for one in (before, after))
        newer = [
            f"{name} {then.get(name)} then, {now.get(name)} now"
            for name in (*after["producer"]["versions"], "device", "precision")
            if then.get(name) != now.get(name)
        ]
        raise ShardError(
            f"{', '.join(other)} came out with other bytes than before ({'; '.join(newer) or 'same versions'}); the "
            "set is whole again but has a new fingerprint, so runs that were fed by the old one cannot be resumed"
        )


def recorded_config(info: dict[str, Any], folder: Path) -> ExtractConfig:
    """The extraction that made a set, to be run again in this process."""
    from training.device import devices_here

    told = dict(info["producer"]["config"])
    for name in ("parts", "relabel", "boxes"):
        if told.get(name) is not None:
            told[name] = Path(told[name])
    for name in ("encoder_mean", "encoder_std"):
        if told.get(name) is not None:
            told[name] = tuple(told[name])
    if folder_of(told["parts"]) or str(told["parts"]) in (TRUTH, "builtin"):
        told["num_parts"] = None  # older sets recorded the 6 that nobody had asked for
    labels = info["producer"]["labels"]
    device: Any = labels.get("device", "auto")
    device = device if device in devices_here() else "auto"  # enough where no label has to be computed
    run = RunConfig(out=folder, device=device, precision=labels.get("precision", "auto"))
    return ExtractConfig(**told | {"backend": "local"}, run=run)
