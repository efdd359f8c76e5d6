"""Recognize the second forward pass of activation checkpointing (torch.utils.checkpoint, both variants).

The recomputation must not update running statistics again; the non-reentrant variant need not repeat the exchange
either, since the checkpointed region can keep its first results. (See private.py for a torch that lacks the names.)
"""

import weakref
from collections import defaultdict
from typing import Any

from torch import Tensor

from ..private import running_backward, top_saved_tensors_hooks

# By checkpoint: sums of the layers called in it, in order, and how many each backward pass has read.
_tapes: weakref.WeakKeyDictionary[Any, tuple[list[Tensor], defaultdict[int, int]]] = weakref.WeakKeyDictionary()


def replay() -> Tensor | None:
    """Return the next sums of the first pass, if this is a recomputation of a non-reentrant checkpoint."""
    frame, is_first_pass = _checkpoint_frame()
    tape = None if frame is None or is_first_pass else _tapes.get(frame)
    if tape is None:
        return None
    (sums, num_read), backward_pass = tape, int(running_backward())
    num_read[backward_pass] += 1
    return sums[num_read[backward_pass] - 1] if num_read[backward_pass] <= len(sums) else None


def record(summed: Tensor) -> None:
    """Keep ``summed`` for the recomputations, if this is the first pass of a non-reentrant checkpoint."""
    frame, is_first_pass = _checkpoint_frame()
    if frame is not None and is_first_pass:
        _tapes.setdefault(frame, ([], defaultdict(int)))[0].append(summed)


def _checkpoint_frame() -> tuple[Any, bool]:
    """Find the innermost non-reentrant checkpoint, and whether this is its first pass; (None, False) if there is none.

    It is in the closure of the hook that packs saved tensors: ``frame``, or ``target_frame_ref`` in a recomputation.
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
