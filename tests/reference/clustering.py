"""Agreement of two labellings, and average precision, by counting pairs and cells one at a time."""

import math
from itertools import combinations


def pair_ari(labels, truth) -> float:
    """ARI from the four kinds of pairs: 2 (ad - bc) / ((a + b)(b + d) + (a + c)(c + d))."""
    a = b = c = d = 0
    for i, j in combinations(range(len(labels)), 2):
        same_label, same_truth = labels[i] == labels[j], truth[i] == truth[j]
        a += same_label and same_truth
        b += same_label and not same_truth
        c += not same_label and same_truth
        d += not same_label and not same_truth
    bottom = (a + b) * (b + d) + (a + c) * (c + d)
    return 2 * (a * d - b * c) / bottom if bottom else 1.0


def summed_nmi(labels, truth) -> float:
    """NMI from the definition: a sum over pairs of values, over the mean of the entropies."""
    n, information = len(labels), 0.0
    for label in set(labels):
        for part in set(truth):
            both = sum(x == label and y == part for x, y in zip(labels, truth, strict=True)) / n
            if both:
                apart = sum(x == label for x in labels) / n * sum(y == part for y in truth) / n
                information += both * math.log(both / apart)
    mean = (_entropy(labels) + _entropy(truth)) / 2
    return information / mean if mean else 1.0


def stepwise_ap(scores, truth) -> float:
    """Average precision: at every threshold that is a score, the recall gained times the precision there."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        recall = sum(taken) / sum(truth)
        total += (recall - before) * sum(taken) / len(taken)
        before = recall
    return total


def _entropy(values) -> float:
    shares = [sum(x == value for x in values) / len(values) for value in set(values)]
    return -sum(share * math.log(share) for share in shares)
