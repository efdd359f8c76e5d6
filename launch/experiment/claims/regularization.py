"""The claim that BatchNorm replaces dropout and needs less weight decay."""

from functools import partial

from experiment.claims import learning, networks
from experiment.claims.claim import At, Claim, Part, Plot
from experiment.claims.runs import Numbers, Run, grid
from experiment.claims.verdicts import Rule

DROPOUT, DECAYS = 0.3, (5e-4, 5e-3, 5e-2)


def _measure(run: Run) -> Numbers:
    make = lambda: networks.mlp(run["arm"], dropout=run["dropout"])  # noqa: E731
    return learning.in_s(run, make, run["decay"], few=True)


def _error(at: At, arm: str, dropout: float = 0.0, decay: float = 0.0) -> float:
    return 100 * at("test_error", arm=arm, dropout=dropout, decay=decay)


def _less_needed(at: At, **changed: float) -> float:
    """Give what a regularizer gains without norm, less what it gains with BatchNorm."""
    none, bn = (_error(at, arm) - _error(at, arm, **changed) for arm in ("none", "bn"))
    return none - bn


DROPOUT_AND_DECAY = Claim(
    name="dropout_and_decay",
    sentence="BatchNorm replaces dropout, and needs less weight decay.",
    source="Ioffe & Szegedy 2015, sections 3.4 and 4.2.1; textbooks",
    literature="half true: the two disagree (Li et al. 2019); weight decay before BatchNorm only sets the effective "
    "rate (van Laarhoven 2017)",
    setup=(
        "S with 200 training images: no norm and BatchNorm, each without more, with dropout 0.3 behind every "
        "activation, and with weight decay 0.0005, 0.005 and 0.05; each of the ten at its own best rate."
    ),
    parts=(
        Part(
            "replaces dropout",
            "BatchNorm without dropout is as good as dropout without BatchNorm: at most a point worse.",
            "test error of dropout without norm, less that of BatchNorm without dropout (no decay)",
            Rule("above", -1.0, "points"),
            lambda at: _error(at, "none", dropout=DROPOUT) - _error(at, "bn"),
        ),
        Part(
            "less dropout",
            "Dropout gains less where there is BatchNorm.",
            "test error saved by dropout without norm, less that saved with BatchNorm (no decay)",
            Rule("above", 0.0, "points"),
            partial(_less_needed, dropout=DROPOUT),
        ),
        *(
            Part(
                f"less decay of {decay:g}",
                f"Weight decay of {decay:g} gains less where there is BatchNorm.",
                "test error saved by decay without norm, less that saved with BatchNorm (no dropout)",
                Rule("above", 0.0, "points"),
                partial(_less_needed, decay=decay),
            )
            for decay in DECAYS
        ),
    ),
    settings=(
        *grid(arm=("none", "bn"), dropout=(0.0, DROPOUT), decay=(0.0,)),
        *grid(arm=("none", "bn"), dropout=(0.0,), decay=DECAYS),
    ),
    measure=_measure,
    columns={"test_error": "test error, %", "train_loss": "train loss"},
    plots=(Plot("Test error", "test_error", "test error, %", lines=("arm", "dropout", "decay"), percent=True),),
    remark='"Replaces dropout" was open with a threshold of 0, which it had first: it asked for a lower error.',
    seeds=tuple(range(10, 30)),
    rates=(0.01, 0.03, 0.1, 0.3),
)
