"""FixUp: residual nets without normalization, by their initialization and a few scalars.

Zhang, Dauphin & Ma 2019, "Fixup Initialization: Residual Learning Without Normalization", arXiv 1901.09321, section 3.
For L residual branches of m convolutions each: the last convolution of a branch and the classifier start at zero; the
others as He et al. 2015 draw them, inside branches times ``L ** (-1 / (2 * m - 2))``; a scalar bias (0) stands before
each convolution, linear layer and activation, and a scalar multiplier (1) at the end of each branch.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .affine import tensor_of

_SCALAR = re.compile(r"bias\d+[ab]?|scale")


class BlockParts(NamedTuple):
    """The names of a residual block's parts: convolutions in order, the norm behind each, the shortcut's module."""

    convs: Sequence[str]
    norms: Sequence[str]
    shortcut: str | None


class NoNorm(nn.Identity):
    """Stand where ``layer`` was: the identity. A buffer without elements, not saved, follows device and dtype."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        like = tensor_of(layer)
        self.register_buffer("like", torch.empty(0, device=like.device, dtype=like.dtype), persistent=False)


class ScalarBias(nn.Module):
    """Add a number, in place of the norm behind the first convolution: ``y = x + bias1``, made like ``like``."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.bias1 = _scalar(0.0, like)

    def forward(self, input: Tensor) -> Tensor:
        """Shift ``input``; see the class."""
        return input + self.bias1.to(input.dtype)


class FixupLinear(nn.Linear):
    """The classifier: ``y = (x + bias2) @ weight.T + bias``, weight and bias zero at the start."""

    bias2: nn.Parameter

    @classmethod
    def adopt(cls, linear: nn.Linear) -> None:
        """Make ``linear`` one, in place."""
        linear.__class__ = cls
        linear.register_parameter("bias2", _scalar(0.0, linear.weight))
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)

    def release(self) -> None:
        """Make it an nn.Linear again."""
        del self._parameters["bias2"]
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """Classify ``input``; see the class."""
        return F.linear(input + self.bias2.to(input.dtype), self.weight, self.bias)


class FixupBlock(nn.Module):
    """A residual block of m convolutions; what a known block becomes (section 3, figure 1 on the right).

    With ``a = x + bias1a`` and ``h = conv1(a) + bias1b``, then ``h = conv(relu(h) + bias_ia) + bias_ib`` for the
    further convolutions, where the last has ``* scale`` before its bias; ``y = relu(h + shortcut(a))``, or ``+ x``
    where the block has no shortcut module. Shapes are the block's: ``(N, C, *)`` in, ``(N, C', *')`` out. Nothing is
    exchanged. A module in the norms' place is called; conversion puts `NoNorm` there.
    """

    _parts: BlockParts

    @classmethod
    def adopt(cls, block: nn.Module, parts: BlockParts, num_blocks: int) -> None:
        """Make ``block`` one in place, and draw its weights from torch's global generator for L = ``num_blocks``."""
        block.__class__ = cls
        block.__dict__["_parts"] = parts
        *inner, last = [block.get_submodule(name) for name in parts.convs]
        for name in scalar_names(len(parts.convs)):
            block.register_parameter(name, _scalar(float(name == "scale"), last.get_parameter("weight")))
        for conv in inner:
            draw(conv, num_blocks ** (-0.5 / len(inner)))
        draw(last, 0.0)  # zero
        shortcut = None if parts.shortcut is None else block._modules.get(parts.shortcut)
        for module in [] if shortcut is None else shortcut.modules():
            if isinstance(module, _ConvNd):
                draw(module)

    def release(self, written: type[nn.Module]) -> None:
        """Make it the class that it was written as; weights stay as trained."""
        for name in scalar_names(len(self._parts.convs)):
            del self._parameters[name]
        del self.__dict__["_parts"]
        self.__class__ = written  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut; see the class."""
        convs, norms, shortcut_name = self._parts
        a = y = self._shift(x, "bias1a")
        for i, conv in enumerate(convs, 1):
            if i > 1:
                y = self._shift(F.relu(y), f"bias{i}a")
            y = getattr(self, norms[i - 1])(getattr(self, conv)(y))
            if i == len(convs):
                y = y * self.scale.to(y.dtype)
            y = self._shift(y, f"bias{i}b")
        shortcut = None if shortcut_name is None else getattr(self, shortcut_name, None)
        return F.relu(y + (x if shortcut is None or isinstance(shortcut, nn.Identity) else shortcut(a)))

    def _shift(self, x: Tensor, name: str) -> Tensor:
        bias: Tensor = getattr(self, name)
        return x + bias.to(x.dtype)  # a scalar of one dimension would promote a half


def scalar_names(num_convs: int) -> list[str]:
    """Name the scalars of a block as the authors' code does: bias1a, bias1b, bias2a, scale, bias2b for two layers."""
    *names, last = [f"bias{i}{side}" for i in range(1, num_convs + 1) for side in "ab"]
    return [*names, "scale", last]


def scalars(model: nn.Module) -> list[nn.Parameter]:
    """List the scalar biases and multipliers of a model; the authors train them at a tenth of the learning rate."""
    modules = [m for m in model.modules() if isinstance(m, FixupBlock | FixupLinear | ScalarBias)]
    return [p for m in modules for name, p in m.named_parameters(recurse=False) if _SCALAR.fullmatch(name)]


def draw(conv: nn.Module, factor: float = 1.0) -> None:
    """Draw a weight of k positions with std ``factor * sqrt(2 * groups / (k * out_channels))``; a bias becomes 0."""
    assert isinstance(conv, _ConvNd)
    fan_out = conv.weight[:, 0].numel() / conv.groups
    nn.init.normal_(conv.weight, std=factor * math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _scalar(value: float, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), value, device=like.device, dtype=like.dtype))
