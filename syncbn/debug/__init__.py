"""The order check: which rank is at which layer, before an exchange that would hang.

With it on, ranks write to the process group's store what each is about to exchange, and compare it before they do. A
difference raises `OrderError` on every rank of the group: rank by rank the layer, and what differs. Where a rank does
not come in time the others raise it, with what the missing ones did last.

Turn it on for a process with ``SYNCBN_CHECK_ORDER=1`` (and ``SYNCBN_CHECK_ORDER_TIMEOUT=seconds``), or for a part with
`check_order`, on all ranks alike. docs/faults.md says what it costs, and what it does not see.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..distributed.exchange import observe
from ..distributed.groups import current_world, rank_in_world, ranks_of
from ..nn.batchnorm import name_layers
from ..private import note_of, timeout_of
from .signature import Signature, differences, ranks, table, unpack
from .store import GAVE_UP, Rendezvous, StoreError, current_store

_DEFAULT_TIMEOUT = 300.0
_NEVER = "has not turned the check on, or has not come to any SyncBatchNorm"


class OrderError(RuntimeError):
    """The ranks of a group are not at the same exchange."""


@contextmanager
def check_order(model: nn.Module | float | None = None, timeout: float | None = None) -> Iterator[None]:
    """Check every exchange within, in all threads of this process; all ranks must do so.

    After an error the ranks may be out of step: end the job. Collectives: none; one write and one read of the process
    group's store for each exchange.

    Args:
        model: Names the layers in messages, "path (class of the model)"; without it they have the names of the model
            that was converted, or of the one in DDP. Several models at once, as of a GAN: an ``nn.ModuleDict``. A
            number is taken as ``timeout``.
        timeout: Seconds to wait for the other ranks; None for ``SYNCBN_CHECK_ORDER_TIMEOUT``, else for 300, and at
            most 0.8 of the group's own time-out, so that the check speaks before the backend does.

    Raises:
        ValueError: If ``timeout`` is not positive.
        OrderError: From the layers within, see the module.
    """
    if isinstance(model, int | float):
        model, timeout = None, model
    if timeout is not None and not timeout > 0:
        raise ValueError(f"check_order: expected a timeout of more than 0 seconds, got {timeout!r}.")
    if model is not None:
        name_layers(model)
    before = observe(_OrderCheck(_read_timeout() if timeout is None else timeout))
    try:
        yield
    finally:
        observe(before)


class _OrderCheck:
    """The observer of all exchanges, while the check is on."""

    hint = "The order check found all ranks here: one has ended since, or the network between them has."

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout

    def timeout_in(self, group: ProcessGroup) -> float:
        """Return the seconds to wait for the other ranks of ``group``."""
        if self.timeout is not None:
            return self.timeout
        limit = timeout_of(group)
        return _DEFAULT_TIMEOUT if limit is None else min(_DEFAULT_TIMEOUT, 0.8 * limit.total_seconds())

    def before_exchange(
        self, group: ProcessGroup, num_numbers: int, name: str, direction: str, facts: tuple[Any, ...]
    ) -> None:
        """Compare with the other ranks what is about to be exchanged.

        Raises:
            OrderError: On every rank of the group, if they differ; on those that are here, if one does not come in
                time, or if the store is gone.
        """
        mine, timeout = _signature(num_numbers, name, direction, *facts), self.timeout_in(group)
        try:
            store = current_store()
            call = store.next_call(group)
            which = ", ".join(filter(None, (note_of(group), ranks(ranks_of(group)))))
            where = f"call {call} of group {group.group_name} ({which})"
            met = store.meet(group, call, mine.pack(), f"{mine}, {where}", timeout)
        except StoreError as error:
            raise _gone(f"before {mine}", error) from error
        found = _complaint(met, mine, where, timeout)
        if found is not None:
            raise OrderError(f"syncbn: {found}\nThis is rank {rank_in_world()}.")

    def note_eval(self, name: str) -> None:
        """Report to the other ranks, without waiting, that this one runs a layer in eval mode."""
        if current_world() is not None:
            try:
                current_store().note(f"{name}, forward in eval mode")
            except StoreError as error:
                raise _gone(f"at {name} in eval mode", error) from error


def _signature(
    num_numbers: int,
    name: str,
    direction: str,
    x: Tensor | None = None,
    needs_gradient: bool | None = None,
    eps: float | None = None,
    momentum: float | Tensor | None = None,
) -> Signature:
    channels, dtype = ("", "") if x is None else (str(x.shape[1]), str(x.dtype).removeprefix("torch."))
    gradient = settings = ""
    if needs_gradient is not None:
        gradient = "input needs gradient" if needs_gradient else "no input gradient"
        part = f"{momentum:g}" if isinstance(momentum, float | int) else "None"
        settings = f"eps {eps:g}, momentum {part}"
    return Signature(direction, channels, dtype, gradient, str(num_numbers), settings, name)


def _complaint(met: Rendezvous, mine: Signature, where: str, timeout: float) -> str | None:
    """Say what is wrong where ranks met, None if nothing is."""
    if met.last:
        last = {rank: f"last {done}" if done else _NEVER for rank, done in met.last.items()}
        return f"{ranks(last)} did not come within {timeout:g} s to {mine}, {where}:\n{table(last)}"
    if len(set(met.rows.values())) == 1:
        return None
    gone = [rank for rank, row in met.rows.items() if row == GAVE_UP]
    if gone:
        return f"{ranks(gone)} waited too long and gave up; too late at {mine}, {where}."
    signatures = {rank: unpack(row) for rank, row in met.rows.items()}
    all_of_them = list(signatures.values())
    different = differences(all_of_them)
    if not different:
        return None
    lines = table({rank: s.beside(all_of_them) for rank, s in signatures.items()})
    return f"the ranks are not at the same exchange, {where}; they differ in {', '.join(different)}:\n{lines}"


def _gone(where: str, error: StoreError) -> OrderError:
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


def _read_switch() -> _OrderCheck | None:
    text = os.environ.get("SYNCBN_CHECK_ORDER", "")
    if text not in ("", "0", "1"):
        raise ValueError(f"SYNCBN_CHECK_ORDER: expected 1 (on) or 0 (off), got {text!r}.")
    return _OrderCheck(_read_timeout()) if text == "1" else None


observe(_read_switch())
