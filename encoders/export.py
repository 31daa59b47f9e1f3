"""One file of half the bytes out of a run of `encoder`, to be given away: fp16 weights and what builds their ViT.

python -m encoders.export runs/encoder encoder.safetensors
"""

import sys
from pathlib import Path

from training.checkpoint import find, load_tensors, write_tensors


def export(run: Path, file: Path) -> None:
    """Write the run's newest encoder to `file`, which `run:FILE` loads.

    Raises:
        FileNotFoundError, CheckpointError: There is no run, or no whole checkpoint in it.
    """
    tensors, metadata = load_tensors(find(run))
    write_tensors(file, {name: tensor.half() for name, tensor in tensors.items()}, metadata)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    export(Path(sys.argv[1]), Path(sys.argv[2]))
