"""Make what a configuration names."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig


def make(config: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Make what `_target_` names; an error in it appears as it is, without Hydra's wrapping."""
    try:
        return instantiate(config, *args, **kwargs)
    except InstantiationException as error:
        raise (error.__cause__ or error) from None
