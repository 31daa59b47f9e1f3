"""The verb `verify`: faults of a shard set, each with shard, key and offset; and their repair."""

import dataclasses
from pathlib import Path
from typing import Any

from partlearn.config import ExtractConfig
from pipeline.config import VerifyConfig
from shards import verify as checks
from shards.atomic import read_json, write_json
from shards.errors import ShardError
from shards.verify import Fault
from shards.writer import shard_paths
from training.config import RunConfig
from training.run import package_versions


def verify(config: VerifyConfig) -> None:
    """Print every fault found at `config.level`; with `config.repair`, build the bad shards once more.

    Raises:
        ShardError: There is at least one fault (left), or the set is not finished.
    """
    faults = checks.verify(config.data, config.level)
    for fault in faults:
        print(f"{fault.shard}  {fault.key or '-'}  offset {fault.offset}  {fault.what}")
    if faults and config.repair:
        repair(config.data, faults)
        faults = checks.verify(config.data, config.level)
    if config.json:
        write_json(config.json, [dataclasses.asdict(fault) for fault in faults])
    if faults:
        raise ShardError(f"{config.data} has {len(faults)} faults at level {config.level}; mend it with --repair")
    print(f"{config.data}: no fault at level {config.level}")


def repair(folder: Path, faults: list[Fault]) -> None:
    """Build the shards that `faults` name once more, and merge the index again.

    Raises:
        ShardError: They came out with other bytes; the set is whole again, but no longer the one that runs used.
        FileNotFoundError: The pictures, the encoder or the part learner are not where dataset.json says.
    """
    from pipeline.extract import extract

    before = read_json(folder / "dataset.json")
    config = recorded_config(before, folder)
    for name in {fault.shard for fault in faults}:
        if Path(name).stem.isdigit():
            shard_paths(folder, int(Path(name).stem))[2].unlink(missing_ok=True)
        else:
            (folder / name).unlink(missing_ok=True)
    after = extract(config)
    other = [one["name"] for one, old in zip(after["shards"], before["shards"], strict=True) if one != old]
    if other:
        then = before["producer"]["versions"]
        newer = [
            f"{name} {then.get(name)} then, {now} now"
            for name, now in package_versions().items()
            if then.get(name) != now
        ]
        raise ShardError(
            f"{', '.join(other)} came out with other bytes than before ({'; '.join(newer) or 'same versions'}); the "
            "set is whole again but has a new fingerprint, so runs that were fed by the old one cannot be resumed"
        )


def recorded_config(info: dict[str, Any], folder: Path) -> ExtractConfig:
    """The extraction that made a set, to be run again in this process."""
    told = {name: value for name, value in info["producer"]["config"].items() if value is not None}
    for name in ("parts", "relabel"):
        if name in told:
            told[name] = Path(told[name])
    return ExtractConfig(**told | {"backend": "local"}, run=RunConfig(out=folder))
