"""The claim that BatchNorm works badly in recurrent networks."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from experiment.claims import images, learning
from experiment.claims.claim import At, Claim, Part, Plot
from experiment.claims.names import ARMS
from experiment.claims.networks import NUM_CLASSES
from experiment.claims.runs import Numbers, Run, grid
from experiment.claims.training import Recipe
from experiment.claims.verdicts import Rule

NUM_STEPS, NUM_UNITS, NUM_PIXELS = 16, 64, 4  # an image of 64 pixels is a sequence of 16 times 4
SMALL_WEIGHT = 0.1  # initial weight of a norm within the recurrence (Cooijmans et al. 2017, section 4)


class PerStep(nn.Module):
    """Normalize with statistics of each time step, and one weight and bias for all of them."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(NUM_UNITS, affine=False) for _ in range(NUM_STEPS))
        self.weight = nn.Parameter(torch.full((NUM_UNITS,), SMALL_WEIGHT))
        self.bias = nn.Parameter(torch.zeros(NUM_UNITS)) if bias else None

    def forward(self, x: Tensor, step: int) -> Tensor:
        """Normalize `(N, C)` of one step."""
        y: Tensor = self.norms[step](x) * self.weight
        return y if self.bias is None else y + self.bias


class EveryStep(nn.Module):
    """Use one norm in every time step; BatchNorm's running statistics are then those of all steps together."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, step: int) -> Tensor:
        """Normalize `(N, C)` of any step."""
        y: Tensor = self.norm(x)
        return y


class PixelRNN(nn.Module):
    """Read an image four pixels at a time: `h = tanh(norm(W x + U h))`, and classify the last h.

    Arms: `none` adds a bias; `bn_shared`, `bn_per_step`, `ln` and `gn` normalize the sum; `bn_input` normalizes W x
    alone, over images and steps (Laurent et al. 2016), and adds a bias; `bn_separate` normalizes W x and U h apart,
    per step (Cooijmans et al. 2017). All start from the same weights.
    """

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.arm = arm
        self.from_input = nn.Linear(NUM_PIXELS, NUM_UNITS, bias=False)
        self.from_state = nn.Linear(NUM_UNITS, NUM_UNITS, bias=False)
        self.bias = nn.Parameter(torch.zeros(NUM_UNITS)) if arm in ("none", "bn_input") else None  # draws nothing
        self.classifier = nn.Linear(NUM_UNITS, NUM_CLASSES)
        nn.init.xavier_normal_(self.from_input.weight)
        nn.init.orthogonal_(self.from_state.weight)
        self.norms = nn.ModuleDict(_norms(arm))

    def forward(self, images: Tensor) -> Tensor:
        """Map `(N, 64)` to scores `(N, 10)`."""
        x = self.from_input(images.view(len(images), NUM_STEPS, NUM_PIXELS))  # (N, steps, C)
        if "all_inputs" in self.norms:
            x = self.norms["all_inputs"](x.flatten(0, 1)).view_as(x)
        state = images.new_zeros(len(images), NUM_UNITS)
        for step in range(NUM_STEPS):
            state = torch.tanh(self._sum(x[:, step], self.from_state(state), step))
        scores: Tensor = self.classifier(state)
        return scores

    def _sum(self, x: Tensor, state: Tensor, step: int) -> Tensor:
        if "x" in self.norms:
            x, state = self.norms["x"](x, step), self.norms["state"](state, step)
        total = x + state if self.bias is None else x + state + self.bias
        return self.norms["sum"](total, step) if "sum" in self.norms else total


def _norms(arm: str) -> dict[str, nn.Module]:
    """Make the norms of an arm."""
    if arm == "bn_separate":
        return {"x": PerStep(), "state": PerStep(bias=False)}
    if arm == "bn_input":
        return {"all_inputs": nn.BatchNorm1d(NUM_UNITS)}
    if arm == "bn_per_step":
        return {"sum": PerStep()}
    norms: dict[str, Callable[[int], nn.Module]] = {
        "bn_shared": nn.BatchNorm1d,
        "ln": nn.LayerNorm,
        "gn": partial(nn.GroupNorm, 8),
    }
    if arm == "bn_shared":  # moves once per step: as slowly per image as the others
        shared = nn.BatchNorm1d(NUM_UNITS, momentum=0.1 / NUM_STEPS)
        nn.init.constant_(shared.weight, SMALL_WEIGHT)
        return {"sum": EveryStep(shared)}
    return {"sum": EveryStep(norms[arm](NUM_UNITS))} if arm in norms else {}


def _measure(run: Run) -> Numbers:
    assert run.rate is not None
    source = images.digits()
    net, _, numbers = learning.learn(run, lambda: PixelRNN(run["arm"]), source, Recipe(run.rate))
    if run.phase == "report":
        numbers["batch_error"] = _error_by_batch(net, source.test())
    return numbers


@torch.no_grad()
def _error_by_batch(net: nn.Module, split: images.Split) -> float:
    """Evaluate with the statistics of the test images themselves, as in training."""
    net.train()
    guesses: Tensor = net(split.images).argmax(1)
    return (guesses != split.labels).float().mean().item()


def _worse(at: At, arm: str) -> float:
    return 100 * (at("test_error", arm=arm) - at("test_error", arm="none"))


FORMS = {
    "bn_shared": ("shared statistics", "with one set of statistics for all time steps"),
    "bn_input": ("on inputs", "on the inputs alone"),
    "bn_per_step": ("per step", "with statistics per time step, on the sum"),
    "bn_separate": ("per step apart", "with statistics per time step, on input and state apart"),
}

RECURRENT = Claim(
    name="recurrent",
    sentence="BatchNorm works badly in recurrent networks.",
    source="textbooks; Ba et al. 2016, section 1",
    literature="true for shared statistics (Laurent et al. 2016), not for statistics per step (Cooijmans et al. 2017)",
    setup=(
        "The digits of S as 16 steps of 4 pixels, read by a tanh network of 64 units: no norm, BatchNorm in "
        "four forms, LayerNorm and GroupNorm, each at its own best rate. BatchNorm within the recurrence "
        "starts with weights of 0.1 (Cooijmans et al. 2017); with statistics for all steps its momentum is "
        "0.1 / 16. Beside the test error stands that with the statistics of all 500 test images, as in "
        "training: where it is small, training succeeded and only the running statistics are wrong."
    ),
    parts=tuple(
        Part(
            label,
            f"BatchNorm {how} is worse than no norm.",
            f"test error of {ARMS[arm]} less that of no norm",
            Rule("above", 1.0, "points"),
            partial(_worse, arm=arm),
        )
        for arm, (label, how) in FORMS.items()
    ),
    settings=tuple(grid(arm=("none", *FORMS, "ln", "gn"))),
    measure=_measure,
    columns={
        "test_error": "test error, %",
        "batch_error": "with statistics of the test images, %",
        "train_error": "train error, %",
    },
    plots=(
        Plot("Test error", "test_error", "test error, %", log_y=True, percent=True),
        Plot("With the statistics of the test images", "batch_error", "test error, %", log_y=True, percent=True),
    ),
    remark="In a first run one set of statistics moved with a momentum of 0.1 per step, and its weights began at 1.",
    seeds=tuple(range(20, 30)),
    rates=(0.01, 0.03, 0.1),
)
