"""Plain BatchNorm that all-reduces as many numbers as SyncBatchNorm: what waiting for all-reduces costs by itself."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.private import all_reduce_in_graph


class BareBatchNorm(_BatchNorm):
    """Normalize as nn.BatchNorm does, per rank, and all-reduce as many numbers as SyncBatchNorm, where it does.

    2C + 1 float64 numbers before the forward pass and 2C before the backward pass, all zeros, each waited for: what a
    layer takes that blocks on its all-reduces. (SyncBatchNorm on gloo gathers instead, where that is faster.) A graph
    of torch.compile keeps in order only what depends on each other, so there the zeros are made of the first value of
    the input, and added to weight and dy.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Exchange nothing of use, and normalize."""
        if torch.compiler.is_compiling():
            return self._in_graph(input)
        zeros = input.new_zeros(2 * self.num_features + 1, dtype=torch.float64)
        dist.all_reduce(zeros)
        y: Tensor = super().forward(input)
        y.register_hook(lambda _: dist.all_reduce(zeros[:-1]))  # type: ignore[no-untyped-call]
        return y

    def _in_graph(self, input: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum, running = self.momentum or 0.0, (self.running_mean, self.running_var)
        weight = self.weight + _all_reduced_zeros(input.detach(), 2 * self.num_features + 1)[: self.num_features]
        y = torch.nn.functional.batch_norm(input, *running, weight, self.bias, True, momentum, self.eps)
        return _ExchangeBackward.apply(y)  # type: ignore[no-any-return]

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _ExchangeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()  # no kernel more: the compiler fuses it

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        zeros = _all_reduced_zeros(dy, 2 * dy.shape[1])[: dy.shape[1]]
        return dy + zeros.view(1, -1, *[1] * (dy.dim() - 2))


def _all_reduced_zeros(x: Tensor, num_values: int) -> Tensor:
    zeros = (x[(0,) * x.dim()].double() * 0).expand(num_values).clone()
    return all_reduce_in_graph(zeros, dist.group.WORLD).to(x.dtype)
