"""Recognize the second forward pass of activation checkpointing (torch.utils.checkpoint, both variants).

The recomputation must not update running statistics again; the non-reentrant variant need not repeat the exchange
either, since the checkpointed region can keep its first results. Both answers come from private parts of torch, each
with a safe fall-back: without the first a recomputation counts as a forward pass, without the second it repeats the
exchange.
"""

import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..private import running_backward, top_saved_tensors_hooks


@dataclass
class _Tape:
    """Sums of the layers called in one checkpointed region, in order; any number of recomputations read them."""

    sums: list[Tensor] = field(default_factory=list)
    position: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))  # by backward pass


_tapes: weakref.WeakKeyDictionary[Any, _Tape] = weakref.WeakKeyDictionary()


def is_recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, and so repeats an earlier one.

    A first forward pass that a backward hook starts looks the same, and updates no statistics either.
    """
    return bool(running_backward() != -1)


def replay() -> Tensor | None:
    """Return the next sums of the first pass, if this is a recomputation of a non-reentrant checkpoint."""
    frame, is_first_pass = _checkpoint_frame()
    tape = None if frame is None or is_first_pass else _tapes.get(frame)
    if tape is None:
        return None
    backward_pass = int(running_backward())
    position = tape.position[backward_pass]
    tape.position[backward_pass] += 1
    return tape.sums[position] if position < len(tape.sums) else None


def record(summed: Tensor) -> None:
    """Keep ``summed`` for the recomputations, if this is the first pass of a non-reentrant checkpoint."""
    frame, is_first_pass = _checkpoint_frame()
    if frame is not None and is_first_pass:
        _tapes.setdefault(frame, _Tape()).sums.append(summed)


def _checkpoint_frame() -> tuple[Any, bool]:
    """Find the innermost non-reentrant checkpoint, and whether this is its first pass; (None, False) if there is none.

    It stands in the closure of the hook that packs saved tensors: as ``frame`` in the first pass, as a weak reference
    ``target_frame_ref`` in a recomputation.
    """
    hooks = top_saved_tensors_hooks(True)
    pack: Any = getattr(hooks[0], "__wrapped__", hooks[0]) if hooks else None
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None, False
    names = pack.__code__.co_freevars
    cells = dict(zip(names, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
    if "frame" in cells:
        return cells["frame"], True
    reference = cells.get("target_frame_ref")
    return (reference() if reference is not None else None), False
