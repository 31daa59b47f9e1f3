"""SemMAE's Algorithm 1 as a loop, one picture at a time, in exact fractions."""

from fractions import Fraction


def counts(sizes: list[int], order: list[int], hidden: int, alpha: Fraction) -> list[int]:
    """Patches to hide of each part; the paper's real numbers, made whole by largest remainder."""
    patches = sum(sizes)
    inside = [Fraction(size * hidden, patches) for size in sizes]
    whole, left = [0] * len(sizes), hidden
    for part in order:
        whole[part] = min(left, sizes[part])
        left -= whole[part]
    wanted = [(1 - alpha) * a + alpha * b for a, b in zip(inside, whole, strict=True)]
    found = [int(x) for x in wanted]
    by_remainder = sorted(range(len(sizes)), key=lambda part: (found[part] - wanted[part], part))
    for part in by_remainder[: hidden - sum(found)]:
        found[part] += 1
    return found
