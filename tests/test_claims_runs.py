"""The runs of the experiments on textbook sentences: stopped, failed, alone and among others; the program."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from claim_rows import few_steps, measure_by, small_images, with_errors  # noqa: F401
from rich.console import Console

import claims as program
from experiment.claims import (
    execute,
    images,
    learning,
    rates,
    training,
)
from experiment.claims.claim import At
from experiment.claims.execute import execute_all, made_with
from experiment.claims.findings import find
from experiment.claims.registry import BY_NAME, CLAIMS, pick
from experiment.claims.runs import Run
from experiment.claims.selection import SEEDS
from experiment.comparison.results_file import Results

ROOT = Path(__file__).parents[1]


def test_one_run_in_setting_s(few_steps):  # noqa: F811
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
def test_every_claim_measures_what_it_shows(claim, few_steps, monkeypatch):  # noqa: F811
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
