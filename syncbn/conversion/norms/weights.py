"""Norms of weights: the convolution or linear layer before a BatchNorm is parametrized when the BatchNorm changes.

Which layer that is, the order of registration says, without an example: the last one in ``named_modules()`` before the
BatchNorm, if it has as many outputs as the BatchNorm has channels and no other BatchNorm took it.
"""

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from .. import swap
from ..companions import PlanRow
from ..original import original_of
from ..rules import Action, Decision, Target, is_family
from .parametrized import NormalizedWeight, ParametrizedWeight, StandardizedWeight, output_dim, own_weight

_Layer = Any  # a _ConvNd or nn.Linear
_Pairs = dict[nn.Module, tuple[str, _Layer]]


def pairs_of(root: nn.Module) -> _Pairs:
    """Find the convolution or linear layer of each BatchNorm, with its name; see above."""
    pairs: _Pairs = {}
    last: tuple[str, _Layer] | None = None
    for name, layer in root.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear):
            last = name, layer
        elif last is not None and is_family(layer) and _num_channels(layer) == num_outputs(last[1]):
            pairs[layer], last = last, None
    return pairs


def _num_channels(norm: nn.Module) -> int | None:
    return getattr(swap.original_twin(norm), "num_features", None)


def num_outputs(layer: _Layer) -> int:
    """Count the output channels of a convolution or linear layer."""
    outputs: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return outputs


def add_standardization(root: nn.Module, decisions: list[tuple[nn.Module, Decision]], target: Target) -> None:
    """Standardize the convolutions; not a linear layer, nor one number per output, which would become 0."""

    def problem(layer: _Layer) -> str | None:
        return None

    pairs = {
        norm: (name, layer)
        for norm, (name, layer) in pairs_of(root).items()
        if isinstance(layer, _ConvNd) and not _has_fan_in_of_one(layer)
    }
    _add(root, decisions, pairs, StandardizedWeight, "weight standardized", problem)


def add_weight_norm(root: nn.Module, decisions: list[tuple[nn.Module, Decision]], target: Target) -> None:
    """Normalize the weight of the layer of each BatchNorm; a BatchNorm without one is refused."""
    uses = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)

    def problem(layer: _Layer) -> str | None:
        weight = own_weight(layer)
        if isinstance(layer, _ConvNd) and layer.transposed and layer.groups > 1:
            return f"is transposed with groups={layer.groups}, which share the dimension of the output channels"
        if uses[id(weight)] > 1:
            return "shares its weight with another layer"
        over = [dim for dim in range(weight.dim()) if dim != output_dim(layer)]
        num_zero = 0 if weight.is_meta else int((weight.detach() == 0).all(over).sum()) if over else 0
        zero = f"has {num_zero} output channels whose weight is 0, without a direction: initialize or train them first"
        return zero if num_zero else None

    pairs = pairs_of(root)
    for norm, decision in decisions:
        if decision.action is Action.REPLACE and norm not in pairs:
            what = f"a convolution or linear layer of {_num_channels(norm)} outputs"
            reason = f"expected {what} registered just before it, which takes over its scale, and found none"
            _refuse(decision, reason)
    _add(root, decisions, pairs, NormalizedWeight, "weight normalized", problem)


def _add(
    root: nn.Module,
    decisions: list[tuple[nn.Module, Decision]],
    pairs: _Pairs,
    kind: type[ParametrizedWeight],
    what: str,
    problem: Callable[[_Layer], str | None],
) -> None:
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for norm, decision in decisions:
        if decision.action is not Action.REPLACE or norm not in pairs:
            continue
        name, layer = pairs[norm]
        original = original_of(norm)
        ours = () if original is None else [companion.module for companion in original.companions]
        if len(names[norm]) > len(names[layer]):
            aliases = " and ".join(names[norm])
            _refuse(decision, f"one layer, {name}, would change for what is several in the model: {aliases}")
            continue
        found = _why_not(layer, layer in ours) or problem(layer)
        if found is not None:
            _refuse(decision, f"its {type(layer).__name__} {name} {found}")
            continue
        cls = type(layer).__name__.removeprefix("Parametrized" if layer in ours else "")
        reason = f"{what}, together with {decision.row.name or 'the layer'}"
        decision.companions.append(kind(PlanRow(name, type(layer).__name__, f"Parametrized{cls}", reason), layer))


def _why_not(layer: _Layer, is_ours: bool) -> str | None:
    """Say why the weight cannot be parametrized as it is."""
    if isinstance(layer, LazyModuleMixin):
        return "is lazy; run one batch first"
    if is_parametrized(layer):
        return None if is_ours else "is parametrized already; remove_parametrizations first"
    is_plain = isinstance(layer._parameters.get("weight"), nn.Parameter)
    return None if is_plain else "has no parameter 'weight', as under an old hook of torch.nn.utils; remove that first"


def _refuse(decision: Decision, reason: str) -> None:
    name = decision.row.name
    advice = f"; or leave the BatchNorm out with exclude=[{name!r}]" if name else ""
    decision.action, decision.row = Action.REFUSE, decision.row._replace(to=None, reason=f"{reason}{advice}.")


def _has_fan_in_of_one(layer: _Layer) -> bool:
    return bool(
        layer.in_channels == layer.groups and prod(layer.kernel_size) == 1
    )  # looking at a weight may change it
