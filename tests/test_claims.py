"""The experiments on textbook sentences: rules, choice of rates, resuming, and how networks are trained."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import nn
from torch.nn import functional as F

import claims as program
from experiment.claims import (
    execute,
    images,
    initialization,
    learning,
    networks,
    rates,
    recurrent,
    shift,
    training,
)
from experiment.claims.claim import At, Claim, Part
from experiment.claims.execute import execute_all, made_with
from experiment.claims.findings import find
from experiment.claims.images import Images, Split
from experiment.claims.registry import BY_NAME, CLAIMS, pick
from experiment.claims.runs import Run, grid
from experiment.claims.selection import LADDER, SEEDS, choose, wanted
from experiment.claims.training import Recipe
from experiment.claims.verdicts import HALF, OPEN, REFUTED, SHOWN, Rule, whole
from experiment.comparison.results_file import Results
from experiment.comparison.statistics import Interval, mean_interval

ROOT = Path(__file__).parents[1]


# --- rules


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


def made_up_rows(claim, number=lambda name, setting, seed: 0.5, **changed):
    """A row for each run of a claim, with numbers that a function gives; rates are chosen by validation errors."""
    rows = {}
    while todo := wanted(claim, claim.seeds, rows):
        for run in todo:
            names = ["validate_error"] if run.phase == "choose" else [*claim.columns]
            setting = {**run.setting, "chosen": run.rate}
            rows[run.id] = {
                "cell": run.id, "status": "done", "claim": claim.name, "phase": run.phase, "setting": run.setting,
                "rate": run.rate, "seed": run.seed, "seconds": 1.0, "versions": {"torch": "2"}, "device": "cpu",
                "numbers": {name: number(name, setting, run.seed) for name in names}, **changed,
            }  # fmt: skip
    return rows


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


# --- the choice of rates


def with_errors(errors):
    """A claim of one arm, whose validation error at a rate is given."""
    return Claim(
        name="made_up", sentence="It is so.", source="nowhere", literature="true", setup="Two arms.",
        parts=(Part("a", "A is so.", "error of a", Rule("above", 0.0, "points"), lambda at: at("test_error")),),
        settings=tuple(grid(arm=("a",))), measure=partial(measure_by, errors), columns={"test_error": "test error, %"},
        plots=(), seeds=(0, 1, 2), rates=(0.01, 0.03, 0.1),
    )  # fmt: skip


def measure_by(errors, run):
    if run.phase == "choose":
        return {"validate_error": errors[run.rate]}
    return {"test_error": run.rate + run.seed / 100}


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
    assert not set(SEEDS) & set(claim.seeds)


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


def small_images(test):
    generator = torch.Generator().manual_seed(0)

    def split(*shape):
        return Split(torch.randn(160, *shape, generator=generator), torch.randint(10, (160,), generator=generator))

    return lambda *shape: lambda: Images(split(*shape), split(*shape), test(split(*shape)))


@pytest.fixture
def few_steps(monkeypatch):
    def train(net, split, recipe, seed, around=None):
        return training.train(net, split, replace(recipe, num_steps=2), seed, around)

    monkeypatch.setattr(learning, "train", train)


CHOOSING = [claim for claim in CLAIMS if claim.rates]


@pytest.mark.parametrize("claim", CHOOSING, ids=lambda claim: claim.name)
def test_test_images_choose_nothing(claim, few_steps, monkeypatch):
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


# --- runs


def test_one_run_in_setting_s(few_steps):
    row = execute.execute(Run("sigmoid_and_tanh", {"activation": "tanh", "arm": "bn"}, 3, "report", 0.1))
    assert row["status"] == "done"
    assert {*row["numbers"]} == {"validate_error", "test_error", "train_error", "train_loss"}
    assert 0 < row["numbers"]["test_error"] <= 1
    again = execute.execute(Run("sigmoid_and_tanh", {"activation": "tanh", "arm": "bn"}, 3, "report", 0.1))
    assert again["numbers"] == row["numbers"]


def run_program(claim, path, monkeypatch, seeds=None):
    monkeypatch.setitem(BY_NAME, claim.name, claim)
    with Results(path, program.GRID, made_with()) as results:
        program.run_all([claim], seeds, results, 1, Console(quiet=True))
        return results.rows


def test_stopped_it_goes_on(tmp_path, monkeypatch):
    errors, measured = {0.01: 0.3, 0.03: 0.1, 0.1: 0.2}, []
    claim, path = with_errors(errors), tmp_path / "results.jsonl"

    def until(number):
        def measure(run):
            if len(measured) == number:
                raise KeyboardInterrupt
            measured.append(run.id)
            return measure_by(errors, run)

        return replace(claim, measure=measure)

    for stop in (4, 10):
        with pytest.raises(KeyboardInterrupt):
            run_program(until(stop), path, monkeypatch)
        with path.open("ab") as file:
            file.write(b'{"cell": "made_up/ch')  # it was killed while it wrote
    rows = run_program(until(99), path, monkeypatch)
    assert len(measured) == len({*measured}) == 3 * len(SEEDS) + 3
    assert {row["status"] for row in rows.values()} == {"done"}
    assert set(rows) == set(measured)
    before = path.read_bytes()
    run_program(until(0), path, monkeypatch)  # nothing is left to do
    assert path.read_bytes() == before
    assert find(claim, claim.seeds, rows).line == "a: shown (+0.04 ± 0.02 points)"


def test_a_run_that_fails_loses_nothing_and_is_tried_again(tmp_path, monkeypatch):
    errors, path = {0.01: 0.3, 0.03: 0.1, 0.1: 0.2}, tmp_path / "results.jsonl"

    def measure(run):
        if run.phase == "report" and run.seed == 1:
            raise ValueError("no memory\nmore")
        return measure_by(errors, run)

    claim = replace(with_errors(errors), measure=measure)
    outcome = find(claim, claim.seeds, run_program(claim, path, monkeypatch))
    assert [row["reason"] for row in outcome.failed] == ["ValueError: no memory"]
    assert outcome.findings[0].num_left_out == 1
    assert outcome.findings[0].interval.n == 2
    rows = run_program(with_errors(errors), path, monkeypatch)
    assert find(claim, claim.seeds, rows).failed == []
    with pytest.raises(ValueError, match="expected claims to be some of larger_rates"):
        pick(["made"])
    with pytest.raises(ValueError, match="expected jobs"):
        program.num_jobs(0)


# --- training and what is measured in it


def test_training_is_sgd_with_this_schedule():
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(10, 3, generator=generator), torch.randint(2, (10,), generator=generator))
    net = nn.Linear(3, 2)
    start = [p.detach().clone() for p in net.parameters()]
    recipe = Recipe(0.5, num_steps=10, batch_size=4, weight_decay=0.1, warmup=0.2)
    order = list(training.batches(10, recipe, seed=5))
    losses = training.train(net, split, recipe, seed=5)
    weight, bias = (p.clone().requires_grad_() for p in start)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(10):
        rate = 0.5 * ((step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 8)) / 2)
        loss = F.cross_entropy(split.images[order[step]] @ weight.T + bias, split.labels[order[step]])
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            for p, m, g, decay in zip((weight, bias), momenta, gradients, (0.1, 0.0), strict=True):
                p.sub_(m.mul_(0.9).add_(g + decay * p), alpha=rate)
    torch.testing.assert_close(net.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.bias, bias, rtol=1e-5, atol=1e-6)
    assert len({*torch.cat(order[:2]).tolist()}) == 8  # an epoch shows an image once
    assert not torch.equal(order[0], order[2])


def test_a_diverged_network_errs_by_chance():
    split = Split(torch.randn(40, 3), torch.arange(40) % 10)
    net = nn.Linear(3, 10)
    with torch.no_grad():
        net.weight.fill_(math.inf)
    assert training.error_and_loss(net, split) == (0.9, math.inf)
    assert len(training.train(net, split, Recipe(0.1, num_steps=5), 0)) == 1


def test_steps_to_a_loss():
    losses = [1.0] * 30 + [0.0] * 30
    assert learning.steps_to(0.5, losses) == 40
    assert learning.steps_to(-1.0, losses) is None
    assert learning.steps_to(2.0, losses[:19]) is None  # diverged before there was a mean


def test_statistics_of_all_training_images():
    """The loss is that of the step's images, normalized with the statistics of all of them."""
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(12, 3, generator=generator), torch.randint(2, (12,), generator=generator))
    net, recipe = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), Recipe(0.1, 1, 4, normalize_all=True)
    normalized = (split.images - split.images.mean(0)) / (split.images.var(0, correction=0) + 1e-5).sqrt()
    [indices] = training.batches(12, recipe, seed=5)
    expected = F.cross_entropy(net[1](normalized)[indices], split.labels[indices]).item()
    assert training.train(net, split, recipe, seed=5) == [pytest.approx(expected, rel=1e-5)]


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


@pytest.mark.parametrize("net", ["plain", "residual"])
def test_gradients_of_the_first_and_last_hidden_layers(net, few_steps):
    """Without norm at the start, by hand."""
    run = Run("gradients", {"net": net, "activation": "relu", "arm": "none", "depth": 3}, 0)
    measured = BY_NAME["gradients"].measure(run)["start"]
    torch.manual_seed(0)
    make = networks.residual_mlp if net == "residual" else networks.mlp
    started = make("none", "relu", depth=3, width=128)
    *hidden, last = [p.detach().double().requires_grad_() for p in started.parameters() if p.dim() > 1]
    bias = started[-1].bias.detach().double()
    data = images.digits().train.first(128)
    x = data.images.double()
    if net == "residual":
        x = x @ hidden.pop(0).T
    for weight in hidden:
        x = x + x.relu() @ weight.T if net == "residual" else (x @ weight.T).relu()
    loss = F.cross_entropy(x @ last.T + bias, data.labels)
    gradients = torch.autograd.grad(loss, hidden)
    assert measured == pytest.approx(math.log10(gradients[0].norm() / gradients[-1].norm()))


def test_the_measured_shift_is_that_of_the_inputs():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
    x, measured = torch.randn(50, 4), shift.Shift()
    with measured.around(0, net, x):
        pass
    assert measured.mean == 0
    with measured.around(20, net, x), torch.no_grad():
        net[0].weight.mul_(1.5)
    stds, means = x.std(0), x.mean(0)
    expected = math.sqrt((0.25 * (stds**2 + means**2)).sum() / (stds**2).sum())
    assert measured.values[1] == pytest.approx(expected, rel=1e-5)
    with measured.around(21, net, x):
        net[0].weight.data.mul_(9)
    assert len(measured.values) == 2


def test_noise_behind_batch_norm():
    torch.manual_seed(0)
    layer, x = networks.NoisyBatchNorm(64), torch.randn(32, 64, 8, 8)
    y, z = layer(x).detach(), layer(x).detach()
    mean, std = y.mean((0, 2, 3)), y.std((0, 2, 3))
    assert 0.2 < mean.std() < 0.4  # that of (-1/2, 1/2) is 0.29
    assert 1.0 < std.min() < std.max() < 1.35
    assert (y - z).abs().max() > 0.1  # anew in every step
    layer.eval()
    expected = 1.125 * F.batch_norm(x, layer.running_mean, layer.running_var)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ["none", *recurrent.FORMS, "ln", "gn"])
def test_recurrent_networks(arm):
    """By hand, with the definition of each arm, at its initial weights in training mode."""
    torch.manual_seed(0)
    net, x = recurrent.PixelRNN(arm).double(), torch.randn(6, 64, dtype=torch.float64)
    w, u = net.from_input.weight, net.from_state.weight
    inputs = x.view(6, 16, 4) @ w.T

    def norm(v, dims):
        return (v - v.mean(dims, keepdim=True)) / (v.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()

    small = torch.tensor(0.1).double()  # rounded to float32 first
    if arm == "bn_input":
        inputs = norm(inputs, (0, 1))
    state = torch.zeros(6, 64, dtype=torch.float64)
    for step in range(16):
        a, b = inputs[:, step], state @ u.T
        if arm == "bn_separate":
            a, b = small * norm(a, (0,)), small * norm(b, (0,))
        state = a + b
        if arm in ("bn_shared", "bn_per_step"):
            state = norm(state, (0,)) * (1.0 if arm == "bn_shared" else small)
        if arm == "ln":
            state = norm(state, (1,))
        if arm == "gn":
            state = norm(state.view(6, 8, 8), (2,)).flatten(1)
        state = state.tanh()
    expected = state @ net.classifier.weight.T + net.classifier.bias
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-10)


def test_arms_start_from_the_same_weights():
    arms = ("none", "bn", "ln", "gn", "ghost_4")
    images_only = ("none", "bn", "gn", "noisy_bn", "ghost_4")
    residual = partial(networks.residual_mlp, activation="relu", depth=2, width=8)
    forms = ("none", *recurrent.FORMS, "ln", "gn")
    makes = ((networks.mlp, arms), (residual, arms), (networks.resnet, images_only), (recurrent.PixelRNN, forms))
    for make, names in makes:
        started = []
        for arm in names:
            torch.manual_seed(4)
            net = make(arm)
            weights = [p.detach().clone() for p in net.parameters() if p.dim() > 1]
            started.append([*weights, torch.rand(3)])  # nor has an arm drawn more than another
        assert len({len(weights) for weights in started}) == 1
        for weights in started[1:]:
            assert all(torch.equal(*pair) for pair in zip(weights, started[0], strict=True))
    torch.manual_seed(4)
    wanted_weights = [p.clone() for p in networks.mlp("bn").parameters() if p.dim() > 1]
    torch.manual_seed(4)
    scaled = networks.mlp("bn", scale=3.0)[0].weight
    torch.testing.assert_close(scaled, 3 * wanted_weights[0])
    assert {rate for claim in CHOOSING if not callable(claim.rates) for rate in claim.rates} <= {*LADDER}


# --- slow: real runs


@pytest.mark.slow
def test_any_run_gives_the_same_bits_alone():
    """In other processes, beside other runs, and in this one alone; the network with convolutions, too."""
    small = [Run("noise_regularizes", {"batch": batch}, 1, "report", 0.1) for batch in (4, 32)]
    runs = [*small, Run("converges_faster", {"data": "R", "arm": "bn"}, 1, "report", 0.1)]
    together = {row["cell"]: row for row in execute_all(runs, jobs=2)}
    torch.rand(7)
    for run in reversed(runs):
        alone = execute.execute(run)
        assert alone["status"] == "done", alone
        assert alone["numbers"] == together[run.id]["numbers"]
        assert all(isinstance(value, float | int) for value in alone["numbers"].values())


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_claim_measures_what_it_shows(claim, few_steps, monkeypatch):
    make = small_images(lambda split: lambda: split)
    monkeypatch.setattr(images, "digits", make(64))
    monkeypatch.setattr(images, "digits_on_photos", make(3, 28, 28))
    monkeypatch.setattr(training, "LEARNS", 1.0)  # two steps teach nothing
    monkeypatch.setattr(rates, "LEVEL", {"S": 99.0, "R": 99.0})
    monkeypatch.setattr(learning, "WINDOW", 1)
    rows = [execute.execute(Run(claim.name, s, 0, "report", 0.01 if claim.rates else None)) for s in claim.settings]
    assert {row["status"] for row in rows} == {"done"}, rows
    assert not any(set(claim.columns) - set(row["numbers"]) for row in rows)
    assert all(math.isfinite(part.value(At(rows, 0))) for part in claim.parts)


@pytest.mark.slow
def test_the_program_end_to_end(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "claims.py"), "claims=[running_statistics]", "seeds=[0,1,2]"]
    command += ["jobs=2", f"output_dir={tmp_path / 'out'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start():
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    files = start()
    assert start() == files  # nothing runs again, and equal rows give equal files
    assert Path("out/plots/running_statistics_1.png") in files
    lines = [json.loads(line) for line in files[Path("out/results.jsonl")].splitlines()]
    assert len(lines) == 1 + 3 * 7
    page = files[Path("out/index.html")].decode()
    assert "without Bessel" in page
    assert "python launch/claims.py &#39;claims=[running_statistics]&#39; &#39;seeds=[0,1,2]&#39;</code>" in page
