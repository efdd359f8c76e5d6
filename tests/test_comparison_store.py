"""The results file: whatever a kill leaves of it is read, nothing in it is ever lost or mixed."""

import json
import multiprocessing
import random

import pytest

from experiment.comparison.results_file import Results

GRID = {"data": {"num_train": 64, "mean": [0.5, 1e-3]}, "model": {"width": 8}, "engine": "simulate", "node_size": None}
HERE = {"torch": "2.14", "python": "3.11.7", "device": "cpu"}


def row(cell, error=0.25, **more):
    versions = {"torch": "2.14", "python": "3.11.7", "platform": "any"}
    return {"cell": cell, "status": "done", "error": error, "device": "cpu", "versions": versions, **more}


def opened(path, grid=GRID, made_with=HERE):
    return Results(path, grid, made_with)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "results.jsonl"


@pytest.fixture
def filled(path):
    with opened(path) as results:
        for cell in "abc":
            results.append(row(cell))
    return path


def test_rows_come_back(path):
    rows = {cell: row(cell, 0.1, curve={"step": [1], "loss": [0.5]}, name="ü\n'\"\u2028") for cell in "abc"}
    with opened(path) as results:
        assert results.rows == {}
        for content in rows.values():
            results.append(content)
        assert results.rows == rows
    with opened(path) as results:
        assert (results.rows, results.notes, results.others) == (rows, [], [])
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"grid": GRID}, *rows.values()]


def test_the_last_line_of_a_cell_wins(filled):
    failed = {"cell": "b", "status": "failed", "reason": "x"}
    for last in (failed, row("b", 0.5)):
        with opened(filled) as results:
            results.append(last)
        with opened(filled) as results:
            assert results.rows["b"] == last
            assert len(results.rows) == 3
    assert len(filled.read_bytes().splitlines()) == 6


def test_numbers_that_are_none_become_null(path):
    with opened(path) as results:
        results.append(row("a", float("nan"), curve={"loss": [1.0, float("inf"), -float("inf")]}))
        assert results.rows["a"]["error"] is None
    with opened(path) as results:
        assert results.rows["a"] == row("a", None, curve={"loss": [1.0, None, None]})
    assert b"NaN" not in path.read_bytes()


def test_a_file_cut_anywhere_keeps_its_whole_lines(filled):
    whole = filled.read_bytes()
    starts = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]  # of the lines behind the first
    header, last = starts[0], starts[-2]
    cuts = {*range(last, len(whole) + 1), *range(header + 1)}  # of the last line, and of the first
    for cut in sorted(cuts | set(random.Random(0).sample(range(len(whole)), 50))):
        filled.write_bytes(whole[:cut])
        lines = whole[: cut + 1].splitlines(keepends=True) if whole[cut : cut + 1] == b"\n" else None
        kept = [line for line in (lines or whole[:cut].splitlines(keepends=True)) if line.endswith(b"\n")]
        half = cut > 0 and lines is None and whole[cut - 1 : cut] != b"\n"
        with opened(filled) as results:
            assert list(results.rows) == [json.loads(line)["cell"] for line in kept[1:]], cut
            assert len(results.notes) == half, cut
            assert all(f"line {len(kept) + 1}: incomplete" in note for note in results.notes)
            if cut >= header - 1:
                assert filled.read_bytes() == whole[:cut]  # opened alone changes nothing
            results.append(row("new"))
        after = filled.read_bytes()
        assert after.startswith(whole[:cut]), cut
        with opened(filled) as results:
            assert set(results.rows) == {*(json.loads(line)["cell"] for line in kept[1:]), "new"}, cut
            assert results.rows["new"] == row("new")
        assert filled.read_bytes() == after


@pytest.mark.parametrize("broken", [b"\x00\xff\xfe", b'{"cell": "b", "stat\xc3', b"[1, 2]", b"17", b""])
def test_a_broken_line_in_the_middle_costs_its_cell_alone(filled, broken):
    lines = filled.read_bytes().splitlines()
    lines[2] = broken
    filled.write_bytes(before := b"\n".join(lines) + b"\n")
    with opened(filled) as results:
        assert set(results.rows) == {"a", "c"}
        assert results.notes == ["results.jsonl, line 3: incomplete (a run was killed); what it held runs again"]
        results.append(row("b"))
    assert filled.read_bytes().startswith(before)
    with opened(filled) as results:
        assert set(results.rows) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "foreign",
    [
        b"cell,error\na,0.5\n",
        b'{"name": "package", "version": 1}\n',
        b'{\n  "results": []\n}\n',
        b"[]",
        b"17\n",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"\x00\x00\x00\x00",
        b"half a line",
        b'{"cell": "a", "status": "done"}\n',
        b'{"grid": 5}\n',
        b'{"grid": []}\n',
        b'{"grid": {}}\n',
        (json.dumps({"grid": GRID}) + '\n{"loss": 0.5}\n').encode(),
        (json.dumps({"grid": GRID}) + '\n{"cell": 5, "status": "done"}\n').encode(),
        (json.dumps({"grid": GRID}) + '\n{"cell": "a"}\n').encode(),
        (2 * (json.dumps({"grid": GRID}) + "\n")).encode(),
    ],
)
def test_a_foreign_file_is_refused_and_stays_as_it_is(tmp_path, foreign):
    path = tmp_path / "results.jsonl"
    path.write_bytes(foreign)
    for _ in range(2):
        with pytest.raises(ValueError, match="set output_dir"):
            opened(path)
        assert path.read_bytes() == foreign


def test_another_grid_is_refused_with_what_differs(filled):
    before = filled.read_bytes()
    other = {**GRID, "model": {"width": 16, "arch": "x"}, "data": {**GRID["data"], "num_train": 32}}
    with pytest.raises(ValueError, match="holds results of another grid; set output_dir") as error:
        opened(filled, other)
    assert str(error.value).splitlines()[1:] == [
        "  data.num_train: 64 there, 32 here",
        "  model.width: 8 there, 16 here",
        "  model.arch: None there, 'x' here",
    ]
    assert filled.read_bytes() == before
    with opened(filled) as results:  # the lock is free again
        assert len(results.rows) == 3


def hold(path, ready, end):
    with opened(path):
        ready.set()
        end.wait()


def test_one_process_at_a_time(filled):
    context = multiprocessing.get_context("forkserver")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(filled, ready, end))
    process.start()
    assert ready.wait(60)
    before = filled.read_bytes()
    with pytest.raises(ValueError, match=r"another comparison is writing to .*results.jsonl: wait for it, or set"):
        opened(filled)
    process.kill()  # its lock ends with it
    process.join(60)
    with opened(filled) as results:
        assert len(results.rows) == 3
    assert filled.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "others"),
    [
        ({}, []),
        ({"device": "cuda:3"}, ["device cuda"]),
        ({"versions": {"torch": "2.13", "python": "3.11.7"}}, ["torch 2.13"]),
        ({"versions": {"torch": "2.13"}, "device": "mps"}, ["torch 2.13, python None, device mps"]),
        ({"status": "failed", "versions": None}, []),
    ],
)
def test_rows_made_otherwise_are_told(path, changed, others):
    with opened(path) as results:
        results.append(row("a"))
        results.append({**row("b"), **changed})
        results.append({**row("c"), **changed})
    with opened(path) as results:
        assert results.others == others
        assert len(results.rows) == 3
