"""What is stored of a batch of images."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8, UInt16


@dataclass(frozen=True, slots=True)
class Labels:
    """What is stored of a batch of images."""

    parts: UInt8[np.ndarray, "batch rows cols"]
    fgrank: UInt16[np.ndarray, "batch rows cols"]
    """0 = most likely foreground."""
    attn: UInt8[np.ndarray, "batch heads rows cols"] | None
    """Class attention of each head, scaled so that its most attended cell is 255; where it was asked for."""
    attn_peak: Float32[np.ndarray, "batch heads"] | None
    """What 255 stands for in each head: its greatest attention to a cell."""
    confidence: UInt8[np.ndarray, " batch"]
    """That there is an object, in hundredths; see `foreground.confidence`. Of shuffled labels, in the image that they
    are of."""
