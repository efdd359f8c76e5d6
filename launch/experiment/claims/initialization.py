"""The claim that BatchNorm makes training less sensitive to the initial weights."""

from experiment.claims import learning, networks, training
from experiment.claims.claim import At, Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, Setting, Value, grid
from experiment.claims.verdicts import Rule

WORKS = 0.1  # of error: training has worked
SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DEPTHS = (5, 10, 20, 40)
ARMS = ("none", "bn", "ln")


def _initial(run: Run) -> Numbers:
    return learning.in_s(run, lambda: networks.mlp(run["arm"], depth=run["depth"], scale=run["scale"]))


def _tuned_at(setting: Setting) -> Setting:
    """Say where the rate is tuned: at the usual depth and scale, or at its own."""
    return setting if setting["tuned"] == "for each" else {**setting, "depth": 5, "scale": 1.0}


def _errors(at: At, arm: str, axis: str, **fixed: Value) -> list[float]:
    errors = at.along(axis, "test_error", arm=arm, **fixed)
    if len(errors) != len(SCALES if axis == "scale" else DEPTHS):
        raise LookupError(f"not every {axis} of {arm} has a result")
    return list(errors.values())


def _num_working(at: At, arm: str, axis: str, **fixed: Value) -> int:
    return sum(error <= WORKS + training.ROUNDING for error in _errors(at, arm, axis, **fixed))


def _more_working(label: str, axis: str, name: str, **fixed: Value) -> Part:
    return Part(
        label,
        f"With BatchNorm training works at more {name}.",
        f"number of {name} with a test error of at most 10 %, with BatchNorm less without norm",
        Rule("above", 0.5, f"{axis}s"),
        lambda at: _num_working(at, "bn", axis, **fixed) - _num_working(at, "none", axis, **fixed),
    )


def _spread(at: At, arm: str) -> float:
    errors = _errors(at, arm, "scale", depth=5, tuned="at the usual")
    return 100 * (max(errors) - min(errors))


def _plot(title: str, x: str, **where: Value) -> Plot:
    label = "factor of the initial weights" if x == "scale" else "hidden layers"
    return Plot(title, "test_error", "test error, %", x=x, x_label=label, where=where, percent=True)


INITIALIZATION = Claim(
    name="initialization",
    sentence="With BatchNorm training is less sensitive to the initial weights.",
    source="Ioffe & Szegedy 2015, section 1",
    literature="true for the scale, as BatchNorm does not see it; false for the depth (Yang et al. 2019)",
    setup=(
        "S with no norm, BatchNorm and LayerNorm: the initial weights of the hidden layers (He) times 0.03 to 10, and "
        "5 to 40 hidden layers. The usual rate of an arm is its best at factor 1 and 5 layers, as somebody has it who "
        "did not tune for the change; for the factors, no norm and BatchNorm also have the best rate of each."
    ),
    parts=(
        _more_working("scales", "scale", "scales of the initial weights", depth=5, tuned="at the usual"),
        Part(
            "spread over scales",
            "With BatchNorm the test errors at these scales differ less.",
            "largest less smallest test error over the scales, without norm less with BatchNorm",
            Rule("above", 1.0, "points"),
            lambda at: _spread(at, "none") - _spread(at, "bn"),
        ),
        _more_working("scales, rates retuned", "scale", "scales, each at its best rate,", depth=5, tuned="for each"),
        _more_working("depths", "depth", "depths", scale=1.0, tuned="at the usual"),
    ),
    settings=(
        *grid(arm=ARMS, depth=(5,), scale=SCALES, tuned=("at the usual",)),
        *grid(arm=ARMS, depth=DEPTHS[1:], scale=(1.0,), tuned=("at the usual",)),
        *grid(arm=("none", "bn"), depth=(5,), scale=SCALES, tuned=("for each",)),
    ),
    measure=_initial,
    columns={"test_error": "test error, %", "train_error": "train error, %"},
    plots=(
        _plot("5 hidden layers, other scales", "scale", depth=5, tuned="at the usual"),
        _plot("The same, with the best rate of each", "scale", depth=5, tuned="for each"),
        _plot("Usual scale, other depths", "depth", scale=1.0, tuned="at the usual"),
    ),
    remark="An error of 10 % itself counted as above it in a first run. The verdicts are the same.",
    rates=(0.01, 0.03, 0.1, 0.3),
    tuned_as=_tuned_at,
)
