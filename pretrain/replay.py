"""A step whose gradient was not finite, computed again from what the run wrote aside.

python -m pretrain.replay RUN/nonfinite/step-NNNNNNNN
"""

import dataclasses
from pathlib import Path

from pretrain.config import config_of
from pretrain.train import Pretraining, opened_shards
from training.by_itself import by_itself
from training.nonfinite import again


def replay(folder: Path) -> tuple[float, float]:
    """Loss of the whole batch and norm of its gradient (nan where it is not finite), on this process alone.

    Args:
        folder: What the run wrote aside, in the run's folder.

    Raises:
        OSError, ValueError: The folder is not inside the folder of a pretraining.
        CheckpointError, ShardError: What was written aside, or the shard set, is damaged or gone.
    """
    config = config_of(folder.absolute().parents[1])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, knn=None))
    with opened_shards(config) as shards:
        return again(Pretraining(config, shards), folder)


def _show(folder: Path) -> None:
    loss, norm = replay(folder)
    print(f"loss {loss:.6g}  grad_norm {norm:.6g}")


if __name__ == "__main__":
    by_itself(_show, __doc__)
