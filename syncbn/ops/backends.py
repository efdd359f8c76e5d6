"""The back ends of a training step, and which of them serves what.

A back end implements four phases, none of which communicates: `reference` says what each computes, and runs anywhere
and under torch.compile; `cpu` is C++, built on first use; `triton` is for CUDA and ROCm; `cuda` are torch's own
operators for CUDA. Any of them can go on from what another computed. ``SYNCBN_KERNELS`` chooses: ``auto`` is the
quickest that works here; ``cpu`` and ``triton`` are the same, with a warning where C++ or Triton cannot be had.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..private import are_transforms_active
from . import cpu, cuda, reference, triton

_ALL = (cpu, triton, cuda)  # the first that serves an input is taken
_BACK_ENDS = {"auto": _ALL, "reference": (), "cpu": _ALL, "triton": (triton, cpu, cuda), "cuda": (cuda, cpu)}
CHOICES = tuple(_BACK_ENDS)
_MAX_KINDS = 4096  # kinds of input that are kept
Kernels = Any  # forward_reduce, forward_apply, backward_reduce, backward_apply: see `reference`


def _check(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"SYNCBN_KERNELS: expected one of {', '.join(CHOICES)}, got {name!r}.")
    return name


_chosen = _check(os.environ.get("SYNCBN_KERNELS") or "auto")


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Choose the kernels of all layers inside the context, as ``SYNCBN_KERNELS`` does for the whole process.

    ``name`` is one of "auto", "reference", "cpu", "triton" and "cuda"; a ValueError for any other.
    """
    global _chosen, kernels_of
    before = _chosen, kernels_of
    _chosen = _check(name)
    kernels_of = _kernels_by_choice[_chosen]
    try:
        yield
    finally:
        _chosen, kernels_of = before


_kernels_by_choice: dict[str, dict[object, Kernels]] = {choice: {} for choice in CHOICES}
kernels_of = _kernels_by_choice[_chosen]  # by the kind of input: see `autograd`


def choose(x: Tensor, *per_channel: Tensor | None) -> Kernels:
    """Choose the kernels for ``x`` and its weight, bias, running_mean and running_var."""
    if not torch.compiler.is_compiling() and not are_transforms_active():
        for module in _BACK_ENDS[_chosen]:
            kernels: Kernels = module.kernels_for(x, *per_channel, quietly=not module.__name__.endswith(_chosen))
            if kernels is not None:
                return kernels
    return reference


def remember(table: dict[object, Kernels], kind: object, kernels: Kernels) -> None:
    """Keep the kernels for a kind of input; not those of another choice, or chosen while a CUDA graph is captured."""
    if len(table) >= _MAX_KINDS:
        table.clear()
    if table is kernels_of and not cuda.is_capturing():
        table[kind] = kernels
