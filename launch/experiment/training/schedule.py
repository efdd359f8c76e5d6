"""The learning rate schedule: scaled with the batch size, linear warm-up, then cosine."""

import math

LR_RULES = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}  # the power of global_batch_size / reference


def scale_lr(lr: float, rule: str, global_batch_size: int, reference_batch_size: int) -> float:
    """Scale the learning rate: `lr * (global_batch_size / reference_batch_size) ** power`.

    The power is 0 (constant), 1/2 (sqrt) or 1 (linear; Goyal et al. 2017, section 2.1).

    Raises:
        ValueError: an unknown rule.

    >>> scale_lr(0.1, "linear", 8, 32)
    0.025
    """
    if rule not in LR_RULES:
        raise ValueError(f"expected task.lr_rule to be one of {', '.join(LR_RULES)}, got {rule!r}")
    return float(lr * (global_batch_size / reference_batch_size) ** LR_RULES[rule])


def warmup_cosine(step: int, num_steps: int, warmup: float) -> float:
    """Give the factor of the learning rate: a line up to 1 for `warmup * num_steps` steps, then half a cosine to 0."""
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))
