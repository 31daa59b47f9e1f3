"""HPM as its paper writes it (arXiv:2304.05919, section 3): an image, a pair and a weight at a time, in float64."""

import math

import torch
from reference import mae_step
from reference.vit import block, linear, norm
from torch import Tensor


def guesses(predictor: dict[str, Tensor], config, x: Tensor) -> list[Tensor]:
    """The predicted loss of every token but the class."""
    for number in range(config.decoder_depth):
        x = block(predictor, f"blocks.{number}", x, config.decoder_heads)
    return [row.sum() / len(row) for row in linear(predictor, "pixels", norm(predictor, "norm", x))[1:]]


def mask(guessed: list[float], noise: list[float], masked: int, progress: float, share: float) -> set[int]:
    """Places of the kept patches that are masked: the hardest, then by noise."""
    hardest_first = sorted(range(len(guessed)), key=lambda place: -guessed[place])
    hard = hardest_first[: math.floor(masked * progress * share)]
    others = sorted(set(range(len(noise))) - set(hard), key=lambda place: noise[place])
    return {*hard, *others[: masked - len(hard)]}


def loss(mae: dict[str, Tensor], predictor: dict[str, Tensor], config, images) -> Tensor:
    """Of images (pixels, visible, predicted): the mean squared error, and binary cross-entropy over all ordered pairs,
    whose labels no gradient reaches."""
    errors, orders = [], []
    for pixels, visible, predicted in images:
        guessed = guesses(predictor, config, mae_step.tokens(mae, config, pixels, visible, predicted))[len(visible) :]
        errors.append(mae_step.losses(mae, config, pixels, visible, predicted))
        true, terms = errors[-1].tolist(), []
        for i in range(len(predicted)):
            for j in range(len(predicted)):
                chance = 1 / (1 + torch.exp(guessed[j] - guessed[i]))
                if true[i] > true[j]:
                    terms.append(-torch.log(chance + 1e-6))
                elif true[i] < true[j]:
                    terms.append(-torch.log(1 - chance + 1e-6))
        orders.append(sum(terms) / len(terms))
    return torch.cat(errors).mean() + torch.stack(orders).mean()


def tau(guessed: list[float], true: list[float]) -> float:
    """Kendall's: pairs in the same order less those in the other one, of those that the true values order."""
    pairs = [(i, j) for i in range(len(true)) for j in range(i) if true[i] != true[j]]
    return sum(math.copysign(1, (guessed[i] - guessed[j]) * (true[i] - true[j])) for i, j in pairs) / len(pairs)
