"""The verb `verify`: faults of a shard set, each with shard, key and offset."""

import dataclasses

from pipeline.config import VerifyConfig
from shards import verify as checks
from shards.atomic import write_json
from shards.errors import ShardError


def verify(config: VerifyConfig) -> None:
    """Print every fault found at `config.level`.

    Raises:
        ShardError: There is at least one fault, or the set is not finished.
    """
    faults = checks.verify(config.data, config.level)
    if config.json:
        write_json(config.json, [dataclasses.asdict(fault) for fault in faults])
    for fault in faults:
        print(f"{fault.shard}  {fault.key or '-'}  offset {fault.offset}  {fault.what}")
    if faults:
        raise ShardError(f"{config.data} has {len(faults)} faults at level {config.level}")
    print(f"{config.data}: no fault at level {config.level}")
