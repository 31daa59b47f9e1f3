"""One slice of images in, one labelled shard out. No Ray here: `pipeline/extract.py` calls it from wherever."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from partlearn.config import ExtractConfig
from partlearn.labelling.protocol import Labeller, open_labeller
from partlearn.labelling.sources import Load, Slice, Stored
from shards.sample import LabelledImage, Rejected
from shards.writer import write_shard


class Builder:
    """Builds any shard of a plan: what one process holds, this one or a Ray actor."""

    def __init__(self, config: ExtractConfig, plan_digest: str, labeller: Labeller | None = None):
        """Without a labeller, opens the one that `config` names, on the device that is here."""
        self.config, self.plan_digest = config, plan_digest
        self.labeller = labeller or open_labeller(config)

    def build(self, slice_: Slice) -> dict[str, Any]:
        return build_shard(slice_, labeller=self.labeller, config=self.config, plan_digest=self.plan_digest)


def build_shard(slice_: Slice, *, labeller: Labeller, config: ExtractConfig, plan_digest: str) -> dict[str, Any]:
    """Label a slice, commit it as one shard, and return its sidecar.

    A pure function of its arguments, down to the bytes. Labels are computed on the stored JPEG's own pixels, while
    threads prepare the next batch. Unreadable images are listed in the sidecar with their reason; none is lost
    without a word.
    """
    rejected: list[Rejected] = []
    return write_shard(
        Path(config.run.out),
        slice_.number,
        _labelled(slice_.loads(), labeller, config, rejected),
        groups=labeller.groups,
        plan_digest=plan_digest,
        rejected=rejected,
        computed=labeller.computed,
    )


def _labelled(
    loads: list[Load], labeller: Labeller, config: ExtractConfig, rejected: list[Rejected]
) -> Iterator[LabelledImage]:
    """A shard's own images, in order; what cannot be read or labelled goes to `rejected`."""
    batches = _batches(loads, config, rejected)
    for batch in never_alone(batches, config.batch_size) if labeller.shuffled else batches:
        if labeller.shuffled and len(batch) == 1 and not config.relabel:  # in a label set no image may be missing
            reason = f"{config.parts} needs another image, and no other of its shard can be read"
            rejected.append(Rejected(batch[0].source, int(batch[0].key), "label", reason))
        elif batch:
            yield from _label(batch, labeller)


def _batches(loads: list[Load], config: ExtractConfig, rejected: list[Rejected]) -> Iterator[list[Stored]]:
    """The images that can be read, `batch_size` inputs at a time; the next are prepared meanwhile."""
    with ThreadPoolExecutor(config.run.threads) as pool:

        def submit(start: int) -> list[Future[Stored | Rejected]]:
            return [pool.submit(load) for load in loads[start : start + config.batch_size]]

        waiting = submit(0)
        for start in range(0, len(loads), config.batch_size):
            following = submit(start + config.batch_size)
            outcomes = [future.result() for future in waiting]
            rejected.extend(outcome for outcome in outcomes if isinstance(outcome, Rejected))
            yield [outcome for outcome in outcomes if isinstance(outcome, Stored)]
            waiting = following


def never_alone(batches: Iterable[list[Stored]], size: int) -> Iterator[list[Stored]]:
    """The same images in batches of `size` (of 2 where that is 1), the last of 2 to `size` + 1: an image is alone
    only where there is no other. Shuffled labels are those of the next image of the batch."""
    size, ready = max(2, size), []
    for batch in batches:
        ready += batch
        while len(ready) > size + 1:
            yield ready[:size]
            ready = ready[size:]
    yield ready


def _label(batch: list[Stored], labeller: Labeller) -> Iterator[LabelledImage]:
    labels = labeller.label(batch)
    for place, stored in enumerate(batch):
        yield LabelledImage(
            key=stored.key,
            source=stored.source,
            class_id=stored.class_id,
            jpeg=stored.jpeg,
            parts=labels.parts[place],
            fgrank=labels.fgrank[place],
            src_width=stored.source_size[0],
            src_height=stored.source_size[1],
            box=stored.box,
            attn=None if labels.attn is None else labels.attn[place],
            attn_peak=None if labels.attn_peak is None else labels.attn_peak[place],
            confidence=int(labels.confidence[place]),
        )
