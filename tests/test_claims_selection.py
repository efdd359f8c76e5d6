"""The choice of learning rates in the experiments on textbook sentences; no test image takes part in it."""

import numpy as np
import pytest
import torch
from claim_rows import few_steps, small_images, with_errors  # noqa: F401

import claims as program
from experiment.claims import (
    execute,
    images,
)
from experiment.claims.registry import CLAIMS
from experiment.claims.runs import Run
from experiment.claims.selection import LADDER, SEEDS, choose, wanted


@pytest.mark.parametrize(
    ("errors", "rate", "grid_of", "at_edge"),
    [
        ({0.01: 0.3, 0.03: 0.1, 0.1: 0.2}, 0.03, [0.01, 0.03, 0.1], False),
        ({0.01: 0.3, 0.03: 0.2, 0.1: 0.1, 0.3: 0.5}, 0.1, [0.01, 0.03, 0.1, 0.3], False),
        ({1e-3: 0.2, 3e-3: 0.1, 0.01: 0.3, 0.03: 0.4, 0.1: 0.4}, 3e-3, [1e-3, 3e-3, 0.01, 0.03, 0.1], False),
        ({0.01: 0.5, 0.03: 0.4, 0.1: 0.3, 0.3: 0.2, 1.0: 0.15, 3.0: 0.1}, 3.0, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0], True),
        ({0.01: 0.9, 0.03: 0.9, 0.1: 0.9}, 0.03, [0.01, 0.03, 0.1], False),  # nothing trains
    ],
)  # fmt: skip
def test_the_best_rate_and_wider_grids(errors, rate, grid_of, at_edge):
    claim, rows = with_errors(errors), {}
    while todo := wanted(claim, claim.seeds, rows):
        for run in todo:
            rows[run.id] = {"status": "done", "numbers": claim.measure(run)}
    choice = choose(claim, {"arm": "a"}, rows)
    assert (choice.rate, sorted(choice.errors), choice.is_at_edge) == (rate, grid_of, at_edge)
    assert {Run("made_up", {"arm": "a"}, seed, "report", rate).id for seed in (0, 1, 2)} < set(rows)


def test_a_rate_that_one_seed_fails_with_is_not_chosen():
    claim, rows = with_errors({}), {}
    for run in wanted(claim, (0,), rows):
        diverges = run.rate == 0.1 and run.seed == SEEDS[-1]
        rows[run.id] = {"status": "done", "numbers": {"validate_error": 0.9 if diverges else 0.1 - run.rate / 10}}
    assert choose(claim, {"arm": "a"}, rows).rate == 0.03
    for cell in rows:
        if "rate=0.03" in cell:
            rows[cell] = {"status": "failed", "numbers": {}}
    choice = choose(claim, {"arm": "a"}, rows)  # 0.01, at the edge
    assert {run.rate for run in choice.missing} == {0.003}
    assert wanted(claim, (0,), {}) == wanted(claim, (0, 1, 2), {})  # reports wait for the choice


CHOOSING = [claim for claim in CLAIMS if claim.rates]


@pytest.mark.parametrize("claim", CHOOSING, ids=lambda claim: claim.name)
def test_test_images_choose_nothing(claim, few_steps, monkeypatch):  # noqa: F811
    """A test split that raises when it is read fails the runs that report, and no run that chooses."""

    def forbidden():
        raise RuntimeError("the test images were read")

    make = small_images(lambda _: forbidden)
    monkeypatch.setattr(images, "digits", make(64))
    monkeypatch.setattr(images, "digits_on_photos", make(3, 28, 28))
    for setting in (claim.settings[0], claim.settings[-1]):
        row = execute.execute(Run(claim.name, setting, 0, "choose", 0.01))
        assert row["status"] == "done", row
        assert row["numbers"].keys() >= {"validate_error"}
    row = execute.execute(Run(claim.name, setting, 0, "report", 0.01))
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: the test images were read")


def test_splits_of_the_digits():
    data = images.digits()
    sizes = [len(split.labels) for split in (data.train, data.validate, data.test())]
    assert sizes == [1000, 297, 500]
    whole_set = torch.cat([data.train.images, data.validate.images, data.test().images])
    from sklearn.datasets import load_digits

    pixels = load_digits().data[:1000]
    expected = (load_digits().data - pixels.mean()) / pixels.std(ddof=0)
    np.testing.assert_allclose(whole_set.numpy(), expected, atol=2e-3)
    assert len(images.few_digits().train.labels) == 200
    assert torch.equal(images.few_digits().test().labels, data.test().labels)


def test_seeds_that_choose_report_nothing():
    for claim in CLAIMS:
        assert not set(SEEDS) & set(claim.seeds)
        rates = () if callable(claim.rates) else claim.rates
        assert set(rates) <= set(LADDER)
    assert program.seeds_of_results([3, 4]) == [3, 4]
    assert program.seeds_of_results(None) is None
    for seeds in ([3, 3], [3, SEEDS[0]], [], 3, "12", [1.5], [True]):
        with pytest.raises(ValueError, match="expected seeds to be a list of numbers that differ, and none of"):
            program.seeds_of_results(seeds)
