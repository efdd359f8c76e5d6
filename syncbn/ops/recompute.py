"""Recognize the second forward pass of activation checkpointing (torch.utils.checkpoint, both variants).

The recomputation must not update running statistics again; the non-reentrant variant need not repeat the exchange
either, since the checkpointed region can keep its first results.
"""

import weakref
from collections import defaultdict
from typing import Any

from torch import Tensor

from ..private import checkpoint_frame, running_backward

# By checkpoint: sums of the layers called in it, in order, and how many each backward pass has read.
_tapes: weakref.WeakKeyDictionary[Any, tuple[list[Tensor], defaultdict[int, int]]] = weakref.WeakKeyDictionary()


def replay() -> Tensor | None:
    """Return the next sums of the first pass, if this is a recomputation of a non-reentrant checkpoint."""
    frame, is_first_pass = checkpoint_frame()
    tape = None if frame is None or is_first_pass else _tapes.get(frame)
    if tape is None:
        return None
    (sums, num_read), backward_pass = tape, int(running_backward())
    num_read[backward_pass] += 1
    return sums[num_read[backward_pass] - 1] if num_read[backward_pass] <= len(sums) else None


def record(summed: Tensor) -> None:
    """Keep ``summed`` for the recomputations, if this is the first pass of a non-reentrant checkpoint."""
    frame, is_first_pass = checkpoint_frame()
    if frame is not None and is_first_pass:
        _tapes.setdefault(frame, ([], defaultdict(int)))[0].append(summed)
