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
