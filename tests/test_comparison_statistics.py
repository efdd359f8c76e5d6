"""Statistics of the comparison, against formulas written by hand and numbers from published tables."""

import csv
import io
import math
import random
import re

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from experiment.comparison import conclusions, export, selection_table, settings, statistics, terminal_table
from experiment.comparison.plan import Plan
from experiment.comparison.results_table import ResultsTable

CHOSEN = {"lr": 0.2, "options": {}, "at_edge": False, "mode": "rank0", "world_size": 4, "seed": 100}
CHOSEN |= {"per_rank_batch_size": 2, "max_epochs": 1}
PLAN = Plan((("bn", "syncbn"), ("gn", "syncbn")), 1, (4,))
T = {2: 12.7062, 3: 4.30265, 5: 2.77645}  # Student's t at 97.5 % for n - 1 degrees of freedom, from tables


def cell(arm="bn", batch=1, seed=0, error=0.1, world_size=4, **others):
    evaluation = {"test_error": error, "test_loss": 1.0, "train_error": 0.02, "train_loss": 0.1, "num_test": 1000}
    row = {
        "cell": f"{arm}-w{world_size}-p{batch}-s{seed}",
        "status": "done",
        "reason": None,
        "arm": arm,
        "label": arm,
        "per_rank_batch_size": batch,
        "world_size": world_size,
        "group_size": None,
        "seed": seed,
        "engine": "simulate",
        "isolate": "accumulate",
        "score": "accuracy",
        "device": "cpu",
        "lr": 0.2,
        "selection": CHOSEN,
        "evaluations": {"rank0": evaluation},
        "curve": {"step": [10, 20], "loss": [2.0, 1.0]},
        "seconds": 10.0,
        "versions": {"torch": "2.14.1"},
        "command": f"python launch/train.py +norm={arm}",
    }
    return {**row, **others}


def cells(errors):
    """Make cells from `{(arm, batch): [error of seed 0, of seed 1, ...]}`."""
    return [
        cell(arm, batch, seed, error) for (arm, batch), values in errors.items() for seed, error in enumerate(values)
    ]


@pytest.mark.parametrize("values", [[0.1, 0.3], [0.04, 0.05, 0.09], [1.0, 2.0, 4.0, 8.0, 16.0]])
def test_the_interval_is_students(values):
    found = statistics.mean_interval(values)
    n, mean = len(values), sum(values) / len(values)
    half = T[n] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    np.testing.assert_allclose(
        [found.mean, found.half, found.lower, found.upper], [mean, half, mean - half, mean + half], rtol=1e-5
    )
    assert found.n == n


def test_one_value_has_no_interval():
    assert statistics.mean_interval([0.25]) == statistics.Interval(0.25, None, 1)
    assert statistics.mean_interval([0.25]).lower is None
    with pytest.raises(ValueError, match="one value or more"):
        statistics.mean_interval([])


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [statistics.mean_interval(rng.normal(0.3, 0.02, 3)) for _ in range(2000)]
    covered = np.mean([i.lower <= 0.3 <= i.upper for i in found])
    assert abs(covered - 0.95) < 0.02  # 4 standard deviations of 2000 draws


def test_the_paired_test_uses_common_seeds_only():
    found = statistics.paired({0: 0.30, 1: 0.20, 2: 0.25, 7: 0.9}, {2: 0.05, 1: 0.04, 0: 0.06, 8: 0.9})
    differences = np.array([0.24, 0.16, 0.20])
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    p = 1 - t / math.sqrt(2 + t**2)  # two-sided, in closed form for two degrees of freedom
    np.testing.assert_allclose([found.interval.mean, found.p], [0.2, p], rtol=1e-9)
    assert found.interval.n == 3
    assert statistics.paired({0: 0.1}, {1: 0.1}) is None
    assert statistics.paired({0: 0.1}, {0: 0.3}).p is None


@pytest.mark.parametrize(("shift", "n", "p"), [(0.0, 3, 1.0), (0.1, 3, 0.25), (0.1, 8, 2 / 256), (1e-8, 3, 1.0)])
def test_equal_differences_are_judged_by_the_sign_test(shift, n, p):
    values = {seed: 0.1 * seed for seed in range(n)}
    found = statistics.paired({seed: value + shift for seed, value in values.items()}, values)
    assert found.p == p
    assert found.interval.half == 0


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1 may not fall below the one before
    assert statistics.holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_differences_are_paired_at_equal_ranks_and_batch():
    rows = cells({("bn", 1): [0.30, 0.33, 0.36], ("syncbn", 1): [0.04, 0.05, 0.06], ("gn", 1): [0.05, 0.04]})
    rows += [cell("bn", 2, 0, 0.2), cell("syncbn", 4, 0, 0.2), cell("bn", 4, 0, 0.1, world_size=8)]
    lines = ResultsTable.of(rows).differences()
    assert [(line.label, line.batch, line.interval.n) for line in lines] == [("bn", 1, 3), ("gn", 1, 2)]
    bn, gn = lines
    np.testing.assert_allclose([bn.interval.mean, gn.interval.mean], [0.28, 0.0], atol=1e-12)
    assert (bn.corrected, gn.corrected) == (None, None)


def test_only_what_was_stated_beforehand_is_tested_and_corrected():
    rows = cells({(a, b): [0.30, 0.33, 0.35] for a in ("bn", "brn", "gn") for b in (1, 2)})
    rows += cells({("syncbn", b): [0.04, 0.05, 0.05] for b in (1, 2)})
    results = ResultsTable.of(rows)
    plan = Plan((("bn", "syncbn"), ("gn", "syncbn"), ("ln", "syncbn")), 1, (4,))
    planned = plan.differences(results)
    assert [(line.label, line.against, line.batch) for line in planned] == [("bn", "syncbn", 1), ("gn", "syncbn", 1)]
    assert [line.corrected for line in planned] == pytest.approx([3 * line.p for line in planned])  # three were stated
    later = Plan(plan.pairs, 2, (4,))
    assert {line.batch for line in later.differences(results)} == {2}
    assert Plan(plan.pairs, 8, (4,)).differences(results) == []  # no other batch takes the place of the stated one
    others = [(line.label, line.batch) for line in results.differences(planned)]
    assert sorted(others) == [("bn", 2), ("brn", 1), ("brn", 2), ("gn", 2)]


def test_an_arm_that_runs_once_per_seed_stands_at_every_batch():
    rows = cells({("syncbn", 1): [0.1, 0.2], ("syncbn", 4): [0.1, 0.2]})
    rows += [cell("gn", 4, seed, 0.3, once_per_seed=True) for seed in (0, 1)]
    results = ResultsTable.of(rows)
    assert results.batches(4, "gn") == [1, 4]
    assert results.values("gn", 4, 1, "rank0") == results.values("gn", 4, 4, "rank0") == {0: 0.3, 1: 0.3}
    assert [(line.label, line.batch) for line in results.differences()] == [("gn", 1), ("gn", 4)]
    assert results.changes("gn", 4) == []
    assert results.num_replaced == 0
    alone = ResultsTable.of([cell("gn", 8, once_per_seed=True)])
    assert alone.batches(4) == [8]


def test_candidates_are_in_no_figure():
    rows = cells({("bn", 1): [0.1, 0.2]})
    candidate = cell("bn", 2, 100, 0.9, cell="select-bn-lr0.1-s100", candidate="lr 0.1")
    candidate["evaluations"] = {"rank0": {"val_error": 0.25, "val_loss": 1.0, "train_error": 0.2, "num_val": 10}}
    failed = {**candidate, "cell": "select-bn-lr0.2-s100", "candidate": "lr 0.2", "status": "failed"}
    del failed["evaluations"]
    results = ResultsTable.of([*rows, candidate, failed])
    assert (len(results.done), len(results.failed), results.seeds) == (2, 0, [0, 1])
    [line] = selection_table.selection_lines(results)
    assert (line.arm, line.errors, line.chosen, line.at_edge) == ("bn", {0.1: 0.25, 0.2: None}, 0.2, False)
    chosen = {**CHOSEN, "lr": 0.1, "at_edge": True}
    results = ResultsTable.of([*[{**row, "selection": chosen} for row in rows], candidate, failed])
    [line] = selection_table.selection_lines(results)
    assert (line.chosen, line.at_edge) == (0.1, True)
    assert "lies at the edge of its grid for bn" in settings.warnings(results, missing=0)[0]
    assert "seed 100, which is none of the grid's" in selection_table.how_chosen(results)
    results = ResultsTable.of([{**row, "selection": {**CHOSEN, "val_error": 0.86}} for row in rows])
    assert "At none of the learning rates tried did bn learn half" in settings.warnings(results, missing=0)[0]


SPREADS = [(0.03, 0.02, 1e-3), (0.01, 0.03, 1e-3), (0.005, 0.02, 0.02)]


@pytest.mark.parametrize(("mean", "deviation", "margin"), SPREADS)
def test_so_many_seeds_settle_it_as_draws_do(mean, deviation, margin):
    """Of many experiments with that many seeds, 80 % show the difference or have their interval within the margin."""
    half = T[5] * deviation / math.sqrt(5)
    n = statistics.seeds_to_settle(statistics.Interval(mean, half, 5), 0.05, margin)
    draws = np.random.default_rng(0).normal(mean, deviation, (20_000, n))
    means, halves = draws.mean(1), scipy.stats.t.ppf(0.975, n - 1) * draws.std(1, ddof=1) / math.sqrt(n)
    shown, within = np.abs(means) > halves, np.abs(means) + halves <= margin
    assert 0.79 < max(shown.mean(), within.mean()) < 0.9
    assert statistics.seeds_to_settle(statistics.Interval(mean, None, 1), 0.05, margin) is None
    assert statistics.seeds_to_settle(statistics.Interval(1e-5, 5.0, 5), 0.05, 1e-4) is None


def test_the_order_of_rows_changes_nothing_and_a_cell_counts_once():
    rows = cells({("syncbn", 2): [0.1, 0.2], ("bn", 1): [0.3, 0.4], ("mine", 1): [0.5, 0.6], ("a", 1): [0.5, 0.6]})
    results = ResultsTable.of(rows)
    assert results.labels == ["bn", "syncbn", "a", "mine"]
    shuffled = rows[::-1]
    random.Random(0).shuffle(shuffled)
    assert ResultsTable.of(shuffled) == results
    again = ResultsTable.of([*rows, cell("bn", 1, 0, 0.9)])
    assert again.values("bn", 4, 1, "rank0") == {0: 0.9, 1: 0.4}
    assert ResultsTable.of([*rows, cell("bn", 1, 0, 0.9, cell="other")]).num_replaced == 1


def test_what_is_no_number_is_left_out_and_said():
    rows = cells({("bn", 1): [0.1, None, float("nan")], ("bn", 2): [0.1]})
    rows[3]["evaluations"] = {"batch": {"test_error": 0.2}}
    results = ResultsTable.of(rows)
    assert results.values("bn", 4, 1, "rank0") == {0: 0.1}
    assert results.mean("bn", 4, 2, "rank0") is None
    assert results.modes == ["rank0", "batch"]
    [said] = settings.warnings(results, missing=0)
    assert "2 cells: bn-w4-p1-s1, bn-w4-p1-s2" in said


SMALL, LARGE, FLAT = [0.30, 0.32, 0.34], [0.04, 0.05, 0.045], [0.04, 0.051, 0.044]


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({1: SMALL, 8: LARGE}, "Exploratory: bn degrades at small batches: its test error is 27.5 points higher at"),
        ({1: FLAT, 8: LARGE}, "Exploratory: bn changes with the batch by less than 2.0 points"),
        ({1: LARGE, 8: SMALL}, "Exploratory: bn is better at small batches"),
        ({1: [0.1, 0.2, 0.1], 8: LARGE}, "Exploratory: no change of bn with the batch is seen, but its interval"),
        ({1: [0.3, 0.3], 8: [0.1, 0.1]}, "Exploratory: no change of bn with the batch is seen, but"),  # no spread
        ({1: [0.3], 8: [0.1]}, "Exploratory: whether bn changes with the batch cannot be told from one seed"),
        ({1: [0.3]}, "Exploratory: bn was run at one batch size"),
        ({1: [None], 8: [0.1]}, "Exploratory: bn has no seed finished both at 1 and at 8"),
    ],
)  # fmt: skip
def test_the_answer_follows_the_numbers(errors, words):
    [sentences] = conclusions.draw_conclusions(
        ResultsTable.of(cells({("bn", batch): e for batch, e in errors.items()})), Plan()
    ).values()
    assert sentences[0].startswith(words)
    assert sentences[1] == "Exploratory: syncbn has no finished cell, so nothing can be told about it."


def test_the_answer_tells_what_was_stated_beforehand_first():
    errors = {
        ("bn", 1): SMALL,
        ("bn", 8): LARGE,
        ("syncbn", 1): FLAT,
        ("syncbn", 8): LARGE,
        ("gn", 1): [0.09, 0.05, 0.04],
    }
    [sentences] = conclusions.draw_conclusions(ResultsTable.of(cells(errors)), PLAN).values()
    assert sentences[0].startswith(
        "Stated beforehand: at 1 image per rank bn has 27.5 points more test error than syncbn"
    )
    assert re.search(r"n = 3 seeds, corrected p = 0.00\d\): shown\.$", sentences[0])
    assert re.search(
        r"1.5 points more .*: open; \d+ new seeds, in an output_dir of their own, would probably settle it\.$",
        sentences[1],
    )
    assert sentences[2].startswith("Exploratory: bn degrades at small batches")
    assert sentences[3].startswith("Exploratory: syncbn changes with the batch by less than 2.0 points")
    assert conclusions.draw_conclusions(ResultsTable.of([]), PLAN) == {
        "": ["No cell has finished, so nothing can be told."]
    }
    [sentences] = conclusions.draw_conclusions(ResultsTable.of(cells({("bn", 1): SMALL})), PLAN).values()
    assert sentences[0] == (
        "Stated beforehand: bn was to be compared with syncbn at 1 image per rank, and no seed has both."
    )


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (SMALL, FLAT, "shown"),
        ([0.041, 0.05, 0.045], FLAT, "less than 2.0 points"),
        ([0.04], [0.05], "one seed cannot settle it"),
        ([0.1, 0.1, 0.1], [0.05, 0.05, 0.05], "open"),  # no spread to judge by
    ],
)
def test_what_a_planned_comparison_comes_to(first, second, words):
    rows = cells({("bn", 1): first, ("syncbn", 1): second})
    [line] = PLAN.differences(ResultsTable.of(rows))
    assert PLAN.verdict(line) == words


def test_a_small_difference_can_be_shown_and_small():
    rows = cells({("bn", 1): [0.050, 0.056, 0.058], ("syncbn", 1): [0.043, 0.049, 0.0505]})
    [line] = PLAN.differences(ResultsTable.of(rows))
    assert PLAN.verdict(line) == "shown, and less than 2.0 points"


def test_arms_that_fit_the_training_images_less_are_named():
    rows = cells({("syncbn", 1): FLAT, ("gn", 1): FLAT, ("wn", 1): FLAT})
    for row in rows:
        row["evaluations"]["rank0"]["train_error"] = {"syncbn": 0.01, "gn": 0.019, "wn": 0.03}[row["arm"]]
    [sentences] = conclusions.draw_conclusions(ResultsTable.of(rows), PLAN).values()
    assert "more than twice that of syncbn (1.0 %) for wn 3.0 %: these arms fit" in sentences[-1]


def test_mixed_missing_and_failed_cells_are_said():
    rows = [cell(seed=0), cell(seed=1, device="cuda:0", versions={"torch": "2.13.0"})]
    failed = {"cell": "x", "status": "failed", "reason": "ValueError: no", "arm": "bn", "command": "c"}
    said = "\n".join(settings.warnings(ResultsTable.of([*rows, failed]), missing=3))
    for text in (
        "3 cells of the grid are missing",
        "1 cell failed and is in no figure",
        "cpu in 1 cell, cuda:0 in 1 cell",
    ):
        assert text in said
    assert "different versions of torch: 2.13.0 in 1 cell, 2.14.1 in 1 cell" in said
    assert settings.warnings(ResultsTable.of(rows[:1]), missing=0) == []
    [said] = settings.warnings(ResultsTable.of([{**rows[0], "selection": None}]), missing=0)
    assert said.startswith("No learning rate was chosen for bn")
    assert ("Seeds", "n = 2: 0, 1") in settings.settings(ResultsTable.of(rows))


def test_csv_reads_back():
    rows = [
        *cells({("bn", 1): [0.1, 0.2]}),
        cell('<b>"x",\n', 2, 0, None),
        {"cell": "y", "status": "failed", "reason": "no"},
    ]
    lines = list(csv.DictReader(io.StringIO(export.results_csv(rows))))
    assert [line["arm"] for line in lines] == ["bn", "bn", '<b>"x",\n', ""]
    assert [line["evaluations.rank0.test_error"] for line in lines] == ["0.1", "0.2", "", ""]
    assert lines[0]["curve.loss"] == "2.0 1.0"
    assert lines[3]["reason"] == "no"
    [line] = csv.DictReader(io.StringIO(export.summary_csv(ResultsTable.of(rows))))
    assert (line["label"], line["mode"], line["n"]) == ("bn", "rank0", "2")
    numbers = [float(line[name]) for name in ("test_error", "test_error_lower", "test_error_upper", "train_error")]
    np.testing.assert_allclose(numbers, [0.15, 0.15 - T[2] * 0.05, 0.15 + T[2] * 0.05, 0.02], rtol=1e-5)


def test_the_terminal_table():
    def printed(rows):
        console = Console(width=100, file=io.StringIO())
        terminal_table.print_table(rows, console, PLAN)
        return console.file.getvalue()

    shown = printed(cells({("bn", 1): SMALL, ("syncbn", 1): FLAT, ("[b]x", 1): [0.1]}))
    for text in ("32.0 ±5.0", "n = 3", "+27.5 ± 4.", "shown", "[b]x", "n = 1", "4 ranks: test error in %"):
        assert text in shown
    assert "difference" not in printed(cells({("bn", 1): SMALL}))
    assert "x: [no]" in printed([{"cell": "x", "status": "failed", "reason": "[no]"}])
    assert printed([]) == "No cell has finished.\n"
