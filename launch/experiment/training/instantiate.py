"""Instantiate what a configuration names."""

from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig


def instantiate(config: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Instantiate the `_target_`; an error raised in it appears as it is, without Hydra's wrapping."""
    try:
        return hydra.utils.instantiate(config, *args, **kwargs)
    except InstantiationException as error:
        raise (error.__cause__ or error) from None
