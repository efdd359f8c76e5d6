"""The record of a run."""

import json
import sys
from datetime import datetime

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

import syncbn
from experiment.training import report, shares

NOW = datetime(2030, 1, 2, 3, 4, 5)


def test_every_run_has_a_folder_of_its_own(tmp_path):
    folders = [report.new_folder(tmp_path / "outputs", NOW) for _ in range(3)]
    assert [folder.name for folder in folders] == [
        "2030-01-02_03-04-05",
        "2030-01-02_03-04-05_1",
        "2030-01-02_03-04-05_2",
    ]
    assert all(folder.is_dir() for folder in folders)


def test_a_root_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "outputs").write_text("")
    with pytest.raises(OSError, match="outputs"):
        report.new_folder(tmp_path / "outputs", NOW)


def test_what_went_in_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "+norm=gn", "output_dir=a b"])
    report.write_inputs(tmp_path, OmegaConf.create({"a": 1, "b": "${a}"}))
    assert OmegaConf.load(tmp_path / "config.yaml") == {"a": 1, "b": 1}
    report.write_results(tmp_path, {"test_accuracy": 0.5})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_accuracy"] == 0.5
    assert results["command"] == "launch/train.py +norm=gn 'output_dir=a b'"
    assert {"python", "torch", "lightning", "syncbn"} <= results["versions"].keys()
    assert datetime.fromisoformat(results["start"]) <= datetime.now()


def test_the_table_shows_the_results(tmp_path, capsys):
    results = {
        "arm": "syncbn",
        "eval_split": "test",
        "score": "accuracy",
        "evaluations": {"rank0": {}, "precise": {"test_error": 0.04}},
        "simulate": None,
        "test_accuracy": 0.95,
        "test_loss": 0.15,
        "train_error": 0.01,
        "images_per_second": 1234.5,
        "world_size": 2,
        "per_rank_batch_size": 16,
        "accumulate": 1,
        "global_batch_size": 32,
    }
    report.print_table(results, tmp_path)
    shown = capsys.readouterr().out
    for text in ("syncbn", "0.9500", "0.1500", "0.0100", "1234", "16", "32"):
        assert text in shown


def test_shares_of_switchable_norms():
    model = nn.Sequential(nn.Conv1d(2, 4, 1), syncbn.SwitchableNorm(4))
    results = shares.summarize(model)
    assert results["shares"]["1"]["var"] == pytest.approx({"IN": 1 / 3, "LN": 1 / 3, "BN": 1 / 3})
    results["shares"]["flat"] = {"mean": {"LN": 0.25, "BN": 0.75}, "var": {"LN": 0.5, "BN": 0.5}}
    console = Console(width=100)
    with console.capture() as shown:
        console.print(shares.table(results))
    assert shown.get().splitlines()[-2].replace("│", " ").split() == ["flat", "0.25", "0.75", "0.50", "0.50"]
    assert shares.summarize(nn.ReLU()) == {}
    assert shares.table({}) is None
