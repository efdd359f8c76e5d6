"""Sentences that algebra decides: numbers that must be zero up to rounding, measured when the page is made."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import syncbn

FACTOR = 7.0  # of the weights
ROUNDING = 1e-12  # allowed in float64, relative
NO_EPS = 1e-30  # torch refuses 0


@dataclass(frozen=True)
class Check:
    """One number and the bound below which the sentence holds."""

    quantity: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the number is below its bound; NaN is not."""
        return self.value <= self.bound


@dataclass(frozen=True)
class Sentence:
    """A sentence that follows from the formula, what it is measured by, and the command of its tests."""

    name: str
    text: str
    remark: str
    command: str
    measure: Callable[[], list[Check]]


def _pair(eps: float = 1e-5) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Make convolution and BatchNorm in float64, images, and a weight for each output."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    pair = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps)).double()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.copy_(draw(*parameter.shape))
    return pair, draw(16, 3, 10, 10), draw(16, 8, 8, 8)


def output_and_gradients(net: nn.Sequential, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the output in training mode and the gradients of the convolution."""
    net = copy.deepcopy(net).train()
    y = net(x)
    (y * dy).sum().backward()
    return y.detach(), {name: p.grad for name, p in net[0].named_parameters() if p.grad is not None}


def relative(a: Tensor, b: Tensor) -> float:
    """Give the largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def redundant_bias() -> list[Check]:
    """Measure the gradient of a bias before BatchNorm, and what another bias changes."""
    pair, x, dy = _pair()
    y, gradients = output_and_gradients(pair, x, dy)
    share = float(gradients["bias"].abs().max() / gradients["weight"].abs().max())
    with torch.no_grad():
        pair.get_parameter("0.bias").add_(5)
    change = relative(output_and_gradients(pair, x, dy)[0], y)
    return [
        Check("largest gradient of the bias / of the weight", share, ROUNDING),
        Check("relative change of the output with another bias", change, ROUNDING),
    ]


def _scaled(eps: float) -> tuple[float, float]:
    """Give the relative changes of output and gradient, the latter times 7, when the weight is multiplied by 7."""
    pair, x, dy = _pair(eps)
    y, gradients = output_and_gradients(pair, x, dy)
    with torch.no_grad():
        pair.get_parameter("0.weight").mul_(FACTOR)
    z, others = output_and_gradients(pair, x, dy)
    return relative(z, y), relative(FACTOR * others["weight"], gradients["weight"])


def scale() -> list[Check]:
    """Measure what the scale of a weight before BatchNorm changes."""
    output, gradient = _scaled(NO_EPS)
    with_eps = _scaled(1e-5)
    return [
        Check("relative change of the output with 7 times the weight, without eps", output, ROUNDING),
        Check("relative change of 7 times the gradient, without eps", gradient, ROUNDING),
        Check("relative change of the output, eps 1e-5", with_eps[0], 1e-4),
        Check("relative change of 7 times the gradient, eps 1e-5", with_eps[1], 1e-4),
    ]


def multiply_add() -> list[Check]:
    """Compare eval mode with one multiply-add, and with the folded convolution."""
    pair, x, _ = _pair()
    norm = pair[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    pair(x)  # moves the running statistics
    pair.eval()
    with torch.no_grad():
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * factor
        y = pair[0](x)
        once = torch.addcmul(shift.view(-1, 1, 1), y, factor.view(-1, 1, 1))
        folded = syncbn.fold(pair, x)
        return [
            Check("relative difference of eval mode and one multiply-add", relative(norm(y), once), ROUNDING),
            Check("relative difference of the pair and the folded layer", relative(folded(x), pair(x)), ROUNDING),
        ]


SENTENCES = (
    Sentence(
        "redundant_bias",
        "The bias of a convolution before BatchNorm is redundant.",
        "In training; in eval mode the running mean holds what the bias was.",
        "pytest tests/test_textbook.py tests/test_claims_algebra.py",
        redundant_bias,
    ),
    Sentence(
        "scale",
        "The scale of a weight before BatchNorm does not matter to the output, and divides the gradient.",
        "Exactly only without eps; and it does matter to training, as rate / scale² is the effective rate.",
        "pytest tests/test_claims_algebra.py",
        scale,
    ),
    Sentence(
        "multiply_add",
        "At inference BatchNorm is one multiply-add per value.",
        "And none, folded into the layer before it.",
        "pytest tests/test_fold.py tests/test_claims_algebra.py",
        multiply_add,
    ),
)
