"""Launch the kernels: each is compiled once for a kind of input, kept, and called without Triton's own look-up."""

import struct
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...private import disable_modes
from ..reference import Running
from . import kernels
from .tiles import Tile

_Maybe = Tensor | None
_Dtype = torch.dtype | None
# Without maxnreg ptxas spills some bytes, for more programs at a time; Triton 3.9 warns where fusion is not said.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True} | ({} if torch.version.hip else {"maxnreg": 128})
_CAPTURING = "SyncBatchNorm: expected some steps of the same kind before a CUDA graph is captured: {} is not compiled."
IS_INTERPRETED = not isinstance(kernels.forward_reduce, triton.JITFunction)  # TRITON_INTERPRET=1
_workspaces: dict[object, tuple[Tensor, Tensor]] = {}  # by device and stream


class TritonKernels:
    """The four phases for inputs of one shape, layout and dtype; `reference` says what each computes."""

    def __init__(self, tile: Tile, view: tuple[int, int, int], splits: tuple[int, int], x: Tensor) -> None:
        (outer, channels, inner), vector = view, tile.vector
        self.sizes = (outer, channels // vector, 1) if tile.width == 1 else (outer, channels, inner // vector)
        self.constants = *tile, tl.float64 if x.dtype == torch.float64 else tl.float32
        self.channels, self.blocks, self.splits = channels, -(-channels // tile.block), splits
        self.device, self.index = x.device, x.device.index or 0
        self.packed = torch.empty(2 * channels + 1, dtype=torch.float64, device=x.device)
        self.no_counters = torch.empty(1, dtype=torch.int32, device=x.device)
        self.ready: dict[object, Callable[..., object]] = {}  # by kernel, variant and stream
        self.compiled: set[object] = set()
        driver = None if IS_INTERPRETED else triton.runtime.driver.active
        self.current_device: Callable[[], int] = int if driver is None else driver.get_current_device
        self.current_stream: Callable[[int], int] = int if driver is None else driver.get_current_stream
        self.is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing if x.is_cuda else bool

    def forward_reduce(self, x: Tensor, num_batches_tracked: _Maybe = None) -> Tensor:
        packed, counted = torch.empty_like(self.packed), num_batches_tracked
        variant = x.data_ptr() % 16, counted if counted is None else counted.dtype
        self._launch("forward_reduce", variant, x, packed, counted)
        return packed

    def forward_apply(
        self, x: Tensor, summed: Tensor, weight: _Maybe, bias: _Maybe, running: Running, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, statistics, (mean, var, counted, momentum) = torch.empty_like(x), torch.empty_like(self.packed), running
        if mean is None or var is None:
            mean = var = counted = momentum = None
        else:
            torch.autograd.graph.increment_version((mean, var))
        counted = counted if momentum is None else None
        tensor, share = None, (0.0, 0.0)
        if isinstance(momentum, Tensor) and momentum.device == self.device:
            tensor = momentum.double()
        elif momentum is not None:
            share = halves(float(momentum))  # a tensor on the CPU
        variant = x.data_ptr() % 16, mean is None, counted if counted is None else counted.dtype, tensor is None
        given = x, y, summed, statistics, weight, bias, mean, var, counted, tensor
        self._launch("forward_apply", variant, *given, *share, *halves(eps))
        return y, statistics

    def backward_reduce(
        self, dy: Tensor, x: Tensor, statistics: Tensor, weight_dtype: _Dtype, bias_dtype: _Dtype
    ) -> tuple[Tensor, _Maybe, _Maybe]:
        packed, new = self.packed.new_empty(2 * self.channels), self.packed.new_empty
        grad_weight = None if weight_dtype is None else new(self.channels, dtype=weight_dtype)
        grad_bias = None if bias_dtype is None else new(self.channels, dtype=bias_dtype)
        variant = (x.data_ptr() | dy.data_ptr()) % 16, weight_dtype, bias_dtype
        self._launch("backward_reduce", variant, x, dy, statistics, packed, grad_weight, grad_bias)
        return packed, grad_weight, grad_bias

    def backward_apply(self, dy: Tensor, x: Tensor, statistics: Tensor, weight: _Maybe, summed: Tensor) -> Tensor:
        dx, variant = torch.empty_like(x), (x.data_ptr() | dy.data_ptr()) % 16
        self._launch("backward_apply", variant, x, dy, dx, statistics, weight, summed)
        return dx

    def _launch(self, name: str, variant: object, *arguments: object) -> None:
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                self._launch(name, variant, *arguments)
            return
        stream, is_capturing = self.current_stream(self.index), self.is_capturing()
        launch = None if is_capturing else self.ready.get((name, variant, stream))
        if launch is None:
            launch = self._prepare(name, variant, stream, is_capturing, arguments)
        launch(*arguments)

    def _prepare(
        self, name: str, variant: object, stream: int, is_capturing: bool, arguments: tuple[object, ...]
    ) -> Callable[..., object]:
        """Compile a kernel unless it is compiled, and return it as a function of ``arguments``."""
        kernel, adds_up = getattr(kernels, name), name.endswith("reduce")
        constants, grid = self.constants, (self.blocks, self.splits[not adds_up], 1)
        fixed = *self.sizes, grid[1], *(self._workspace(stream, is_capturing) if adds_up else ())
        launch: Callable[..., object] = partial(kernel[grid], *constants, *fixed, **_OPTIONS)  # Triton's public way
        if is_capturing and (name, variant) not in self.compiled:
            raise RuntimeError(_CAPTURING.format(name))
        if IS_INTERPRETED:
            launch = disable_modes()(launch)  # the interpreter's own operators are not those of a step
        else:
            compiled = kernel.warmup(*constants, *fixed, *arguments, grid=grid, **_OPTIONS)
            with suppress(AttributeError):  # private names of Triton, without which each launch takes longer
                has_constants = len(compiled.src.signature) > len(fixed) + len(arguments)  # not in Triton 3.2
                given = (*constants, *fixed) if has_constants else fixed
                run = compiled.run  # loads it, so there is no function before
                launch = partial(run, *grid, stream, compiled.function, compiled.packed_metadata, *[None] * 3, *given)
        self.compiled.add((name, variant))
        if not is_capturing:
            self.ready[name, variant, stream] = launch
        return launch

    def _workspace(self, stream: int, is_capturing: bool) -> tuple[Tensor, Tensor]:
        """Return memory for sums, and counters, which are 0 between launches: one pair for each stream."""
        if self.splits[0] == 1:
            return self.packed, self.no_counters
        size, key = 2 * self.channels * self.splits[0], (self.device, stream)
        found = None if is_capturing else _workspaces.get(key)
        if found is None or len(found[0]) < size or len(found[1]) < self.blocks:
            counters = self.packed.new_zeros(max(self.blocks, 2**12), dtype=torch.int32)
            found = self.packed.new_empty(max(size, 2**16)), counters
            if not is_capturing:  # a graph has its own for each launch: it may be replayed on any stream
                _workspaces[key] = found
        return found


@lru_cache(1024)
def halves(value: float) -> tuple[float, float]:
    """Return two float32 numbers that add up to ``value``."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high
