"""What decides the masks of a pretraining."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

BELONGS = {
    "mask_unit": ("random",),
    "noise_color": ("color-noise",),
    "hint_share": ("attmask-hint",),
    "gamma": ("semmae",),
    "curriculum": ("semmae",),
    "alpha": ("semmae",),
    "rounding": ("semmae",),
    "foreground_odds": ("foreground",),
    "foreground_share": ("foreground",),
    "hard_share": ("hpm",),
    "automae_select": ("automae",),
    "automae_attention_scale": ("automae",),
    "automae_gan_input": ("automae",),
    "automae_gan_scale": ("automae",),
}
"""The maskings that read a setting; beside any other it is refused, because it would change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingConfig:
    """Which patches take part, which of them are masked, and which of those are predicted."""

    masking: Literal[
        "semmae",
        "random",
        "block",
        "color-noise",
        "attmask-high",
        "attmask-low",
        "attmask-hint",
        "foreground",
        "hpm",
        "automae",
    ] = "semmae"
    """semmae: from a share of every part to whole parts as training proceeds. random: MAE's masks. block: BEiT's
    rectangles. color-noise: ColorMAE's filtered noise. attmask-high, -low, -hint: the patches that the stored attention
    is highest or lowest on, or the highest with a few shown (extract --attention). foreground: more of the foreground.
    hpm: patches whose loss a second decoder predicts to be high. automae: a generator over the stored attention, with a
    discriminator (extract --attention)."""
    mask_ratio: float = 0.75
    """Share of the kept patches that is masked."""
    keep_share: float = 1.0
    """Share of the patches that are used at all, chosen by foreground rank; the paper's patch 8 keeps 0.25."""
    predicted: int | None = None
    """Masked patches of an image that are predicted, at random; the others are neither seen nor rebuilt. Fewer cost
    less decoding: 49 of 147 is a known recipe (CrossMAE). Default: all."""
    mask_unit: int = 1
    """random: side, in patches, of the squares that are masked together; 2 with patch 16 is SimMIM's 32 px."""
    noise_color: Literal["green", "red", "blue", "purple"] = "green"
    """color-noise: red keeps low frequencies (large blobs), blue high ones, green a band between, purple all but it."""
    hint_share: float = 0.1
    """attmask-hint: share of the masked patches that is shown again, out of the tenth with the highest attention that
    it is measured on; other patches are masked in their place."""
    gamma: float = 2.0
    """semmae: alpha = progress ** gamma takes the masks from inside parts (0) to whole parts (1)."""
    curriculum: Literal["rising", "falling", "cosine", "released"] = "rising"
    """semmae: alpha rises from 0 to 1 (the paper), falls from 1 to 0 (the paper's control), rises along half a cosine,
    or is ((epoch + 1) / 800) ** gamma whatever --epochs says, as in the released code."""
    alpha: float | None = None
    """semmae: one alpha for the whole run, in place of a curriculum: 0 masks inside parts, 1 whole parts."""
    rounding: Literal["exact", "released"] = "exact"
    """semmae: exact masks what Algorithm 1 says, to the patch. released rounds as the authors' code does, whose counts
    miss the budget in every other image and are filled or cut at random."""
    foreground_odds: int = 4
    """foreground: how many times likelier a patch of the foreground is to be the next one masked."""
    foreground_share: float | None = None
    """foreground: share of the patches, by rank, that is the foreground. Default: what the labels do not call
    background; half of the patches where no label is background."""
    hard_share: float = 0.5
    """hpm: share of the masked patches that are the hardest ones at the end of the run; it grows from 0 with progress,
    and the others are random."""
    automae_select: Literal["visible", "masked"] = "visible"
    """automae: the generator selects as many patches as stay visible (the released code), which are then masked
    together with random ones; or as many as are masked, most of which are."""
    automae_attention_scale: float = 1.0
    """automae: factor on the attention that the generator reads. At 1, as released, values are near 1 / patches, so
    biases and borders outweigh them and every image gets nearly the same logits; the number of patches (196) corrects
    this."""
    automae_gan_input: Literal["gumbel", "softmax"] = "gumbel"
    """automae: its discriminator is shown what the generator says with Gumbel noise (the released code) or without.
    With it, single patches stand out as they never do in a rectangle, which tells the two apart."""
    automae_gan_scale: float = 1.0
    """automae: factor on what the discriminator sees. At 1, as released, values are near 1 / patches, too small for it
    to reach its target; the number of patches (196) corrects this."""

    def refuse_idle_settings(self) -> None:
        """Raises ValueError for a setting of another masking: it would change nothing."""
        for one in fields(MaskingConfig):
            owners = BELONGS.get(one.name)
            if owners and self.masking not in owners and getattr(self, one.name) != one.default:
                flag = "--" + one.name.replace("_", "-")
                raise ValueError(
                    f"{flag} belongs to --masking {' and '.join(owners)}, and would change nothing with --masking "
                    f"{self.masking}; leave it out"
                )
        if self.alpha is not None and (self.curriculum, self.gamma) != ("rising", 2.0):
            raise ValueError("--alpha is one value for the whole run; leave out --curriculum and --gamma")
        if self.curriculum == "cosine" and self.gamma != 2.0:
            raise ValueError(f"--curriculum cosine has no exponent, got --gamma {self.gamma}; leave one of the two out")


def refuse_masks_out_of_range(settings: Mapping[str, Any]) -> None:
    """Check each setting of the masks by itself: all of a config, or the few that a command line gave.

    Raises:
        ValueError: One is out of its range.
    """
    if not 0 < (ratio := settings.get("mask_ratio", 0.5)) < 1:
        raise ValueError(f"mask_ratio must lie between 0 and 1 (both excluded), got {ratio}")
    for name in ("keep_share", "foreground_share"):
        if (share := settings.get(name)) is not None and not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {share}")
    for name in ("alpha", "hint_share", "hard_share"):
        if (share := settings.get(name)) is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {share}")
    if not 0 < settings.get("gamma", 1) < float("inf"):
        raise ValueError(f"gamma must be above 0 and finite, got {settings['gamma']}")
    for name in ("automae_attention_scale", "automae_gan_scale"):
        if not 0 < settings.get(name, 1) < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {settings[name]}")
    for name in ("mask_unit", "foreground_odds", "predicted"):
        if (count := settings.get(name)) is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
