"""Other modules that change with a layer: the convolution before it, the activation behind it, the block around it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class PlanRow(NamedTuple):
    """What conversion does to one layer: ``to`` is None where the layer stays as it is, ``reason`` says why."""

    name: str
    from_: str
    to: str | None
    reason: str


@dataclass
class Companion(ABC):
    """One such module, and how it changes; kept on the layer, which undoes it when it is restored.

    Copies and pickles with its model, so it holds modules and values alone.
    """

    row: PlanRow
    module: nn.Module

    @abstractmethod
    def change(self) -> None:
        """Change the module in place."""

    @abstractmethod
    def undo(self) -> None:
        """Make the module what it was; parameters as trained."""

    def problem(self) -> str | None:
        """Say why it cannot be undone, None if it can."""
        return None
