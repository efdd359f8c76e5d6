"""The order check: which rank is at which layer, before an exchange that would hang.

Every exchange must be met by all ranks of its group. A rank that takes another branch, leaves a layer out or raises in
its own forward leaves the others waiting, without a word which layer it was. With the check on, each rank first
writes a row of 256 bytes to the process group's store (layer, direction, channels, dtype, whether the input needs a
gradient, how many numbers, eps and momentum; under the group and the number of the call) and reads those of the
others: one write and one read per exchange, and a deletion in the background. It needs nothing of the backend, and
DDP's collectives may be under way.

- A difference raises `OrderError` on every rank of the group: rank by rank the layer, and what differs.
- Where a rank does not come in time the others raise `OrderError`: the missing ranks, and what each did last, a
  forward in eval mode included. Who comes later raises too.

Turn it on for a process with ``SYNCBN_CHECK_ORDER=1`` (and ``SYNCBN_CHECK_ORDER_TIMEOUT=seconds``), or for a part with
`check_order`, on all ranks alike. The time-out is 300 s, and at most 0.8 of the group's own, so that the check speaks
before the backend does. After an error the ranks may be out of step: end the job.

Cost, measured on two gloo ranks on two cores shared with other work, medians of runs with and without in turn: an
exchange of 64 channels takes 3.0 ms instead of 1.8 ms with a TCPStore on the loopback, and 13 ms instead of 1.7 ms
with a FileStore, which is read every 10 ms; a step of ResNet-18 (40 exchanges, 4 images of 64 x 64 per rank) 0.66 s
instead of 0.67 s, and 0.93 s instead of 0.35 s. Off it is a comparison with None.

With the check off, an exception that an exchange raises in Python (the connection closed, the time-out) is raised
again, as the same class, with the layer, rank and direction. Not all comes so far. On gloo (torch 2.14), buffers of
two sizes end the process that receives more than it expects: SIGABRT, "Received data size doesn't match expected
size"; its peers get "Connection reset by peer" in Python, or, where all_reduce sums, a wrong sum first. Two layers of
one size in another order exchange without complaint, and their statistics are wrong.
``TORCH_DISTRIBUTED_DEBUG=DETAIL`` makes different sizes a RuntimeError on all ranks, with the shapes and no layer;
layers of one size it does not tell apart either.

Not checked: exchanges inside a graph of torch.compile (compile on all ranks or on none; a rank that falls back to
eager alone waits until the time-out); the making of process groups; the third order. Where two models name their
layers alike, a rank that begins with the other model is found one exchange later, when it has met both.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..collectives.board import GAVE_UP, BoardError, Meeting, current_board, is_initialized, rank_in_world, ranks_of
from ..private import timeout_of
from .names import Owner, name_for_exchange, name_of
from .signature import Signature, differences, listed, ranks, table, unpack

_DEFAULT_TIMEOUT = 300.0


class OrderError(RuntimeError):
    """The ranks of a group are not at the same exchange."""


class _Check:
    """The check while it is on."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout

    def timeout_in(self, group: ProcessGroup) -> float:
        if self.timeout is not None:
            return self.timeout
        limit = timeout_of(group)
        return _DEFAULT_TIMEOUT if limit is None else min(_DEFAULT_TIMEOUT, 0.8 * limit.total_seconds())


@contextmanager
def check_order(timeout: float | None = None) -> Iterator[None]:
    """Check every exchange within, in all threads of this process; all ranks must do so.

    Backward passes are checked whose forward was. The collectives: none; see the module for what the store does.

    Args:
        timeout: Seconds to wait for the other ranks; None for ``SYNCBN_CHECK_ORDER_TIMEOUT`` or the default.

    Raises:
        ValueError: If ``timeout`` is not positive.
        OrderError: From the layers within, see the module.
    """
    global _check
    if timeout is not None and not timeout > 0:
        raise ValueError(f"check_order: expected a timeout of more than 0 seconds, got {timeout!r}.")
    before, _check = _check, _Check(_read_timeout() if timeout is None else timeout)
    try:
        yield
    finally:
        _check = before


def is_on() -> bool:
    """Whether exchanges are to be announced: the check is on, and this is no graph."""
    return _check is not None and not torch.compiler.is_compiling()


def announce(
    direction: str,
    owners: Sequence[Owner],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    num_numbers: int,
    group: ProcessGroup,
    settings: Sequence[tuple[float, float | Tensor | None]] = (),
) -> None:
    """Compare with the other ranks what is about to be exchanged, if the check is on.

    Args:
        direction: Such as "forward".
        owners: The layers that share the exchange.
        inputs: The input of each, if they have any.
        needs: Whether there will be a gradient of each input.
        num_numbers: What the exchange sums.
        group: The ranks that take part.
        settings: eps and momentum of each layer, if they matter.

    Raises:
        OrderError: On every rank of the group, if they differ; on those that are here, if one does not come in time,
            or if the store is gone.
    """
    if _check is None:
        return
    named = [name_for_exchange(owner) for owner in owners]
    channels, dtype = listed(x.shape[1] for x in inputs), listed(str(x.dtype).removeprefix("torch.") for x in inputs)
    gradient = listed("input needs gradient" if need else "no input gradient" for need in needs)
    words = listed(f"eps {eps:g}, momentum {_momentum(momentum)}" for eps, momentum in settings)
    when, names = "+".join([str(number) for _, number in named]), [name for name, _ in named]
    facts = direction, channels, dtype, gradient, str(num_numbers), words, when, str(len(names))
    mine = Signature(*facts, tuple(names))
    timeout = _check.timeout_in(group)
    try:
        board = current_board()
        call = board.next_call(group)
        where = f"call {call} of group {group.group_name} ({ranks(ranks_of(group))})"
        meeting = board.meet(group, call, mine.pack(), f"{mine}, {where}", timeout)
    except BoardError as error:
        raise _gone(f"before {mine}", error) from error
    found = _complaint(meeting, mine, where, timeout)
    if found is not None:
        raise OrderError(f"syncbn: {found}\nThis is rank {rank_in_world()}.")


def _complaint(meeting: Meeting, mine: Signature, where: str, timeout: float) -> str | None:
    """Say what is wrong at a meeting, None if nothing is."""
    if meeting.places:
        last = {rank: f"last {place}" if place else _NEVER for rank, place in meeting.places.items()}
        return f"{ranks(last)} did not come within {timeout:g} s to {mine}, {where}:\n{table(last)}"
    rows = meeting.rows
    if len(set(rows.values())) == 1:
        return None
    gone = [rank for rank, row in rows.items() if row == GAVE_UP]
    if gone:
        return f"{ranks(gone)} waited too long and gave up; too late at {mine}, {where}."
    signatures = {rank: unpack(row) for rank, row in rows.items()}
    different = differences(list(signatures.values()))
    if not different:
        return None
    lines = table({rank: s.told_to([*signatures.values()]) for rank, s in signatures.items()})
    return f"the ranks are not at the same exchange, {where}; they differ in {', '.join(different)}:\n{lines}"


def _momentum(momentum: float | Tensor | None) -> str:
    return f"{momentum:g}" if isinstance(momentum, float | int) else "None"


def pass_by(owner: nn.Module) -> None:
    """Tell the other ranks that this one runs a layer without an exchange, in eval mode; nobody waits."""
    if is_initialized():
        try:
            current_board().note(f"{name_of(owner)}, forward in eval mode")
        except BoardError as error:
            raise _gone(f"at {name_of(owner)} in eval mode", error) from error


def keep(owner: nn.Module | None) -> Owner:
    """Return what a backward pass keeps of a layer: its name if the check is on, else only a weak reference."""
    return owner if owner is None else name_of(owner) if _check is not None else weakref.ref(owner)


def watch(summed: Tensor, *exchange: Any) -> Tensor:
    """Announce the exchange that the gradient of ``summed`` is, with the arguments of `announce`, when it comes."""
    result: Tensor = _Watch.apply(summed, exchange)
    return result


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summed: Tensor, exchange: tuple[Any, ...]) -> Tensor:
        ctx.exchange = exchange
        return summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        announce(*ctx.exchange)
        return grad, None


def explain(error: Exception, direction: str, owners: Sequence[Owner]) -> Exception:
    """Return an error of the class of ``error``, which an exchange raised, that says where and what to do."""
    text = f"{error}\n{where(direction, owners)}"
    try:
        return type(error)(text)
    except Exception:  # its class wants something else
        return RuntimeError(text)


def where(direction: str, owners: Sequence[Owner]) -> str:
    """Say where an exchange failed, and what to do."""
    layers = ", ".join(name_of(owner) for owner in owners)
    text = f"syncbn: raised in the exchange of {layers}, {direction}, on rank {rank_in_world()}. "
    if _check is None:
        return text + "Where the others were, SYNCBN_CHECK_ORDER=1 shows in the next run (see syncbn.debug)."
    return text + "The order check found all ranks here: one has ended since, or the network between them has."


def _gone(where: str, error: BoardError) -> OrderError:
    return OrderError(
        f"syncbn: the order check {where} on rank {rank_in_world()} cannot use the process group's store: {error}. "
        "The process that keeps it (torchrun's agent, or rank 0) may have ended, or stand still."
    )


def _read_timeout() -> float | None:
    text = os.environ.get("SYNCBN_CHECK_ORDER_TIMEOUT", "")
    try:
        seconds = float(text) if text else None
    except ValueError:
        seconds = 0.0
    if seconds is not None and not seconds > 0:
        raise ValueError(f"SYNCBN_CHECK_ORDER_TIMEOUT: expected seconds, more than 0, got {text!r}.")
    return seconds


def _read_switch() -> _Check | None:
    text = os.environ.get("SYNCBN_CHECK_ORDER", "")
    if text not in ("", "0", "1"):
        raise ValueError(f"SYNCBN_CHECK_ORDER: expected 1 (on) or 0 (off), got {text!r}.")
    return _Check(_read_timeout()) if text == "1" else None


_NEVER = "has not turned the check on, or has not come to any SyncBatchNorm"
_check = _read_switch()
