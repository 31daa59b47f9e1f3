"""Procedural creatures with true part maps: the built-in images of `make demo`.

Eight species seen from above, each an articulated figure of tubes (a bent centre line and a half-width along it).
What tells a part is its outline and its texture *family*, shared over species: tails are banded, torsos spotted, and so
on. What tells nothing, by construction, is colour (figure, ground and clutter draw from one palette an image),
place, size, heading and pose (all random). Rocks and sticks lie about, so an edge is not yet a creature.

An image is a pure function of (seed, index, species, size). It is drawn at twice its size and reduced.
"""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFilter

PARTS: tuple[str, ...] = ("head", "torso", "tail", "forelegs", "hindlegs", "ears or wings")
SPECIES: tuple[str, ...] = ("axolotl", "bird", "dragon", "gecko", "moth", "mouse", "rabbit", "turtle")
HEAD, TORSO, TAIL, FORELEGS, HINDLEGS, WINGS = range(1, 7)
ROCK, STICK = 7, 8
"""Clutter: pieces like any other, but background in the part map."""

# Dark to light; an image takes one palette and jitters it.
PALETTES = (
    ("#264653", "#3d405b", "#8c4a3a", "#2a9d8f", "#e9c46a", "#f4a261", "#f1e8d0"),
    ("#283618", "#4b3b2b", "#606c38", "#bc6c25", "#dda15e", "#c9d19a", "#fefae0"),
    ("#22223b", "#4a4e69", "#6d4a6a", "#9a8c98", "#c9ada7", "#e3b7a0", "#f2e9e4"),
    ("#003049", "#40506b", "#9b2c35", "#669bbc", "#f0a868", "#e6c98f", "#fdf0d5"),
    ("#3a2e39", "#1e555c", "#7a4b5d", "#d9826b", "#edb183", "#a5c9b7", "#f4d8cd"),
    ("#1b3a4b", "#2d5a52", "#5a5b7c", "#57a3a0", "#e8a598", "#b8d8ba", "#fceade"),
    ("#3b2f5c", "#2f4b6e", "#7b3f61", "#5fa8a0", "#f2a65a", "#eec6a8", "#f7f3e3"),
)


class Tube(NamedTuple):
    """One piece of a creature, in units of the torso's length."""

    length: float
    width: float
    start: float = 1.0
    """Width at the root, as a share of `width`."""
    end: float = 1.0
    """Width at the tip, as a share of `width`."""
    power: float = 3.0
    """Roundness of both ends: 2 is an ellipse, more is a box."""
    spread: float = 60.0
    """Degrees between a limb and the heading; unused on the spine."""
    bend: float = 0.0
    """Degrees a limb turns on its way to the tip."""
    foot: float = 0.0
    """How much wider the limb is at its foot."""
    scallop: float = 0.0
    """Depth of waves along the outline."""


BODIES: dict[str, dict[int, Tube]] = {
    "axolotl": {
        HEAD: Tube(0.5, 0.62, 0.8, 1.0, 2.6), TORSO: Tube(1.0, 0.46, 1.0, 0.8), TAIL: Tube(1.0, 0.40, 0.8, 0.7, 2.2),
        FORELEGS: Tube(0.40, 0.23, spread=75, bend=-30), HINDLEGS: Tube(0.40, 0.23, spread=110, bend=30),
        WINGS: Tube(0.50, 0.27, 0.7, 1.0, 2.4, spread=80, bend=50, scallop=0.28),
    },
    "bird": {
        HEAD: Tube(0.5, 0.40, 1.0, 0.35, 2.2), TORSO: Tube(1.0, 0.52, 0.9, 0.7, 2.2), TAIL: Tube(0.65, 0.62, 0.25, 1.0, 6),
        HINDLEGS: Tube(0.45, 0.23, 1.0, 0.9, spread=135, foot=0.9),
        WINGS: Tube(1.15, 0.48, 1.0, 0.35, 2.4, spread=70, bend=55, scallop=0.10),
    },
    "dragon": {
        HEAD: Tube(0.55, 0.42, 1.0, 0.5, 3.0), TORSO: Tube(1.0, 0.50, 0.9, 0.8), TAIL: Tube(1.35, 0.30, 1.2, 0.25),
        FORELEGS: Tube(0.5, 0.24, spread=50, bend=-40, foot=0.5), HINDLEGS: Tube(0.55, 0.29, spread=130, bend=30, foot=0.5),
        WINGS: Tube(0.95, 0.62, 0.5, 0.9, 3.5, spread=90, bend=15, scallop=0.22),
    },
    "gecko": {
        HEAD: Tube(0.52, 0.44, 0.8, 0.6, 2.6), TORSO: Tube(1.0, 0.40, 0.9, 0.8), TAIL: Tube(1.25, 0.30, 0.9, 0.3),
        FORELEGS: Tube(0.60, 0.23, spread=70, bend=-60, foot=1.0), HINDLEGS: Tube(0.65, 0.26, spread=105, bend=60, foot=1.0),
    },
    "moth": {
        HEAD: Tube(0.34, 0.36, power=2.2), TORSO: Tube(1.0, 0.36, 1.1, 0.6, 2.4),
        FORELEGS: Tube(0.55, 0.18, spread=35, bend=-25), HINDLEGS: Tube(0.6, 0.20, spread=150, bend=15),
        WINGS: Tube(1.05, 0.95, 0.4, 1.0, 2.8, spread=80, bend=25, scallop=0.08),
    },
    "mouse": {
        HEAD: Tube(0.55, 0.46, 1.1, 0.3, 2.4), TORSO: Tube(1.0, 0.62, 0.8, 1.1, 2.2), TAIL: Tube(1.3, 0.16, 1.2, 0.6),
        FORELEGS: Tube(0.34, 0.24, spread=50, foot=0.3), HINDLEGS: Tube(0.42, 0.29, spread=120, foot=0.4),
        WINGS: Tube(0.36, 0.42, 0.8, 1.0, 2.0, spread=85),
    },
    "rabbit": {
        HEAD: Tube(0.56, 0.50, 1.0, 0.7, 2.2), TORSO: Tube(1.0, 0.66, 0.7, 1.1, 2.2), TAIL: Tube(0.36, 0.38, power=2.0),
        FORELEGS: Tube(0.42, 0.27, spread=35), HINDLEGS: Tube(0.72, 0.39, 1.1, 0.7, spread=125, bend=-75),
        WINGS: Tube(0.78, 0.26, 0.7, 1.0, 2.4, spread=145, bend=10),
    },
    "turtle": {
        HEAD: Tube(0.42, 0.36, 0.9, 0.9, 2.4), TORSO: Tube(1.0, 0.88, 0.95, 0.95, 2.3), TAIL: Tube(0.40, 0.22, 1.2, 0.4),
        FORELEGS: Tube(0.72, 0.37, 1.0, 0.5, 2.4, spread=60, bend=70), HINDLEGS: Tube(0.42, 0.34, 0.9, 0.9, 2.4, spread=130),
    },
}  # fmt: skip

LINE = (0.5 - 0.5 * np.cos(np.linspace(0, np.pi, 17))).astype(np.float32)
"""Where along a tube its centre line is known: denser at the ends, so that they come out round."""


class Piece(NamedTuple):
    """A tube laid out: centre line (points and headings, radians) and half-widths, all at `LINE`."""

    kind: int
    points: Float[np.ndarray, "17 2"]
    headings: Float[np.ndarray, "17"]
    half_widths: Float[np.ndarray, "17"]

    def outline(self) -> Float[np.ndarray, "34 2"]:
        across = np.stack([-np.sin(self.headings), np.cos(self.headings)], 1) * self.half_widths[:, None]
        return np.concatenate([self.points + across, (self.points - across)[::-1]])


def draw_creature(
    seed: int, index: int, species: int, size: int = 96
) -> tuple[UInt8[np.ndarray, "size size 3"], UInt8[np.ndarray, "size size"]]:
    """An image and its part map: 0 is background, then `PARTS` in order.

    A pose that leaves too little or too much of the creature in the image (outside 0.13 to 0.44 of the pixels, or
    fewer than four parts) is thrown again.
    """
    if not 0 <= species < len(SPECIES):
        raise ValueError(f"species must lie between 0 and {len(SPECIES) - 1}, got {species}")
    rng = np.random.default_rng((seed, index, species))
    side = 2 * size
    while True:
        pieces = _clutter(rng, side) + _placed(_posed(BODIES[SPECIES[species]], rng), rng, side)
        board = _board(pieces, side)
        kinds = np.array([0, *(piece.kind for piece in pieces)], np.uint8)
        parts = _majority(np.where(kinds > len(PARTS), 0, kinds)[board])
        pixels = np.bincount(parts.ravel(), minlength=len(PARTS) + 1)[1:]
        if 0.13 <= pixels.sum() / parts.size <= 0.44 and (pixels >= 0.004 * parts.size).sum() >= 4:
            return _painted(board, pieces, rng, side), parts


def write_creatures(
    folder: Path, *, count: int, seed: int, size: int = 96, progress: Callable[[int], None] | None = None
) -> None:
    """Write `count` images, species in turn, as folder/images/SPECIES/NNNNN.jpg and folder/labels/SPECIES/NNNNN.png.

    The folder appears whole or not at all (drawn beside its place, then renamed); one that exists is left as it is.

    Args:
        progress: Called with 1 after each image.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    drawn = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        for name in SPECIES:
            (drawn / "images" / name).mkdir(parents=True)
            (drawn / "labels" / name).mkdir(parents=True)
        for index in range(count):
            species = index % len(SPECIES)
            image, parts = draw_creature(seed, index, species, size)
            Image.fromarray(image).save(drawn / "images" / SPECIES[species] / f"{index:05d}.jpg", quality=92)
            Image.fromarray(parts).save(drawn / "labels" / SPECIES[species] / f"{index:05d}.png")
            if progress is not None:
                progress(1)
        lines = [f"{part}\t{name}\n" for part, name in enumerate(("background", *PARTS))]
        (drawn / "labels.txt").write_text("".join(lines))
        drawn.rename(folder)
    except BaseException:
        shutil.rmtree(drawn)
        raise


def _posed(body: dict[int, Tube], rng: np.random.Generator) -> list[Piece]:
    """The body with joints turned at random, torso of length 1 centred on the origin, bottom piece first."""
    torso = _tube(TORSO, body[TORSO], np.array([-0.5, 0.0]), 0.0, rng.uniform(-25, 25), rng)
    flip = 1 if rng.random() < 0.5 else -1

    def on_spine(along: float, side: float) -> Float[np.ndarray, "2"]:
        k = int(np.abs(LINE - along).argmin())
        across = np.array([-np.sin(torso.headings[k]), np.cos(torso.headings[k])])
        return torso.points[k] + side * torso.half_widths[k] * across

    def limbs(part: int, along: float, depth: float) -> list[Piece]:
        pair = []
        for side in (-1, 1):
            heading = np.interp(along, LINE, torso.headings) + side * np.radians(
                body[part].spread + rng.uniform(-28, 28)
            )
            bend = side * (body[part].bend + rng.uniform(-30, 30))
            pair.append(_tube(part, body[part], on_spine(along, side * depth), heading, bend, rng))
        return pair

    under, over = [], []
    if TAIL in body:
        heading = torso.headings[0] + np.pi + np.radians(rng.uniform(-25, 25))
        under.append(_tube(TAIL, body[TAIL], on_spine(0.08, 0), heading, flip * rng.uniform(10, 110), rng))
    if HINDLEGS in body:
        under += limbs(HINDLEGS, 0.2, 0.5)
    if FORELEGS in body:
        under += limbs(FORELEGS, 0.78, 0.5)
    neck = torso.headings[-1] + np.radians(rng.uniform(-30, 30))
    head = _tube(HEAD, body[HEAD], on_spine(0.9, 0), neck, 0.0, rng)
    if WINGS in body and body[WINGS].length > 0.9:  # wings grow from the back, ears and gills from the head
        over += limbs(WINGS, 0.66, 0.2)
    elif WINGS in body:
        for side in (-1, 1):
            heading = neck + side * np.radians(body[WINGS].spread + rng.uniform(-20, 20))
            root = head.points[6] + 0.55 * side * head.half_widths[6] * np.array([-np.sin(neck), np.cos(neck)])
            bend = side * (body[WINGS].bend + rng.uniform(-20, 20))
            over.append(_tube(WINGS, body[WINGS], root, heading, bend, rng))
    if WINGS in body and body[WINGS].length > 0.9:
        return [*under, *over, torso, head]
    return [*under, torso, head, *over]


def _tube(
    kind: int, tube: Tube, root: Float[np.ndarray, "2"], heading: float, bend: float, rng: np.random.Generator
) -> Piece:
    """Lay a tube out from its root; proportions vary by an eighth between individuals."""
    length, width = tube.length * rng.uniform(0.88, 1.12), tube.width * rng.uniform(0.88, 1.12)
    headings = heading + np.radians(bend) * LINE
    middle = (headings[1:] + headings[:-1]) / 2
    steps = np.stack([np.cos(middle), np.sin(middle)], 1) * (length * np.diff(LINE))[:, None]
    points = root + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
    profile = (1 - np.abs(2 * LINE - 1) ** tube.power) ** (1 / tube.power)
    profile *= tube.start + (tube.end - tube.start) * LINE
    profile *= 1 + tube.foot * np.exp(-(((LINE - 0.86) / 0.13) ** 2)) + tube.scallop * np.cos(6 * np.pi * LINE)
    return Piece(kind, points, headings, profile * width / 2)


def _clutter(rng: np.random.Generator, side: int) -> list[Piece]:
    """Rocks and sticks anywhere, below the creature."""
    pieces = []
    for kind in rng.permutation([ROCK] * rng.integers(3, 7) + [STICK] * rng.integers(2, 5)):
        length = rng.uniform(0.12, 0.30) if kind == ROCK else rng.uniform(0.30, 0.65)
        width = length * rng.uniform(0.6, 0.9) if kind == ROCK else rng.uniform(0.04, 0.075)
        tube = Tube(length, width, rng.uniform(0.7, 1.0), 1.0, rng.uniform(2.2, 5), scallop=rng.uniform(-0.1, 0.1))
        piece = _tube(kind, tube, np.zeros(2), rng.uniform(0, 2 * np.pi), rng.uniform(-25, 25), rng)
        place = rng.uniform(0.0, 1.0, 2) - piece.points[8]
        pieces.append(piece._replace(points=(piece.points + place) * side, half_widths=piece.half_widths * side))
    return pieces


def _placed(pieces: list[Piece], rng: np.random.Generator, side: int) -> list[Piece]:
    """Scale, turn and move a creature; a limb may leave the image by an eighth of its side."""
    outlines = [piece.outline() for piece in pieces]
    crossed = [np.abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2 for x, y in (o.T for o in outlines)]
    overlap = 0.78
    scale = side * np.sqrt(rng.uniform(0.17, 0.36) / (overlap * np.sum(crossed)))
    turn = rng.uniform(0, 2 * np.pi)
    rotation = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners = np.concatenate(outlines) @ rotation
    first, last = -0.125 * side - corners.min(0), 1.125 * side - corners.max(0)
    place = first + rng.random(2) * (last - first)
    return [Piece(p.kind, p.points @ rotation + place, p.headings + turn, p.half_widths * scale) for p in pieces]


def _board(pieces: list[Piece], side: int) -> UInt8[np.ndarray, "side side"]:
    """Which piece is seen at each pixel: 0 for the ground, else its place in the list, from 1."""
    board = Image.new("L", (side, side))
    pen = ImageDraw.Draw(board)
    for number, piece in enumerate(pieces, 1):
        pen.polygon(piece.outline().ravel().tolist(), fill=number)
    return np.asarray(board)


def _majority(fine: UInt8[np.ndarray, "side side"]) -> UInt8[np.ndarray, "size size"]:
    """Halve a map of ids: of each 2 x 2 block the id it holds most."""
    rows, cols = fine.shape
    four = np.sort(fine.reshape(rows // 2, 2, cols // 2, 2).transpose(0, 2, 1, 3).reshape(rows // 2, cols // 2, 4))
    return np.where((four[..., 0] != four[..., 1]) & (four[..., 2] == four[..., 3]), four[..., 2], four[..., 1])


def _painted(
    board: UInt8[np.ndarray, "side side"], pieces: list[Piece], rng: np.random.Generator, side: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Colour the board: a texture mixes two colours of the palette, light comes from one side, edges are inked."""
    light = rng.uniform(0, 2 * np.pi)
    toward_light = np.array([np.cos(light), np.sin(light)], np.float32)
    mix, shade = _ground(rng, side).ravel(), np.ones(side * side, np.float32)
    pitches = rng.uniform(0.052, 0.070, STICK + 1) * side
    for number, piece in enumerate(pieces, 1):
        at = np.flatnonzero(board == number)
        if not len(at):
            continue
        where = np.stack([at % side, at // side], 1).astype(np.float32)
        points = piece.points.astype(np.float32)
        nearest = ((points**2).sum(1) - 2 * where @ points.T).argmin(1)
        away, heading = where - points[nearest], piece.headings.astype(np.float32)[nearest]
        along_axis = np.stack([np.cos(heading), np.sin(heading)], 1)
        across_axis = np.stack([-along_axis[:, 1], along_axis[:, 0]], 1)
        length = np.hypot(*np.diff(points, axis=0).T).sum()
        along, across = LINE[nearest] * length + (away * along_axis).sum(1), (away * across_axis).sum(1)
        round_off = np.clip(across / (piece.half_widths.max() + 1e-3), -1, 1).astype(np.float32)
        mix[at] = _texture(piece.kind, along, across, pitches[piece.kind], rng)
        shade[at] = 1.0 + 0.22 * round_off * (across_axis @ toward_light) - 0.15 * round_off**2

    solid = Image.fromarray((board > 0).astype(np.uint8) * 255)
    shift = -0.02 * side * toward_light
    shadow = solid.transform(solid.size, Image.Transform.AFFINE, (1, 0, -shift[0], 0, 1, -shift[1]))
    shadow = np.asarray(shadow.filter(ImageFilter.BoxBlur(side / 64)), np.float32).ravel() / 255
    shade *= np.where(board.ravel() == 0, 1 - 0.4 * shadow, 1)
    inked = np.zeros(board.shape, bool)
    inked[:, 1:] |= board[:, 1:] != board[:, :-1]
    inked[1:] |= board[1:] != board[:-1]
    shade[inked.ravel()] *= 0.45

    dark, bright = _colours(pieces, rng)
    numbers = board.ravel()
    zone = _noise(rng, 2.5, side).ravel() > rng.uniform(0.3, 0.7)
    numbers = np.where((numbers == 0) & zone, len(pieces) + 1, numbers)
    colour = dark[numbers] + (bright - dark)[numbers] * mix[:, None]
    image = Image.fromarray(np.clip(colour * shade[:, None], 0, 255).astype(np.uint8).reshape(side, side, 3))
    for piece in pieces:
        if piece.kind == HEAD:
            _draw_eyes(image, piece)
    return np.asarray(image.reduce(2))


def _colours(
    pieces: list[Piece], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """Two colours for the ground, each piece, and the second ground: three pairs an image, shared by all of it."""
    palette = np.array([ImageColor.getrgb(name) for name in PALETTES[rng.integers(len(PALETTES))]], np.float32)
    palette = palette * rng.uniform(0.88, 1.12, (1, 3)) * rng.uniform(0.9, 1.1, (len(palette), 1))
    pairs = np.stack([palette[rng.permutation(3)], palette[3 + rng.permutation(4)[:3]]], 1)
    of_kind = rng.integers(3, size=STICK + 1)
    turned = rng.random(STICK + 1) < 0.5
    kinds = [0, *(piece.kind for piece in pieces), 0]
    choice = np.array([of_kind[kind] for kind in kinds])
    choice[-1] = (choice[-1] + rng.integers(3)) % 3
    chosen = pairs[choice].astype(np.float32)
    swap = np.array([turned[kind] for kind in kinds])
    chosen[swap] = chosen[swap][:, ::-1]
    return chosen[:, 0], chosen[:, 1]


def _noise(rng: np.random.Generator, cells: float, side: int, stretch: float = 1.0) -> Float[np.ndarray, "side side"]:
    """Smooth noise in 0..1, `cells` bumps across the image, `stretch` times longer along a random direction."""
    step, turn = cells / side, rng.uniform(0, 2 * np.pi)
    count = int(1.5 * cells) + 6
    c, s = step * np.cos(turn), step * np.sin(turn)
    a, b, d, e = c / stretch, s / stretch, -s, c
    half = side / 2
    affine = (a, b, count / 2 - (a + b) * half, d, e, count / 2 - (d + e) * half)
    image = Image.fromarray(rng.random((count, count), np.float32))
    return np.asarray(image.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))


def _ground(rng: np.random.Generator, side: int) -> Float[np.ndarray, "side side"]:
    """Clouds, grass, cracks or gravel, as the share of the second colour."""
    kind = rng.integers(4)
    fine = rng.uniform(0.85, 1.15)
    if kind == 0:
        mix = 3.0 * (0.65 * _noise(rng, 9 * fine, side) + 0.35 * _noise(rng, 28 * fine, side) - 0.5)
    elif kind == 1:
        mix = 2.6 * (_noise(rng, 34 * fine, side, stretch=6) - 0.5)
    elif kind == 2:
        mix = 0.7 - 9 * np.maximum(0, 0.13 - np.abs(_noise(rng, 13 * fine, side) - 0.5))
    else:
        mix = 3.0 * (_noise(rng, 26 * fine, side) - 0.5)
    return np.clip(mix if kind == 2 else mix + 0.5, 0, 1).astype(np.float32)


def _texture(kind: int, along, across, pitch: float, rng: np.random.Generator) -> Float[np.ndarray, " n"]:
    """The family of a kind of piece, as the share of its second colour; coordinates run along its centre line."""
    u, v = 2 * np.pi * along / pitch, 2 * np.pi * across / pitch
    if kind == HEAD:  # smooth
        return np.clip(along / (along.max() + 1e-3), 0, 1)
    if kind == TORSO:  # spots
        wave = 1.1 * (np.cos(0.8 * u) + 2 * np.cos(0.4 * u) * np.cos(0.69 * v)) - 0.2
    elif kind == TAIL:  # bands
        wave = 2 * np.sin(u)
    elif kind == FORELEGS:  # checks
        wave = 3 * np.sin(0.8 * u) * np.sin(0.8 * v + np.pi / 4)
    elif kind == HINDLEGS:  # zigzags
        wave = 2 * np.sin(u + 1.2 * np.arcsin(np.sin(1.1 * v)))
    elif kind == WINGS:  # a net
        wave = 5 * (np.maximum(np.abs(np.cos(0.35 * (u + v))), np.abs(np.cos(0.35 * (u - v)))) - 0.88)
    elif kind == ROCK:  # facets
        wave = 1.5 * np.cos(0.11 * u * rng.uniform(1, 3)) + 1.2 * (rng.random(len(u)) - 0.5)
    else:  # grain of a stick
        wave = np.sin(1.4 * v + 0.7 * np.sin(0.15 * u)) + 0.8 * (rng.random(len(u)) - 0.5)
    return np.clip(0.5 + 0.5 * wave, 0, 1)


def _draw_eyes(image: Image.Image, head: Piece) -> None:
    pen = ImageDraw.Draw(image)
    middle, width = 10, head.half_widths.max()
    across = np.array([-np.sin(head.headings[middle]), np.cos(head.headings[middle])])
    for side in (-1, 1):
        eye = head.points[middle] + 0.52 * side * width * across
        for radius, fill in ((0.27, "#1d1b24"), (0.21, "#faf6ea"), (0.12, "#1d1b24")):
            pen.circle(tuple(eye.tolist()), radius * width, fill=fill)
