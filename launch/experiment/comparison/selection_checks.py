"""Find mistakes in `select_lr` before anything runs."""

import math
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

SETTINGS = ("lr_factors", "seed", "per_rank_batch_size", "max_epochs", "widen", "options")


def check(config: DictConfig, norms: Collection[str]) -> None:
    """Refuse settings by which nothing can be chosen.

    Args:
        config: Of the comparison.
        norms: The files of conf/norm.

    Raises:
        ValueError: what is wrong, and what was expected.
    """
    select = config.select_lr
    if select is None:
        return
    if not OmegaConf.is_dict(select) or set(select) != set(SETTINGS):
        raise ValueError(f"expected select_lr to be null, or to have {', '.join(SETTINGS)}, got {select!r}")
    lr = config.task.get("lr")
    if not is_positive(lr):
        raise ValueError(
            f"expected task.lr to be a learning rate, which select_lr varies, got {lr!r}; select_lr=null varies none"
        )
    factors = select.lr_factors
    is_list = OmegaConf.is_list(factors) and all(map(is_positive, factors))
    if not is_list or len({rounded(factor * lr) for factor in factors}) < 2:
        raise ValueError(f"expected select_lr.lr_factors to be two numbers or more, each above 0, got {factors!r}")
    for name, least in (("seed", 0), ("per_rank_batch_size", 1), ("max_epochs", 1), ("widen", 0)):
        value = select[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"expected select_lr.{name} to be a whole number of at least {least}, got {value!r}")
    if select.seed in config.seeds:
        raise ValueError(
            f"select_lr.seed={select.seed} is one of seeds={list(config.seeds)}: choose by a seed that the grid does "
            "not report"
        )
    _check_options(select.options, norms)


def _check_options(options: Any, norms: Collection[str]) -> None:
    for arm, choices in options.items():
        if arm not in norms:
            raise ValueError(f"select_lr.options has unknown arm {arm!r}: expected one of {', '.join(sorted(norms))}")
        if not OmegaConf.is_list(choices) or not choices or not all(OmegaConf.is_dict(c) for c in choices):
            raise ValueError(f"expected select_lr.options.{arm} to be a list of settings of its norm, got {choices!r}")
        if any("process_group" in choice for choice in choices):
            raise ValueError(f"select_lr.options.{arm} cannot choose process_group: groups are axes, set group_sizes")


def is_positive(value: Any) -> bool:
    """Whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def rounded(rate: float) -> float:
    """Round to three digits."""
    return float(f"{rate:.3g}")
