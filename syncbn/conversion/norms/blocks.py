"""The residual blocks that "fixup" knows: those of other packages by name, and the user's own."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...nn.fixup import BlockParts, FixupBlock, scalar_names
from .. import problems
from ..original import original_class
from ..rules import Action, Decision
from ..third_party import activates

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BASIC = BlockParts(("conv1", "conv2"), ("bn1", "bn2"), "downsample")
_BOTTLENECK = BlockParts(("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3"), "downsample")
_KNOWN = {
    "timm.models.resnet.BasicBlock": _BASIC,
    "timm.models.resnet.Bottleneck": _BOTTLENECK,
    "torchvision.models.resnet.BasicBlock": _BASIC,
    "torchvision.models.resnet.Bottleneck": _BOTTLENECK,
}
_REGISTERED: dict[type[nn.Module], BlockParts] = {}


def register_block(
    block_class: type[nn.Module], *, convs: Sequence[str], norms: Sequence[str], shortcut: str | None = None
) -> None:
    """Tell "fixup" about a residual block of your own: ``relu(branch(x) + shortcut(x))``.

    The branch is a convolution, its norm, relu, and so on, up to a convolution and its norm without relu (He et al.
    2016, figure 2). Subclasses are not meant: their ``forward`` may be another.

    Args:
        block_class: The exact class.
        convs: The names of its convolutions, in the order in which they run.
        norms: The name of the norm behind each of them.
        shortcut: The name of the shortcut's module; where a block has none, or nn.Identity, it is the input itself.

    Raises:
        ValueError: For what is no class of modules; unless there are at least two convolutions, and as many norms.
    """
    if not (isinstance(block_class, type) and issubclass(block_class, nn.Module)):
        raise ValueError(f"register_block: expected a class of modules, got {block_class!r}.")
    if isinstance(convs, str) or isinstance(norms, str) or len(convs) != len(norms) or len(convs) < 2:
        raise ValueError(
            "register_block: expected the names of at least two convolutions and of the norm behind each, got "
            f"convs={convs!r}, norms={norms!r}."
        )
    _REGISTERED[block_class] = BlockParts(tuple(convs), tuple(norms), shortcut)


def parts_of(cls: type[nn.Module]) -> BlockParts | None:
    """Return the names of the parts of a known block, None for any other class."""
    return _REGISTERED.get(cls) or _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")


def known() -> str:
    """List the known blocks, for messages."""
    return ", ".join([*_KNOWN, *(cls.__qualname__ for cls in _REGISTERED)])


def problem_of(block: nn.Module, parts: BlockParts, family: dict[nn.Module, Decision]) -> str | None:
    """Say why a known block cannot become a FixupBlock, which runs its convolutions, relu and its shortcut alone.

    Args:
        block: The block.
        parts: Of its class.
        family: All norms of the model, with what is decided.
    """
    children = dict(block.named_children())
    for name, layer in block.named_modules():
        if layer in family and family[layer].action is not Action.REPLACE:
            return f"{name} would stay ({family[layer].row.reason}), and a block changes as a whole."
        if isinstance(layer, _ConvNd) and type(layer) not in CONVS:
            return f"{name} is a {type(layer).__name__}, expected nn.Conv1d, 2d or 3d."
    for conv, norm in zip(parts.convs, parts.norms, strict=True):
        if not isinstance(children.get(conv), _ConvNd) or children.get(norm) not in family:
            return f"expected a convolution {conv} with a BatchNorm {norm} behind it."
        if activates(original_class(children[norm])):
            return f"{norm} activates too."
    for name, child in children.items():
        if name not in (*parts.convs, *parts.norms, parts.shortcut) and type(child) not in (nn.ReLU, nn.Identity):
            return f"it has a {type(child).__name__} ({name}), expected relu and nothing else beside them."
    taken = [name for name in scalar_names(len(parts.convs)) if hasattr(block, name)]
    return f"it has an attribute {taken[0]} already." if taken else problems.of_change(block, FixupBlock)
