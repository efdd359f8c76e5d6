"""Claims, rows and images that are made up, for the tests of the experiments on textbook sentences."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from experiment.claims import (
    learning,
    training,
)
from experiment.claims.claim import Claim, Part
from experiment.claims.images import Images, Split
from experiment.claims.runs import grid
from experiment.claims.selection import wanted
from experiment.claims.verdicts import Rule

ROOT = Path(__file__).parents[1]


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
