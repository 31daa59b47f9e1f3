"""SemMAE's Algorithm 1 as a loop, one image at a time, in exact fractions."""

from fractions import Fraction


def counts(sizes: list[int], order: list[int], masked: int, alpha: Fraction) -> list[int]:
    """Patches to mask of each part; the paper's real numbers, made whole by largest remainder."""
    patches = sum(sizes)
    inside = [Fraction(size * masked, patches) for size in sizes]
    whole, left = [0] * len(sizes), masked
    for part in order:
        whole[part] = min(left, sizes[part])
        left -= whole[part]
    wanted = [(1 - alpha) * a + alpha * b for a, b in zip(inside, whole, strict=True)]
    found = [int(x) for x in wanted]
    by_remainder = sorted(range(len(sizes)), key=lambda part: (found[part] - wanted[part], part))
    for part in by_remainder[: masked - sum(found)]:
        found[part] += 1
    return found


def mask_of(labels: list[int], noise: list[float], masked: list[int]) -> list[bool]:
    """Line 9: inside each part, as many patches as it was told, at random; here those of least noise."""
    mask = [False] * len(labels)
    for part, count in enumerate(masked):
        members = [patch for patch, label in enumerate(labels) if label == part]
        for patch in sorted(members, key=lambda patch: noise[patch])[:count]:
            mask[patch] = True
    return mask


def released_mask(labels: list[int], noise: list[float], order: list[int], ratio: float, alpha: float) -> list[bool]:
    """The same with the roundings of the released code: Python's round, too, takes halves to the even number."""
    patches, keep = len(labels), int(len(labels) * (1 - ratio))
    budget, quota = patches * ratio, {}
    for part in order:
        size = labels.count(part)
        whole = min(size, max(0, int(budget)))
        budget -= size
        quota[part] = round((1 - alpha) * round(size * ratio) + alpha * whole)
    shuffled = sorted(range(patches), key=lambda patch: (noise[patch], patch))
    hidden, shown, seen = [], [], dict.fromkeys(order, 0)
    for patch in shuffled:
        part = labels[patch]
        seen[part] += 1
        (hidden if seen[part] <= quota[part] else shown).append(patch)
    visible = (shown + hidden)[:keep]
    return [patch not in visible for patch in range(patches)]
