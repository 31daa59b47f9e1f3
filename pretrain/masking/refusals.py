"""What is refused before the first batch: masks that these shards cannot give, and settings that change nothing."""

from pretrain.config import PretrainConfig
from pretrain.masking.attmask import most_hints
from pretrain.masking.budget import masked_count
from pretrain.masking.patches import kept_count
from pretrain.masking.strategies import OF_ATTENTION, OF_PARTS
from shards.shard_set import ShardSet


def refuse_what_does_not_fit(config: PretrainConfig, shards: ShardSet) -> None:
    """Raises ValueError, with the way out: labels are missing, the patch does not divide the images, nothing would be
    masked or nothing seen, or a setting is too large to change anything."""
    _refuse_missing_labels(config.masking, shards)
    if shards.size % config.patch:
        raise ValueError(f"--patch {config.patch} does not divide the {shards.size}-px images of {config.data}")
    side = shards.size // config.patch
    kept = kept_count((side, side), config.keep_share)
    masked = masked_count(kept, config.mask_ratio)
    if not 0 < masked < kept:
        raise ValueError(
            f"--mask-ratio {config.mask_ratio} masks {masked} of the {kept} patches kept of an image, expected at "
            "least one masked and one visible; change it, or choose a smaller --patch or a larger --keep-share"
        )
    if config.predicted is not None and config.predicted > masked:
        raise ValueError(
            f"--predicted {config.predicted} is more than the {masked} patches that are masked of an image; leave it "
            "out to predict all of them"
        )
    if config.mask_unit >= side:
        raise ValueError(
            f"--mask-unit {config.mask_unit} makes one square of an image of {side}x{side} patches, which masks as "
            f"--mask-unit 1 does; choose one below {side}"
        )
    hints, most = int(config.hint_share * masked), most_hints(kept, masked)
    if config.masking == "attmask-hint" and hints > most:
        raise ValueError(
            f"--hint-share {config.hint_share} shows {hints} of the {masked} masked patches of an image, and at most "
            f"{most} can be shown; choose at most {most / masked:.3f}"
        )


def _refuse_missing_labels(masking: str, shards: ShardSet) -> None:
    if masking in OF_PARTS and shards.groups < 2:
        raise ValueError(
            f"--masking {masking} needs part labels, and {shards.path} has {shards.groups} group of them; make some "
            f"with `semmae extract --relabel {shards.path} --out DIR` and take --labels DIR, or take --masking random"
        )
    if masking in OF_ATTENTION:
        shards.refuse_no_attention()
