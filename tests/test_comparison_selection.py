"""How the learning rate of each arm is chosen: on validation images, by a seed of its own, for every cell alike."""

import math

import pytest
from test_comparison_grid import as_config, composed, conf  # noqa: F401

from experiment.comparison.grid import make_cells, make_selections, with_choice

SELECT = ("arms=[gn,bn]", "select_lr.options={gn: [{num_groups: 2}, {num_groups: null, channels_per_group: 4}]}")


def test_candidates_read_validation_images_with_a_seed_and_batch_of_their_own():
    config, shared = composed(*SELECT, "select_lr.lr_factors=[1,3]", "evaluate=[batch,rank0]", "trainer.max_epochs=7")
    gn, bn = make_selections(config, shared)
    runs = [as_config(cell) for cell in (*gn.next({}), *bn.next({}))]
    groups = [(run.norm.get("num_groups"), run.norm.get("channels_per_group")) for run in runs]
    assert groups == [(2, None)] * 2 + [(None, 4)] * 2 + [(None, None)] * 2
    assert [run.task.lr for run in runs] == [0.1, 0.3] * 3
    for run in runs:
        assert (run.eval_split, run.evaluate, run.seed, run.trainer.max_epochs) == ("val", ["batch"], 100, 1)
        assert (run.data.per_rank_batch_size, run.data.accumulate, run.simulate) == (2, 4, 4)
    assert all(as_config(cell).eval_split == "test" for cell in make_cells(config, shared))
    ids = [cell.id for cell in gn.next({})]
    assert ids[0] == "select-gn-w4-lr0.1-num_groups2-s100"
    assert ids[-1] == "select-gn-w4-lr0.3-num_groupsNone-channels_per_group4-s100"


def run_selection(selection, error):
    """Run a selection to its end, with errors by a formula; return the rates in order, and the rows."""
    rows, rates = {}, []
    while cells := selection.next(rows):
        for cell in cells:
            run = as_config(cell)
            found = error(run.task.lr, run.norm)
            evaluation = {"val_error": found, "val_loss": None if found is None else run.task.lr}
            done = {"status": "done", "evaluations": {"rank0": evaluation}}
            rows[cell.id] = done if found is not None else {"status": "failed", "reason": "RuntimeError: no luck"}
            rates.append(run.task.lr)
    return rates, rows


@pytest.mark.parametrize(
    ("best", "tried", "chosen", "at_edge"),
    [
        (0.2, [0.05, 0.1, 0.2, 0.4], 0.2, False),
        (0.5, [0.05, 0.1, 0.2, 0.4, 0.8], 0.4, False),
        pytest.param(0.02, [0.05, 0.1, 0.2, 0.4, 0.025, 0.0125], 0.025, False, marks=pytest.mark.slow),
        (9.0, [0.05, 0.1, 0.2, 0.4, 0.8, 1.6], 1.6, True),
        pytest.param(1e-4, [0.05, 0.1, 0.2, 0.4, 0.025, 0.0125], 0.0125, True, marks=pytest.mark.slow),
    ],
)
def test_the_best_rate_is_taken_and_the_grid_continued_at_its_edge(best, tried, chosen, at_edge):
    [selection] = make_selections(*composed("arms=[bn]"))
    rates, rows = run_selection(selection, lambda lr, norm: abs(math.log(lr / best)) / 10)
    assert rates == tried
    choice = selection.choice(rows)
    assert (choice["lr"], choice["at_edge"]) == (chosen, at_edge)
    assert list(choice["tried"]) == [f"lr {rate:g}" for rate in sorted(tried)]
    assert choice["val_error"] == pytest.approx(abs(math.log(chosen / best)) / 10)


def test_options_are_chosen_with_the_rate_and_reach_the_cells():
    config, shared = composed(*SELECT, "select_lr.lr_factors=[0.5,1,2]")
    gn, _ = make_selections(config, shared)
    rates, rows = run_selection(gn, lambda lr, norm: abs(lr - 0.1) + (0.3 if norm.num_groups else 0.1))
    assert len(rates) == 6
    choice = gn.choice(rows)
    assert choice["options"] == {"num_groups": None, "channels_per_group": 4}
    assert len(gn.rows(rows)) == 6
    [cell] = [with_choice(c, choice) for c in make_cells(config, shared) if c.id == "gn-w4-s0"]
    run = as_config(cell)
    assert (run.task.lr, run.norm.channels_per_group, run.norm.num_groups) == (0.1, 4, None)
    assert cell.norm["num_groups"] == 8  # as the arm's file says: what was chosen stands in `selection`
    assert len(choice["tried"]) == 6
    assert cell.coordinates()["selection"] == choice


def test_ties_go_to_the_smaller_loss_and_failures_are_worst():
    [selection] = make_selections(*composed("arms=[bn]"))
    _, rows = run_selection(selection, lambda lr, norm: None if lr < 0.15 else 0.5)
    assert selection.choice(rows)["lr"] == 0.2  # the loss is the rate here
    _, rows = run_selection(selection, lambda lr, norm: None)
    assert selection.choice(rows) is None


def test_a_failure_beyond_the_best_rate_does_not_hide_that_it_is_the_last():
    [selection] = make_selections(*composed("arms=[bn]"))
    rates, rows = run_selection(selection, lambda lr, norm: None if lr > 0.4 else 1 - lr)
    assert rates == [0.05, 0.1, 0.2, 0.4, 0.8]
    choice = selection.choice(rows)
    assert (choice["lr"], choice["at_edge"], choice["tried"]["lr 0.8"]) == (0.4, True, None)


def test_each_number_of_ranks_chooses_for_itself():
    ids = [
        {cell.id for cell in make_selections(*composed("arms=[bn]", f"world_sizes={sizes}"))[0].next({})}
        for sizes in ("[4]", "[2,4]")
    ]
    assert not ids[0] & ids[1]
