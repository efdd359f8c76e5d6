"""The claim that BatchNorm helps saturating activations most."""

from functools import partial

from experiment.claims import learning, networks
from experiment.claims.claim import At, Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, grid
from experiment.claims.verdicts import Rule


def _measure(run: Run) -> Numbers:
    return learning.in_s(run, lambda: networks.mlp(run["arm"], run["activation"]))


def _gain(at: At, activation: str) -> float:
    """Give the points of test error that BatchNorm saves."""
    none, bn = (at("test_error", arm=arm, activation=activation) for arm in ("none", "bn"))
    return 100 * (none - bn)


def _more_gain(at: At, activation: str) -> float:
    return _gain(at, activation) - _gain(at, "relu")


SIGMOID_AND_TANH = Claim(
    name="sigmoid_and_tanh",
    sentence="BatchNorm helps networks with sigmoid or tanh most.",
    source="textbooks, after Ioffe & Szegedy 2015, section 1",
    literature="true for sigmoid (Ioffe & Szegedy 2015, section 4.2.1), small for tanh",
    setup="S with relu, tanh and sigmoid, without norm and with BatchNorm, each of the six at its own best rate.",
    parts=tuple(
        Part(
            activation,
            f"BatchNorm gains more with {activation} than with relu.",
            f"test error saved by BatchNorm with {activation}, less that saved with relu",
            Rule("above", 1.0, "points"),
            partial(_more_gain, activation=activation),
        )
        for activation in ("sigmoid", "tanh")
    ),
    settings=tuple(grid(activation=tuple(networks.ACTIVATIONS), arm=("none", "bn"))),
    measure=_measure,
    columns={"test_error": "test error, %", "train_error": "train error, %"},
    plots=(Plot("Test error", "test_error", "test error, %", lines=("activation", "arm"), log_y=True, percent=True),),
    rates=(0.01, 0.03, 0.1, 0.3, 1.0),
)
