"""The rules of the experiments on textbook sentences: from numbers to intervals and verdicts."""

import math

import numpy as np
import pytest
import torch
from claim_rows import made_up_rows
from scipy import stats

from experiment.claims import (
    initialization,
)
from experiment.claims.findings import corrected_p, find
from experiment.claims.registry import BY_NAME, CLAIMS
from experiment.claims.verdicts import HALF, OPEN, REFUTED, SHOWN, Rule, whole
from experiment.comparison.statistics import Interval, mean_interval


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (3.0, 1.0, SHOWN),
        (1.5, 1.0, OPEN),  # within the margin, or beyond it
        (2.0, 1.0, OPEN),  # touches it
        (0.0, 0.5, REFUTED),  # no effect beyond the margin
        (0.0, 2.0, OPEN),
        (-3.0, 1.0, REFUTED),  # the other side
        (-1.0, 1.5, REFUTED),  # from there into the margin
        (3.0, None, OPEN),  # one seed
        (1.5, 0.0, SHOWN),  # all seeds alike
    ],
)
def test_above(mean, half, verdict):
    assert Rule("above", 1.0, "points").judge(Interval(mean, half, 5)) == verdict


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (0.2, 0.5, SHOWN),
        (-0.2, 0.5, SHOWN),
        (0.8, 0.5, OPEN),
        (0.0, 3.0, OPEN),  # on both sides
        (3.0, 1.0, REFUTED),
        (-3.0, 1.0, REFUTED),
        (0.0, None, OPEN),
    ],
)
def test_within(mean, half, verdict):
    assert Rule("within", 1.0, "%").judge(Interval(mean, half, 5)) == verdict
    assert Rule("within", 1.0, "%").judge(None) == OPEN


@pytest.mark.parametrize("kind", ["above", "within"])
def test_p_values_and_the_seeds_that_would_decide(kind):
    rule = Rule(kind, 1.0, "points")
    values = np.random.default_rng(3).normal(-1.4 if kind == "within" else 1.4, 1.0, 8)
    interval = mean_interval(values.tolist())
    expected = stats.ttest_1samp(values, -1.0 if kind == "within" else 1.0).pvalue
    assert rule.p_value(interval) == pytest.approx(expected)
    needed = rule.seeds_needed(interval)
    assert rule.judge(interval) == OPEN
    assert needed > 8
    deviation = values.std(ddof=1)
    decided = [
        rule.judge(mean_interval((values.mean() + deviation * draws).tolist())) != OPEN
        for draws in np.random.default_rng(1).normal(size=(400, needed))
    ]
    assert 0.74 < np.mean(decided) < 0.86  # 80 %
    assert rule.p_value(Interval(1.4, 0.0, 5)) == 2 * 0.5**5
    assert rule.p_value(Interval(1.0, 0.0, 5)) == 1
    assert rule.p_value(Interval(1.4, None, 1)) is None
    assert rule.seeds_needed(None) is None
    assert Rule(kind, 1.0, "points", resolution=0.7).widen(Interval(1.5, 0.1, 5)) == Interval(1.5, 0.7, 5)


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([SHOWN, SHOWN], SHOWN),
        ([REFUTED, REFUTED], REFUTED),
        ([SHOWN, REFUTED], HALF),
        ([SHOWN, OPEN, REFUTED], HALF),
        ([SHOWN, OPEN], OPEN),
        ([REFUTED, OPEN], OPEN),
        ([OPEN], OPEN),
        ([], OPEN),
    ],
)
def test_the_whole_sentence(parts, verdict):
    assert whole(parts) == verdict


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_part_finds_its_numbers(claim):
    outcome = find(claim, claim.seeds, made_up_rows(claim))
    assert outcome.is_complete
    assert [finding.num_left_out for finding in outcome.findings] == [0] * len(claim.parts)
    assert all(finding.interval.n == len(claim.seeds) for finding in outcome.findings)
    assert set(claim.columns) >= {plot.y for plot in claim.plots}


def test_a_claim_from_its_rows():
    """Two parts that go apart; numbers of seeds that are not asked for, and of rates not chosen, play no part."""
    claim = BY_NAME["sigmoid_and_tanh"]
    gains = {"relu": 0.02, "tanh": 0.02, "sigmoid": 0.5}
    noise = dict(zip(claim.seeds, (0.001, -0.001, 0.0, 0.002, -0.002), strict=True))

    def number(name, setting, seed):
        if name == "validate_error":
            return abs(math.log10(setting["chosen"] / 0.1))
        bn = setting["arm"] == "bn"
        return 0.6 - bn * (gains[setting["activation"]] + noise[seed] * (setting["activation"] == "sigmoid"))

    rows = made_up_rows(claim, number)
    outcome = find(claim, claim.seeds, rows)
    assert [finding.verdict for finding in outcome.findings] == [SHOWN, REFUTED]
    assert outcome.verdict == HALF
    expected = mean_interval([100 * (0.48 + noise[seed]) for seed in claim.seeds])
    assert outcome.findings[0].interval.mean == pytest.approx(expected.mean)
    assert outcome.findings[0].interval.half == pytest.approx(expected.half)
    assert {choice.rate for choice in outcome.choices} == {0.1}
    row = next(row for row in rows.values() if row["phase"] == "report")
    others = [{**row, "cell": "x", "rate": 0.3}, {**row, "cell": "y", "seed": 9}]
    for other in others:
        other["numbers"] = dict.fromkeys(row["numbers"], 99.0)
        assert find(claim, claim.seeds, {**rows, other["cell"]: other}).findings == outcome.findings
    row["numbers"]["test_error"] = None  # no number: this seed is left out
    assert [f.num_left_out for f in find(claim, claim.seeds, rows).findings].count(0) < len(claim.parts)


def test_limits_count_as_within():
    """Errors at a limit itself, which float32 puts on either side of it."""
    claim = BY_NAME["initialization"]
    just_above = torch.tensor(0.1).item()  # 0.10000000149
    assert just_above > initialization.WORKS

    def number(name, setting, seed):
        return 0.0 if name == "validate_error" else just_above + (setting["arm"] == "none")

    found = find(claim, claim.seeds, made_up_rows(claim, number)).findings
    assert [finding.interval.mean for finding in found] == [6.0, 0.0, 6.0, 4.0]
    claim = BY_NAME["larger_rates"]
    errors = {0.003: 0.3, 0.01: 0.05, 0.03: 0.05 + torch.tensor(0.02).item() + 1e-8, 0.1: 0.071}

    def error(_, setting, seed):
        return errors.get(setting["rate"], 0.9) if setting["arm"] == "bn" else float(setting["rate"] != 0.003) / 2

    [finding] = find(claim, claim.seeds, made_up_rows(claim, error)).findings
    assert finding.interval.mean == pytest.approx(1.0)  # 0.03 against 0.003
    assert finding.interval.half == 0.25  # all seeds alike, but rates are half decades apart
    assert finding.verdict == SHOWN


def test_a_seed_without_a_number_leaves_its_part_open():
    claim = BY_NAME["converges_faster"]

    def number(name, setting, seed):
        is_bn = setting["arm"] == "bn"
        return {"reached": float(not is_bn or seed != 10), "steps": 100 if is_bn else 300}.get(name, 0.1)

    found = find(claim, claim.seeds, made_up_rows(claim, number)).findings
    assert [(finding.verdict, finding.num_left_out, finding.seeds_needed) for finding in found] == [
        (OPEN, 1, None)
    ] * 2
    seeds = claim.seeds[1:]
    assert {f.verdict for f in find(claim, seeds, made_up_rows(claim, number)).findings} == {SHOWN}


def equal_arms(name, setting, seed):
    """All arms give the same: of one seed more, of another less."""
    return {"reached": 1.0, "steps": 200 + seed}.get(name, 0.05 + seed / 1000)


def test_no_difference_refutes_what_asks_for_one():
    asked = [(claim, part) for claim in CLAIMS for part in claim.parts]
    for claim, part in asked:
        if part.rule.kind == "above" and part.rule.threshold > 0:
            outcome = find(claim, claim.seeds, made_up_rows(claim, equal_arms))
            [finding] = [finding for finding in outcome.findings if finding.part == part]
            assert finding.interval.mean == pytest.approx(0, abs=1e-9), (claim.name, part.label)
            assert finding.verdict == REFUTED, (claim.name, part.label)


def test_p_values_are_corrected_for_all_parts_of_a_page():
    draws = np.random.default_rng(0)
    claims = [BY_NAME[name] for name in ("sigmoid_and_tanh", "small_batches", "covariate_shift")]
    outcomes = [find(c, c.seeds, made_up_rows(c, lambda *_: draws.uniform(0.1, 0.4))) for c in claims]
    found = [finding for outcome in outcomes for finding in outcome.findings]
    p_values = sorted((finding.p_value, i) for i, finding in enumerate(found))
    expected, largest = {}, 0.0
    for rank, (p, i) in enumerate(p_values):
        largest = max(largest, min(1.0, (len(found) - rank) * p))
        expected[i] = largest
    corrected = [p for ps in corrected_p(outcomes) for p in ps]
    assert corrected == pytest.approx([expected[i] for i in range(len(found))])
    assert [len(ps) for ps in corrected_p(outcomes)] == [2, 4, 2]


def test_a_sentence_that_needs_all_its_parts():
    assert whole([SHOWN, REFUTED], needs_all=True) == REFUTED
    assert whole([OPEN, REFUTED], needs_all=True) == REFUTED
    assert whole([SHOWN, OPEN], needs_all=True) == OPEN
    assert whole([SHOWN, SHOWN], needs_all=True) == SHOWN
