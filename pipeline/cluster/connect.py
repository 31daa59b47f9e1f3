"""Ray, as little of it as the verbs need: joining a cluster, and one training function on many workers."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine; without one, start Ray right here.

    A Ray started here reports nothing to its makers, unless RAY_USAGE_STATS_ENABLED=1 asks for it.

    Raises:
        ValueError: This user has no home folder, as in some containers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ["RAY_USAGE_STATS_ENABLED"] == "0":
        os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        _refuse_without_home()
        of_tokens = logging.getLogger("ray._private.authentication.authentication_token_setup")
        of_tokens.addFilter(_warns)
        ray.init(log_to_driver=False, configure_logging=False)


def _refuse_without_home() -> None:
    try:
        Path.home()
    except RuntimeError:
        raise ValueError(
            f"Ray keeps its token in the home folder, and user {os.getuid()} has none; set HOME to a folder that can "
            "be written, or choose --backend local"
        ) from None


def _warns(record: logging.LogRecord) -> bool:
    """That tokens protect a Ray is no warning; that none do is."""
    return "is enabled for this Ray cluster" not in record.getMessage()


def refuse_paths_of_the_upload(*paths: Path) -> None:
    """Under `ray job submit --working-dir`, a relative path is in a temporary copy that Ray deletes.

    Raises:
        ValueError: A path is relative, and this process runs in such a copy.
    """
    if "working_dir_files" not in Path.cwd().parts:
        return
    for path in paths:
        if not Path(path).is_absolute():
            raise ValueError(
                f"{path} is relative, and this Ray job runs in a temporary copy of your folder; "
                "give an absolute path on storage that all nodes see"
            )


def has_gpus() -> bool:
    """Whether the cluster has any GPU; joins it first."""
    import ray

    connect()
    return bool(ray.cluster_resources().get("GPU"))


def train_on_ray(function: Callable[[Any], Any], config: Any, *, num_workers: int) -> None:
    """Run `function(config)` on `num_workers` Ray Train workers, one GPU each where the cluster has them.

    The workers find a joined process group, exactly as under torchrun.
    """
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    def worker(loop_config: dict[str, Any]) -> None:
        function(loop_config["config"])

    refuse_paths_of_the_upload(config.run.out)
    scaling: Any = ScalingConfig(num_workers=num_workers, use_gpu=has_gpus())
    TorchTrainer(worker, train_loop_config={"config": config}, scaling_config=scaling).fit()
