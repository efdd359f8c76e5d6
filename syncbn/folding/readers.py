"""Watch one forward pass: what reads the outputs of convolutions and linear layers, and which of them feed norms.

`fold` looks for outputs that one norm alone reads, `audit` for biases that the statistics of a batch subtract again.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

LAYERS = (_ConvNd, nn.Linear)
_FACTS = (bool, int, str, tuple, torch.dtype, torch.device, torch.layout)  # what tells of a tensor, but not its values
# Functions that tell of values all the same, by name; and those that look at nothing but a shape.
_READ = {"allclose", "equal", "is_nonzero", "item", "__contains__", "__repr__", "__format__", "__bool__", "__int__"}
_ONLY_SHAPE = {"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty"}


class Read(NamedTuple):
    """One reading of an output: in the forward of which norm, if any; and whether by statistics of the batch."""

    norm: nn.Module | None
    by_batch: bool


@dataclass
class Output:
    """One output of a layer, and what read it."""

    layer: nn.Module
    ref: "weakref.ref[Tensor]"
    has_channels: bool  # in dimension 1, where norms expect them
    reads: list[Read] = field(default_factory=list)


class Readers(TorchFunctionMode):
    """Watch which operators read the outputs of layers, within which norm, and how often any tensor is read."""

    def __init__(self) -> None:
        super().__init__()
        self.is_looking = True
        self.outputs: list[Output] = []
        self.inputs: dict[nn.Module, list[Output | None]] = {}  # of norms, one for each call
        self.num_reads: Counter[int] = Counter()  # by id: to be asked for tensors that live on
        self._by_id: dict[int, Output] = {}  # an id holds while its reference lives, and is used again then
        self._norm: nn.Module | None = None

    def watch(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Watch ``output`` from now on; a forward hook of one of LAYERS."""
        if not isinstance(output, Tensor):
            return
        dims = len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else 2
        seen = self._by_id[id(output)] = Output(layer, weakref.ref(output), output.dim() == dims)
        self.outputs.append(seen)

    def enter(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what ``norm`` reads; a forward pre-hook. An input with a mask beside it is none that can be paired."""
        given = (*args, *kwargs.values())
        self.inputs.setdefault(norm, []).append(self._find(given[0]) if len(given) == 1 else None)
        self._norm = norm

    def leave(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Attribute no more reads to ``norm``; a forward hook."""
        self._norm = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; it has read its arguments, unless it gives a shape, say, or the tensor as it was."""
        kwargs = kwargs or {}
        given = [(tensor, _version(tensor)) for tensor in tensors((args, kwargs))] if self.is_looking else []
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        is_fact = isinstance(result, _FACTS) and not any(True for _ in tensors(result))
        if (is_fact and name not in _READ) or name in _ONLY_SHAPE:
            return result
        by_batch = func is F.batch_norm and bool(kwargs.get("training", args[5] if len(args) > 5 else False))
        for tensor, version in given:
            if result is not tensor or version is None or _version(tensor) != version:
                self.num_reads[id(tensor)] += 1
                seen = self._find(tensor)
                if seen is not None:
                    seen.reads.append(Read(self._norm, by_batch))
        return result

    def _find(self, tensor: Any) -> Output | None:
        seen = self._by_id.get(id(tensor))
        return seen if seen is not None and seen.ref() is tensor else None


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in ``value``: in lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, Mapping):
        yield from tensors([*value.values()])
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, part.name, None) for part in fields(value)])


def _version(tensor: Tensor) -> int | None:
    """Count the writes to ``tensor``; None where nobody does."""
    return None if tensor.is_inference() else tensor._version


def run(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """Run a forward pass without gradients; torch's random state is restored."""
    used = (*tensors(args), *model.parameters(), *model.buffers())
    devices = {tensor.device.index for tensor in used if tensor.is_cuda}
    with torch.random.fork_rng(list(devices)), torch.no_grad():
        return model(*args)


def copy_of(model: nn.Module) -> nn.Module:
    """Copy ``model``, with what deepcopy refuses: process groups (shared) and computed tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, ProcessGroup):
                memo[id(value)] = value
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def copy_of_arguments(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Copy arguments, since a forward may write into them; floating tensors in ``dtype``, if it is given."""
    memo = {id(t): t.detach().clone().to(dtype if dtype and t.is_floating_point() else t.dtype) for t in tensors(args)}
    return copy.deepcopy(args, memo)
