"""The four per-device primitives behind one interface; none of them communicates.

``local_sums`` and ``normalize`` make the forward pass, ``backward_sums`` and ``input_gradient`` the backward pass.
`reference` serves every device and torch.compile. `fused` is C++ for the CPU, built on first use; `native` are torch's
own fused operators for the CPU, where there is no compiler; `cuda` those for CUDA. Any of them can go on from what
another computed. `ghost` stands beside them: it is what GhostBatchNorm computes.

``SYNCBN_KERNELS`` chooses: ``auto`` is the quickest that works here, ``fused`` the same with a warning where nothing
can be built, ``native`` builds nothing, ``reference`` is reference.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..private import are_transforms_active
from . import cuda, fused, native, reference
from .reference import sum_dtype as sum_dtype

CHOICES = ("auto", "reference", "native", "fused")


class Kernels(Protocol):
    """What an implementation offers; `reference` says what each computes."""

    def local_sums(self, x: Tensor) -> Tensor: ...

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor: ...

    def backward_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]: ...

    def input_gradient(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
    ) -> Tensor: ...


def _check(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"SYNCBN_KERNELS: expected one of {', '.join(CHOICES)}, got {name!r}.")
    return name


_chosen = _check(os.environ.get("SYNCBN_KERNELS") or "auto")


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Choose the kernels of all layers inside the context, as ``SYNCBN_KERNELS`` does for the whole process.

    Args:
        name: "auto", "reference", "native" or "fused".

    Raises:
        ValueError: For any other name.
    """
    global _chosen
    before, _chosen = _chosen, _check(name)
    try:
        yield
    finally:
        _chosen = before


def choice() -> str:
    """Return the name that is in force."""
    return _chosen


def choose(x: Tensor) -> Kernels:
    """Choose the implementation for ``x``; any of them can go on from what another computed."""
    if _chosen == "reference" or torch.compiler.is_compiling() or are_transforms_active():
        return reference
    if _chosen != "native" and fused.supports(x, quietly=_chosen == "auto"):
        return fused
    for kernels in (native, cuda):
        if kernels.supports(x):
            return kernels
    return reference
