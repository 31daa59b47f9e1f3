"""Equations 1 to 7 of SemMAE (arXiv:2206.10207, section 3.1) as printed, image by image in float64, and beside each
what our default does instead. Where the paper is silent (Eq. 4's layers, blur, epsilon), what METHOD.md says."""

import numpy as np

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def eq1(weights: dict[str, Array], class_token: Array, part: int, *, gate: str) -> Array:
    """F_p^i = F_c · sigmoid(W_c2^i tanh(W_c1^i F_c))."""
    if gate == "sigmoid":
        inner = np.tanh(weights["gate_in"][part] @ class_token)
        return class_token * sigmoid(weights["gate_out"][part] @ inner)
    inner = np.tanh(weights["gate_in"][part] @ class_token + weights["gate_in_bias"][part])
    return class_token * 2 * sigmoid(weights["gate_out"][part] @ inner + weights["gate_out_bias"][part])


def eq2(
    weights: dict[str, Array], class_token: Array, tokens: Array, part: int, *, gate: str, projections: str, scale: str
) -> Array:
    """M_i = softmax over positions of (W_q F_p^i) · (W_k F(p)); sums to 1."""
    part_token = eq1(weights, class_token, part, gate=gate)
    if projections == "shared":
        query = weights["query"][0] @ part_token
        keys = np.stack([weights["key"][0] @ token for token in tokens])
    else:
        query = weights["query"][part] @ part_token + weights["query_bias"][part]
        keys = np.stack([weights["key"][part] @ token + weights["key_bias"][part] for token in tokens])
    scores = keys @ query * (np.exp(weights["log_scale"]) if scale == "trained" else 1)
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def eq3(x: Array, style: Array, epsilon: float) -> Array:
    """Each channel less its mean, over its deviation, scaled and shifted by the style."""
    return np.stack(
        [
            scale * (channel - channel.mean()) / np.sqrt(channel.var() + epsilon) + shift
            for channel, scale, shift in zip(x, *np.split(style, 2), strict=True)
        ]
    )


def blurred(part_map: Array) -> Array:
    """Kernel 7, sigma 1.4, reflected."""
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 1.4**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(part_map, 3, mode="reflect")
    rows, cols = part_map.shape
    return np.array([[(padded[r : r + 7, c : c + 7] * kernel).sum() for c in range(cols)] for r in range(rows)])


def convolved(x: Array, weight: Array, bias: Array) -> Array:
    """3 x 3, zeros around."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    rows, cols = x.shape[1:]
    taps = [
        np.tensordot(weight[:, :, r, c], padded[:, r : r + rows, c : c + cols], axes=1)
        for r in range(3)
        for c in range(3)
    ]
    return sum(taps) + bias[:, None, None]


def doubled(x: Array) -> Array:
    """Twice the side: between two pixels lie a quarter and three quarters of each; the border repeats."""
    for axis in (1, 2):
        side = x.shape[axis]
        before = np.take(x, np.maximum(np.arange(side) - 1, 0), axis=axis)
        after = np.take(x, np.minimum(np.arange(side) + 1, side - 1), axis=axis)
        halves = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=axis + 1)
        x = halves.reshape(*x.shape[:axis], 2 * side, *x.shape[axis + 1 :])
    return x


def eq4(weights: dict[str, Array], maps: Array, class_token: Array, blocks: int) -> Array:
    """The image from its blurred maps [parts, rows, cols], which sum to 1, and its class token.

    The paper has no epsilon. Ours is 1e-5 for maps of mean 1, so less by their number of cells squared for these.
    """
    x = np.stack([blurred(part_map) for part_map in maps])
    for block in range(blocks):
        x = doubled(x) if block else x
        for layer in range(2):
            name = f"blocks.{block}."
            x = convolved(x, weights[f"{name}convs.{layer}.weight"], weights[f"{name}convs.{layer}.bias"])
            style = weights[f"{name}styles.{layer}.style.weight"] @ class_token
            epsilon = 1e-5 if block or layer else 1e-5 / maps[0].size ** 2
            x = eq3(x, style + weights[f"{name}styles.{layer}.style.bias"], epsilon)
            x = np.where(x > 0, x, 0.2 * x)
    return convolved(x, weights["to_pixels.weight"], weights["to_pixels.bias"])


def eq6(maps: Array) -> float:
    """1/N² · sum over i ≠ j of cos²(m_i, m_j)."""
    total = 0.0
    for i, first in enumerate(maps):
        for j, second in enumerate(maps):
            if i != j:
                total += (first @ second / (np.linalg.norm(first) * np.linalg.norm(second))) ** 2
    return total / len(maps) ** 2


def eq7(
    weights: dict[str, Array],
    read: Array,
    class_tokens: Array,
    images: Array,
    *,
    parts: int,
    blocks: int,
    gate: str = "sigmoid",
    projections: str = "shared",
    temperature: str = "none",
    pixel_error: str = "sum",
) -> tuple[float, Array]:
    """L_rec + 0.03 L_div, the mean over images, and the maps [images, parts, patches].

    `read` holds the tokens that Eq. 1 and 2 take, the class token first; `class_tokens` is the style of Eq. 3.
    """
    attention = {name.removeprefix("attention."): w for name, w in weights.items() if name.startswith("attention.")}
    decoder = {name.removeprefix("decoder."): w for name, w in weights.items() if name.startswith("decoder.")}
    losses, all_maps = [], []
    for tokens, style, image in zip(read, class_tokens, images, strict=True):
        form = {"gate": gate, "projections": projections, "scale": temperature}
        maps = np.stack([eq2(attention, tokens[0], tokens[1:], part, **form) for part in range(parts)])
        side = round(len(maps[0]) ** 0.5)
        rebuilt = eq4(decoder, maps.reshape(parts, side, side), style, blocks)
        squares = (image - rebuilt) ** 2
        eq5 = squares.sum() / squares[0].size if pixel_error == "sum" else squares.mean()
        losses.append(eq5 + 0.03 * eq6(maps))
        all_maps.append(maps)
    return float(np.mean(losses)), np.stack(all_maps)
