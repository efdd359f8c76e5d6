"""Find redundant biases: a BatchNorm subtracts the mean, so a bias added just before it changes nothing."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode


@dataclass
class _Output:
    """One output of a layer with a bias, and who reads it."""

    bias: Tensor
    ref: "weakref.ref[Tensor]"
    is_normalized: bool = False
    is_read_otherwise: bool = False


class Readers(TorchFunctionMode):
    """Watch which operators read the outputs of layers with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.is_looking = True
        self._outputs: list[_Output] = []
        self._by_id: dict[int, _Output] = {}  # an id holds while its reference lives, and is used again then

    def watch(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        """Watch ``output`` from now on; a forward hook."""
        dims = len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else 2
        bias: Any = layer.bias
        # with other dimensions, the channels that the bias is added to are not those that BatchNorm normalizes
        seen = _Output(bias, weakref.ref(output), is_read_otherwise=output.dim() != dims)
        self._outputs.append(seen)
        self._by_id[id(output)] = seen

    def redundant_biases(self, model: nn.Module) -> dict[str, int]:
        """List the biases whose every output was read by batch normalization alone and kept by nobody, and sizes."""
        needed = {
            id(seen.bias)
            for seen in self._outputs
            if not seen.is_normalized or seen.is_read_otherwise or seen.ref() is not None
        }
        unneeded = {id(seen.bias) for seen in self._outputs} - needed
        return {name: p.numel() for name, p in model.named_parameters() if id(p) in unneeded}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; if it gives a tensor, or writes, it has read its arguments (a shape, say, does not)."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.is_looking and (result is None or any(True for _ in _tensors(result))):
            by_batch = func is F.batch_norm and bool(kwargs.get("training", args[5] if len(args) > 5 else False))
            for tensor in (t for value in (*args, *kwargs.values()) for t in _tensors(value)):
                self._read(tensor, by_batch)
        return result

    def _read(self, tensor: Tensor, by_batch: bool) -> None:
        seen = self._by_id.get(id(tensor))
        if seen is not None and seen.ref() is tensor:
            seen.is_normalized |= by_batch
            seen.is_read_otherwise |= not by_batch


def _tensors(value: Any) -> Iterator[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return (v for v in values if isinstance(v, Tensor))
