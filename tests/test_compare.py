"""launch/compare.py from end to end: what it runs, what it leaves, and that a stop costs only the running cells."""

import json
import os
import pty
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import syncbn
from experiment.comparison import page, runner
from experiment.comparison.overrides import quoted
from experiment.training import report

ROOT = Path(__file__).parents[1]
COMPARE = ROOT / "launch" / "compare.py"
QUICK = Path(__file__).parent / "quick_train.py"
FOUR = ["arms=[bn,syncbn]", "per_rank_batch_sizes=[2]", "seeds=[0,1]", "jobs=2", "select_lr=null"]
CHOOSE = ["arms=[bn,gn]", "seeds=[0]", "jobs=2", "select_lr.options.gn=[{num_groups: 4}, {num_groups: 16}]"]
SMALL = [
    "select_lr=null",
    "data.num_train=64",
    "data.num_val=0",
    "data.num_test=32",
    "data.global_batch_size=16",
    "model.width=8",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
]
TIMES = {"start", "seconds", "training_seconds", "images_per_second"}
WITH_QUICK = """
import runpy, sys
from pathlib import Path
from experiment.comparison import runner
runner.TRAIN = Path({quick!r})
sys.argv[0] = {compare!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Stand in an empty folder; cells take no time, and there is no page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "TRAIN", QUICK)
    monkeypatch.setattr(page, "write_report", lambda rows, folder, **_: folder / "index.html")
    monkeypatch.setenv("QUICK_VERSIONS", json.dumps(report.versions()))
    return tmp_path


def compare(monkeypatch, *arguments):
    """Run the command in this process; return its exit code."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(COMPARE), *arguments])
        try:
            runpy.run_path(str(COMPARE), run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


def start(folder, *arguments, quick=False, **options):
    """Start the command as a process of its own."""
    code = ["-c", WITH_QUICK.format(quick=str(QUICK), compare=str(COMPARE))] if quick else [str(COMPARE)]
    environment = {**os.environ, "SYNCBN_CACHE": str(folder / "cache"), "MPLBACKEND": "tkagg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "launch"), os.environ.get("PYTHONPATH", "")])
    environment.pop("DISPLAY", None)
    return subprocess.Popen([sys.executable, *code, *arguments], cwd=folder, env=environment, **options)


def rows_of(folder):
    """Give the last line of each cell."""
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    return {row["cell"]: row for row in lines}


def untimed(rows):
    return {cell: {k: v for k, v in row.items() if k not in TIMES} for cell, row in rows.items()}


def lives(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in ("", "Z")


def children_of(pid):
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [child for child, parent in pairs if parent == pid]
    return found + [grandchild for child in found for grandchild in children_of(child)]


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_grid_runs_to_its_report(here, monkeypatch, capfd):
    assert compare(monkeypatch, *FOUR, "output_dir=out", "data.num_train=640", "model.width=8") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["1/4", "2/4", "3/4", "4/4"]
    assert any(line.startswith("1/4 ") and ": test error " in line for line in lines)
    assert lines[-1] == f"report: {Path('out') / 'index.html'}"
    assert "\x1b" not in "".join(lines)
    rows = rows_of(here / "out")
    assert sorted(rows) == ["bn-w4-p2-s0", "bn-w4-p2-s1", "syncbn-w4-p2-s0", "syncbn-w4-p2-s1"]
    for cell, row in rows.items():
        arguments = (here / "out" / "cells" / cell / "log.txt").read_text()
        assert row["status"] == "done"
        assert row["command"].startswith(
            "OMP_NUM_THREADS=1 python launch/train.py data.num_train=640 model.width=8 trainer.max_epochs=4 +norm="
        )
        for word in row["command"].split()[3:]:
            assert word.strip("'") in arguments
        assert row["arm"] == row["label"] == cell.split("-")[0]
        assert (row["engine"], row["isolate"]) == ("simulate", "accumulate")
        assert (row["world_size"], row["per_rank_batch_size"], row["accumulate"]) == (4, 2, 4)
        assert row["norm"]["norm"] == row["arm"]
        assert row["versions"]["syncbn"] == syncbn.__version__
        assert list(row["evaluations"]) == ["rank0", "averaged", "precise", "batch"]
        assert len(row["curve"]["step"]) == 40
        assert "simulate" not in row
    assert not list(here.rglob("checkpoints"))


def test_learning_rates_are_chosen_before_the_grid_is_run(here, monkeypatch, capfd):
    """The last word about an arm is that of its validation error; a stop in between costs nothing that is done."""
    with monkeypatch.context() as patch:
        patch.setenv("QUICK_FAILS", "select-gn-w4-lr0.4-num_groups16")
        assert compare(monkeypatch, *CHOOSE, "output_dir=out") == 1
    rows = rows_of(here / "out")
    tried = {cell: row for cell, row in rows.items() if row["candidate"]}
    rates = (0.05, 0.1, 0.2, 0.4)
    names = [f"bn-w4-lr{lr}" for lr in rates] + [f"gn-w4-lr{lr}-num_groups{n}" for lr in rates for n in (4, 16)]
    assert sorted(tried) == sorted(f"select-{name}-s100" for name in names)
    assert set(list(rows)[:12]) == set(tried)
    for row in tried.values():
        words = shlex.split(row["command"])
        assert {"eval_split=val", "evaluate=[rank0]", "trainer.max_epochs=1"} < set(words)
        assert "test_error" not in str(row.get("evaluations"))
    cells = {cell: row for cell, row in rows.items() if not row["candidate"]}
    assert sorted(cells) == ["bn-w4-p1-s0", "bn-w4-p2-s0", "gn-w4-s0"]
    for row in cells.values():
        assert " task.lr=0.2" in row["command"]
        assert "eval_split" not in row["command"]
        assert (row["lr"], row["selection"]["lr"], row["selection"]["at_edge"]) == (0.2, 0.2, False)
        assert len(row["selection"]["tried"]) == {"bn": 4, "gn": 8}[row["arm"]]
    assert cells["gn-w4-s0"]["command"].endswith(" task.lr=0.2 ++norm.num_groups=4")
    assert "select-bn-w4-lr0.1-s100: validation error 10.0 %" in capfd.readouterr().out
    before = (here / "out" / "results.jsonl").read_bytes()
    assert compare(monkeypatch, *CHOOSE, "output_dir=out") == 0  # what failed runs again, and changes no choice
    after = (here / "out" / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["cell"] for line in after[len(before) :].splitlines()] == [
        "select-gn-w4-lr0.4-num_groups16-s100"
    ]


@pytest.mark.slow
def test_an_arm_of_which_every_candidate_fails_is_not_run_and_does_not_stop_the_others(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("QUICK_FAILS", "gn-")
        assert compare(monkeypatch, *CHOOSE, "output_dir=out") == 1
    rows = rows_of(here / "out")
    assert {row["status"] for row in rows.values() if row["arm"] == "bn"} == {"done"}
    assert {row["status"] for row in rows.values() if row["arm"] == "gn"} == {"failed"}
    assert "gn-w4-s0" not in rows
    assert compare(monkeypatch, *CHOOSE, "output_dir=out") == 0
    assert rows_of(here / "out")["gn-w4-s0"]["selection"]["lr"] == 0.2


@pytest.mark.slow
def test_an_arm_that_changed_since_its_rate_was_chosen_is_refused(here, monkeypatch, capfd):
    file = here / "own" / "norm" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("_target_: torch.nn.GroupNorm\nnum_groups: 2\n")
    arguments = ["--config-dir", "own", "arms=[mine]", "per_rank_batch_sizes=[2]", "seeds=[0]", "output_dir=out"]
    with monkeypatch.context() as patch:
        patch.setenv("QUICK_FAILS", "mine-w4-p2-s0")
        assert compare(monkeypatch, *arguments) == 1
    file.write_text("_target_: torch.nn.GroupNorm\nnum_groups: 4\n")
    capfd.readouterr()
    assert compare(monkeypatch, *arguments) == 1
    assert "results of another arm 'mine'" in capfd.readouterr().err


def test_the_same_command_runs_nothing_again(here, monkeypatch, capfd):
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 0
    before = (here / "out" / "results.jsonl").read_bytes()
    monkeypatch.setattr(subprocess, "Popen", None)
    assert compare(monkeypatch, *FOUR, "output_dir=out", "jobs=1") == 0
    assert (here / "out" / "results.jsonl").read_bytes() == before
    assert "1/4" not in capfd.readouterr().out.split("report:")[1]


@pytest.mark.slow
def test_a_larger_grid_goes_on_from_the_smaller(here, monkeypatch):
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 0
    before = (here / "out" / "results.jsonl").read_bytes()
    larger = ["arms=[gn,bn,syncbn]", "per_rank_batch_sizes=[1,2]", "seeds=[1,0]", "jobs=2", "select_lr=null"]
    assert compare(monkeypatch, *larger, "output_dir=out") == 0
    after = (here / "out" / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == 1 + 10  # gn once per seed
    assert compare(monkeypatch, *larger, "output_dir=another") == 0
    assert untimed(rows_of(here / "out")) == untimed(rows_of(here / "another"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.width=4"], "model.width: 16 there, 4 here"),
        pytest.param(["isolate=none"], "isolate: 'accumulate' there, 'none' here", marks=pytest.mark.slow),
        pytest.param(["evaluate=[rank0]"], "evaluate: ", marks=pytest.mark.slow),
    ],
)
def test_results_of_another_grid_are_kept(here, monkeypatch, capfd, arguments, message):
    assert compare(monkeypatch, *FOUR, "seeds=[0]", "output_dir=out") == 0
    before = (here / "out" / "results.jsonl").read_bytes()
    assert compare(monkeypatch, *FOUR, "output_dir=out", *arguments) == 1
    assert message in capfd.readouterr().err
    assert (here / "out" / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_results_of_other_versions_are_not_added_to(here, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setenv("QUICK_VERSIONS", json.dumps({**report.versions(), "torch": "1.0"}))
        assert compare(monkeypatch, *FOUR, "output_dir=out") == 0
    before = (here / "out" / "results.jsonl").read_bytes()
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 0  # nothing is missing: only a report
    assert compare(monkeypatch, *FOUR, "output_dir=out", "seeds=[0,1,2]") == 1
    assert "holds results made with torch 1.0; here it is otherwise" in capfd.readouterr().err
    assert (here / "out" / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_arm_whose_file_has_changed_is_not_mixed_with_itself(here, monkeypatch, capfd):
    file = here / "own" / "norm" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("_target_: torch.nn.GroupNorm\nnum_groups: 2\n")
    arguments = ["per_rank_batch_sizes=[2]", "seeds=[0]", "output_dir=out", "select_lr=null"]
    for folder in (["--config-dir", "own"], ["hydra.searchpath=[file://own]"]):
        assert compare(monkeypatch, *folder, "arms=[mine]", *arguments) == 0
    [row] = rows_of(here / "out").values()
    assert row["norm"] == {"_target_": "torch.nn.GroupNorm", "num_groups": 2}
    assert f"hydra.searchpath=['file://{here / 'own'}']" in (here / "out/cells/mine-w4-p2-s0/log.txt").read_text()
    file.write_text("_target_: torch.nn.GroupNorm\nnum_groups: 4\n")
    before = (here / "out" / "results.jsonl").read_bytes()
    assert compare(monkeypatch, *folder, "arms=[bn,mine]", *arguments) == 1
    assert "results of another arm 'mine'" in capfd.readouterr().err
    assert (here / "out" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("FAILS", "RuntimeError: no luck today"),
        pytest.param("KILLED", "ended by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_failed_cell_is_told_and_tried_again_by_the_next_run(here, monkeypatch, capfd, how, reason):
    with monkeypatch.context() as patch:
        patch.setenv(f"QUICK_{how}", "syncbn-w4-p2-s0")
        assert compare(monkeypatch, *FOUR, "output_dir=out") == 1
    rows = rows_of(here / "out")
    failed = rows.pop("syncbn-w4-p2-s0")
    assert failed["status"] == "failed"
    assert reason in failed["reason"]
    assert failed["command"]
    assert {row["status"] for row in rows.values()} == {"done"}
    out = capfd.readouterr().out
    assert f"syncbn-w4-p2-s0: failed: {failed['reason']}" in out
    assert out.splitlines()[-1].startswith("report: ")
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 0
    assert {row["status"] for row in rows_of(here / "out").values()} == {"done"}
    assert len((here / "out" / "results.jsonl").read_bytes().splitlines()) == 1 + 4 + 1
    out = capfd.readouterr().out
    assert "4/4 syncbn-w4-p2-s0: test error" in out
    assert "failed" not in out


def test_a_cell_that_came_to_nan_is_no_number(here, monkeypatch, capfd):
    monkeypatch.setenv("QUICK_NAN", "-s1")
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 0
    row = rows_of(here / "out")["bn-w4-p2-s1"]
    assert row["test_loss"] is None
    assert set(row["curve"]["loss"]) == {None}
    assert "bn-w4-p2-s1: test error no number" in capfd.readouterr().out


@pytest.mark.slow
def test_cells_use_the_cores_once(here, monkeypatch):
    """Three cells wait: not more than `jobs` are there at once, each with its part of the threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    seen = []

    class Counted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            seen.append((self, sum(other.poll() is None for other, _ in seen) + 1))

    monkeypatch.setattr(subprocess, "Popen", Counted)
    assert compare(monkeypatch, *FOUR, "seeds=[0,1,2]", "output_dir=out") == 0
    assert len(seen) == 6
    assert max(number for _, number in seen) == 2
    logs = [path.read_text() for path in (here / "out").rglob("log.txt")]
    assert all("threads: 3\n" in log for log in logs)


def test_an_interrupt_ends_the_cells_and_keeps_what_is_done(here, monkeypatch, capfd):
    monkeypatch.setenv("QUICK_WAITS", "-s1")
    out = here / "out"

    def interrupt():
        wait_until(lambda: len(rows_of(out)) == 2 and len(list(out.rglob("pid"))) == 4)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it from birth
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 130
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert "stopped with 2 of 4 cells done; the same command goes on" in capfd.readouterr().out
    assert not any(lives(int(path.read_text())) for path in out.rglob("pid"))
    assert sorted(rows_of(out)) == ["bn-w4-p2-s0", "syncbn-w4-p2-s0"]
    monkeypatch.delenv("QUICK_WAITS")
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 0


@pytest.mark.parametrize(
    "argument",
    ["arms=[]", "arms=[batchnorm]", "per_rank_batch_sizes=[3]", "arms=[syncbn_4] world_sizes=[2]", "jobs=0"],
)
def test_bad_input_ends_before_anything_is_written(here, monkeypatch, capfd, argument):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert compare(monkeypatch, *argument.split()) == 1
    assert "ValueError: " in capfd.readouterr().err
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["with 'quotes', a=b and [1]", "back\\slash\\"])
def test_any_folder_will_do(here, monkeypatch, name):
    assert compare(monkeypatch, *FOUR, "seeds=[0]", f"output_dir={quoted(name)}") == 0
    assert len(rows_of(here / name)) == 2
    assert [path.name for path in here.iterdir()] == [name]


@pytest.mark.slow
def test_a_killed_comparison_takes_its_cells_along_and_goes_on(here, monkeypatch, capfd):
    """SIGKILL, in a pseudo terminal where the live table is; the cells see the end of their standard input."""
    assert compare(monkeypatch, *FOUR, "output_dir=whole") == 0
    out = here / "out"
    ours, theirs = pty.openpty()
    with monkeypatch.context() as patch:
        patch.setenv("QUICK_WAITS", "-s1")
        patch.setenv("TERM", "xterm")
        process = start(here, *FOUR, "output_dir=out", quick=True, stdout=theirs, stderr=theirs)
        os.close(theirs)
        wait_until(lambda: len(rows_of(out)) == 2 and len(list(out.rglob("pid"))) == 4)
        screen = b""
        while b"running: bn-w4-p2-s1 25%" not in screen:
            screen += os.read(ours, 65536)
        process.kill()
        process.wait()
    os.close(ours)
    assert b"2 of 4 cells done, about 0:0" in screen
    assert b"2 x 4 ranks" in screen
    wait_until(lambda: not any(lives(int(path.read_text())) for path in out.rglob("pid")), seconds=10)
    before = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(before + b'{"cell": "bn-w4-p2-s1", "arm')  # as if it had been writing
    capfd.readouterr()
    assert compare(monkeypatch, *FOUR, "output_dir=out") == 0
    assert "results.jsonl, line 4: incomplete (a run was killed)" in capfd.readouterr().out
    lines = (out / "results.jsonl").read_bytes().splitlines()
    assert lines[:3] == before.splitlines()
    rows = {row["cell"]: row for row in map(json.loads, [*lines[1:3], *lines[4:]])}
    assert untimed(rows) == untimed(rows_of(here / "whole"))


@pytest.mark.slow
def test_real_cells_one_of_which_fails(tmp_path):
    """The user's command, without a display: 8 groups do not divide 12 channels, and the other arm goes on."""
    grid = ["arms=[gn,bn]", "per_rank_batch_sizes=[2]", "seeds=[3]", *SMALL, "model.width=12"]
    process = start(tmp_path, *grid, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (1, "")
    out = tmp_path / "outputs" / "compare"
    rows = rows_of(out)
    gn, bn = rows["gn-w4-s3"], rows["bn-w4-p2-s3"]
    assert gn["status"] == "failed"
    assert gn["reason"].startswith("ValueError: ")
    assert "num_groups=8 does not divide its 12 channels" in gn["reason"]
    lines = stdout.splitlines()
    assert {line.split(":")[0] for line in lines[:2]} <= {f"{n}/2 {cell}" for n in (1, 2) for cell in rows}
    assert lines[-1] == "report: outputs/compare/index.html"
    assert "\x1b" not in stdout

    [run] = (out / "cells" / bn["cell"]).glob("*/results.json")
    theirs = json.loads(run.read_text())
    same = {
        "score",
        "test_accuracy",
        "test_loss",
        "train_error",
        "evaluations",
        "lr",
        "num_steps",
        "device",
        "versions",
    }
    assert {name: bn[name] for name in same} == {name: theirs[name] for name in same}
    assert (theirs["seed"], theirs["simulate"], theirs["accumulate"]) == (3, 4, 2)
    assert bn["curve"]["step"] == [0, 1, 2, 3]
    assert "--" not in bn["command"]
    files = files_in(out)
    assert {"index.html", "results.csv", "summary.csv", "results.jsonl"} <= files
    assert not [name for name in files if "checkpoint" in name or "outputs" in name]
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "outputs"}


def finished(folder, *arguments):
    process = start(folder, *SMALL, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed_twice_and_started_again_equals_an_uninterrupted_run(tmp_path):
    grid = ["arms=[bn,syncbn,gn]", "per_rank_batch_sizes=[1]", "seeds=[0,1]", "jobs=2"]
    finished(tmp_path, *grid, "output_dir=whole")
    out = tmp_path / "out"
    for num_done in (1, 3):
        process = start(tmp_path, *SMALL, *grid, "output_dir=out", stdout=subprocess.DEVNULL)
        wait_until(lambda number=num_done: len(rows_of(out)) >= number, seconds=300)
        wait_until(lambda parent=process.pid: len(children_of(parent)) >= 1)
        cells = children_of(process.pid)
        process.kill()
        process.wait()
        wait_until(lambda pids=cells: not any(map(lives, pids)), seconds=30)
        assert len(rows_of(out)) < 6
    finished(tmp_path, *grid, "output_dir=out")
    assert untimed(rows_of(out)) == untimed(rows_of(tmp_path / "whole"))
    assert len(rows_of(out)) == 6

    row = rows_of(out)["syncbn-w4-p1-s1"]
    threads, word, script, *arguments = shlex.split(row["command"])
    assert (threads, word, script) == (f"OMP_NUM_THREADS={row['num_threads']}", "python", "launch/train.py")
    environment = {**os.environ, "SYNCBN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": str(row["num_threads"])}
    subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, env=environment, check=True)
    [alone] = (tmp_path / "outputs").glob("*/results.json")
    assert json.loads(alone.read_text())["evaluations"] == row["evaluations"]


@pytest.mark.slow
def test_real_ranks_give_what_one_process_simulates(tmp_path):
    grid = ["arms=[bn,syncbn]", "per_rank_batch_sizes=[2]", "world_sizes=[2]", "seeds=[0]"]
    finished(tmp_path, *grid, "output_dir=one")
    finished(tmp_path, *grid, "engine=torchrun", "output_dir=many")
    one, many = rows_of(tmp_path / "one"), rows_of(tmp_path / "many")
    assert one.keys() == many.keys()
    for cell, row in many.items():
        assert row["command"].startswith("OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 launch/train.py ")
        assert "simulate=" not in row["command"]
        assert (row["engine"], one[cell]["engine"]) == ("torchrun", "simulate")
        for name in ("world_size", "accumulate", "global_batch_size", "num_steps", "lr"):
            assert row[name] == one[cell][name]
        for mode, evaluation in row["evaluations"].items():
            assert evaluation == pytest.approx(one[cell]["evaluations"][mode], rel=1e-4), (cell, mode)  # float32


@pytest.mark.slow
def test_a_killed_comparison_takes_real_ranks_along(tmp_path):
    grid = ["arms=[syncbn]", "per_rank_batch_sizes=[2]", "world_sizes=[2]", "seeds=[0]", "engine=torchrun"]
    long = [*SMALL, "trainer.max_epochs=1000"]
    process = start(tmp_path, *long, *grid, "output_dir=out", stdout=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / "out").rglob("progress")), seconds=300)
    ranks = children_of(process.pid)
    assert len(ranks) >= 3  # torchrun and two ranks
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(lives, ranks)), seconds=60)
