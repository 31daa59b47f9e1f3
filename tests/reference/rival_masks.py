"""The rivals' masks as their papers tell them, an image and a patch at a time."""

import math


def lowest(scores: list, count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda patch: (scores[patch], patch))[:count])


def in_squares(noise: list[float], shape: tuple[int, int], unit: int, count: int) -> set[int]:
    """SimMIM (arXiv:2111.09886): squares in the order of their noise, all patches of each; the last is cut."""
    rows, cols = shape
    across = math.ceil(cols / unit)
    squares: dict[int, list[int]] = {}
    for patch in range(rows * cols):
        squares.setdefault(patch // cols // unit * across + patch % cols // unit, []).append(patch)
    masked: list[int] = []
    for square in sorted(squares, key=lambda square: (noise[square], square)):
        masked += sorted(squares[square], key=lambda patch: (noise[patch], patch))
    return set(masked[:count])


def in_rectangles(draws: list[list[float]], shape: tuple[int, int], count: int, noise: list[float]) -> set[int]:
    """BEiT (arXiv:2106.08254, Algorithm 1), with its code's ten tries; then filled up to the count by noise."""
    rows, cols = shape
    least = min(16, rows * cols // 12)  # 16 of 14x14
    covered: set[tuple[int, int]] = set()
    failures = 0
    for area, aspect, top, left in draws:
        if failures == 10 or len(covered) == count:
            break
        wanted = least + (count - len(covered) - least) * area
        stretch = math.exp((2 * aspect - 1) * math.log(1 / 0.3))
        height, width = round(math.sqrt(wanted * stretch)), round(math.sqrt(wanted / stretch))
        failures += 1
        if height >= rows or width >= cols:
            continue
        first_row, first_col = int(top * (rows - height + 1)), int(left * (cols - width + 1))
        block = {(first_row + row, first_col + col) for row in range(height) for col in range(width)}
        if 0 < len(block - covered) <= count - len(covered):
            covered |= block
            failures = 0
    masked = {row * cols + col for row, col in covered}
    others = [patch for patch in range(rows * cols) if patch not in masked]
    return masked | set(sorted(others, key=lambda patch: (noise[patch], patch))[: count - len(masked)])


def in_noise(white: list[list[float]], color: str, count: int) -> set[int]:
    """ColorMAE (arXiv:2407.13036): the weakest of filtered noise; a border of five is for the filter alone."""
    rows, cols = len(white) - 10, len(white[0]) - 10

    def blurred(row: int, col: int, deviation: float) -> float:
        bell = [math.exp(-0.5 * (x / deviation) ** 2) for x in range(-5, 6)]
        return sum(white[row + y][col + x] * bell[y] * bell[x] / sum(bell) ** 2 for y in range(11) for x in range(11))

    scores = []
    for row in range(rows):
        for col in range(cols):
            plain, narrow, wide = white[row + 5][col + 5], blurred(row, col, 0.5), blurred(row, col, 2.0)
            green = narrow - wide
            scores.append({"red": wide, "blue": plain - wide, "green": green, "purple": plain - green}[color])
    return lowest(scores, count)
