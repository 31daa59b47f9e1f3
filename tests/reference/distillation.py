"""Slow twins of encoders/distill/losses.py and of the crops: loops over images, pairs and pixels."""

import math


def cross_entropy(target, logits, temperature):
    """- Σ p log softmax(logits / temperature), for lists of numbers."""
    largest = max(value / temperature for value in logits)
    log_sum = largest + math.log(sum(math.exp(value / temperature - largest) for value in logits))
    return -sum(p * (value / temperature - log_sum) for p, value in zip(target, logits, strict=True))


def class_loss(student, teacher, temperature=0.1):
    """DINO's double loop: every teacher crop against every other student crop, then the mean."""
    terms = []
    for t, teacher_crop in enumerate(teacher.tolist()):
        for s, student_crop in enumerate(student.tolist()):
            if s == t:
                continue
            pairs = list(zip(teacher_crop, student_crop, strict=True))
            terms.append(sum(cross_entropy(p, x, temperature) for p, x in pairs) / len(pairs))
    return sum(terms) / len(terms)


def patch_loss(student, teacher, temperature=0.1):
    """iBOT's mean over hidden patches."""
    pairs = list(zip(teacher.tolist(), student.tolist(), strict=True))
    return sum(cross_entropy(p, x, temperature) for p, x in pairs) / len(pairs)


def bilinear(image, x, y):
    """The value of a (height, width) image at pixel coordinates whose centres are at .5, edges repeated."""
    height, width = image.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    left, top = min(int(x), width - 1), min(int(y), height - 1)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    u, v = x - left, y - top
    upper = (1 - u) * image[top, left] + u * image[top, right]
    lower = (1 - u) * image[bottom, left] + u * image[bottom, right]
    return float((1 - v) * upper + v * lower)
