"""What "fixup" changes beside the norms: the blocks around them, the first convolution and the classifier."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...nn.fixup import BlockParts, FixupBlock, FixupLinear, ScalarBias, draw
from ..companions import Companion, PlanRow
from ..original import original_of
from ..rules import Action, Decision, Target
from . import registry
from .blocks import CONVS, known, parts_of, problem_of
from .parametrized import ParametrizedWeight


class _Turned(Companion):
    """A module whose class changes."""

    becomes: ClassVar[type[nn.Module]]

    def problem(self) -> str | None:
        """Refuse a module that was parametrized or sharded since."""
        is_same = type(self.module) is self.becomes
        return None if is_same else f"the class of {self.row.name} was changed after conversion; undo that first."


@dataclass
class Block(_Turned):
    """A residual block: gets its scalars, and new weights, which stay as trained."""

    parts: BlockParts
    written: type[nn.Module]
    num_blocks: int
    becomes = FixupBlock

    def change(self) -> None:
        """Make it a FixupBlock."""
        FixupBlock.adopt(self.module, self.parts, self.num_blocks)

    def undo(self) -> None:
        """Make it the class that it was."""
        FixupBlock.release(self.module, self.written)  # type: ignore[arg-type]


class Classifier(_Turned):
    """The last linear layer: gets a scalar, and zeros."""

    becomes = FixupLinear

    def change(self) -> None:
        """Make it a FixupLinear."""
        FixupLinear.adopt(self.module)  # type: ignore[arg-type]

    def undo(self) -> None:
        """Make it nn.Linear again."""
        FixupLinear.release(self.module)  # type: ignore[arg-type]


class FirstConv(Companion):
    """The convolution before the blocks: gets a new weight, which stays as trained."""

    def change(self) -> None:
        """Draw the weight."""
        draw(self.module)

    def undo(self) -> None:
        """Keep the weight."""


def add_companions(root: nn.Module, decisions: list[tuple[nn.Module, Decision]], target: Target) -> None:
    """Add blocks, first convolution and classifier to what will be converted; or refuse, layer by layer.

    The norms inside a known block become the identity, the one behind the first convolution a scalar bias.
    """
    family = dict(decisions)
    new = {layer: decision for layer, decision in decisions if decision.action is Action.REPLACE}
    key = registry.key(target.norm, target.norm_kwargs)
    if any((original := original_of(layer)) is not None and original.norm == key for layer in family):
        _refuse(new.values(), "other layers are FixUp's, drawn for their number of blocks: revert them first.")
        return
    for original in filter(None, map(original_of, new)):
        if any(isinstance(companion, ParametrizedWeight) for companion in original.companions):
            assert original.norm is not None
            _refuse(new.values(), f"layers are parametrized by norm {original.norm[0]!r}: revert first.")
            return
    blocks = _find_blocks(root, new)
    inside = {layer for block in blocks for layer in block.module.modules()}
    outside = {layer: decision for layer, decision in new.items() if layer not in inside}
    for block in blocks:
        block.num_blocks = len(blocks)
        mine = [new[layer] for layer in block.module.modules() if layer in new]
        problem = problem_of(block.module, block.parts, family)
        if problem is not None:
            name = block.row.name or "(the module itself)"
            _refuse(mine, f"FixUp cannot change its block {name} ({block.row.from_}): {problem}")
        mine[0].companions.append(block)
    if blocks:
        _add_first(root, outside)
        _add_classifier(root, next(iter(new.values())))
    left = [*outside.values()]
    _refuse(left[1:], f"as {left[0].row.name}" if left else "")
    _refuse(
        left[:1],
        f"FixUp changes the norms of residual blocks that it knows ({known()}; syncbn.register_block adds one) and "
        "the norm behind the first convolution of such a net; leave others out with exclude.",
    )


def _find_blocks(root: nn.Module, new: dict[nn.Module, Decision]) -> list[Block]:
    """Find the known blocks that have a norm to be converted."""
    found = []
    for name, module in root.named_modules():
        parts = parts_of(type(module))
        if parts is not None and any(layer in new for layer in module.modules()):
            row = PlanRow(name, type(module).__name__, FixupBlock.__name__, "replaced, its weights drawn anew")
            found.append(Block(row, module, parts, type(module), 0))
    return found


def _add_first(root: nn.Module, outside: dict[nn.Module, Decision]) -> None:
    """Take the norm that follows the first convolution of the model, unless it is inside of a block."""
    pairs, none = pairwise(root.named_modules()), (("", root), ("", root))
    (name, conv), (_, norm) = next((pair for pair in pairs if isinstance(pair[0][1], _ConvNd)), none)
    if norm in outside and type(conv) in CONVS:
        decision = outside.pop(norm)
        decision.new = ScalarBias(conv.weight)  # type: ignore[arg-type]
        decision.becomes, decision.row = ScalarBias, decision.row._replace(to=ScalarBias.__name__)
        row = PlanRow(name, type(conv).__name__, type(conv).__name__, "its weight drawn anew")
        decision.companions.append(FirstConv(row, conv))


def _add_classifier(root: nn.Module, decision: Decision) -> None:
    """Let the first layer that is converted keep the classifier."""
    linear = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    name, module = linear[-1] if linear else ("", root)
    if type(module) is not nn.Linear:
        found = f"{name}, a {type(module).__name__}" if linear else "none"
        _refuse([decision], f"FixUp expects an nn.Linear as the model's last linear layer, got {found}.")
    row = PlanRow(name, type(module).__name__, FixupLinear.__name__, "replaced, starts at zero")
    decision.companions.append(Classifier(row, module))


def _refuse(decisions: Iterable[Decision], reason: str) -> None:
    for decision in [d for d in decisions if d.action is not Action.REFUSE]:  # the first reason stays
        decision.action, decision.row = Action.REFUSE, decision.row._replace(to=None, reason=reason)
