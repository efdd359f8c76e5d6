"""A test that hangs is a failure with a name, with the settings of pyproject.toml; here with limits of seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HANGS = """
import collections, itertools, threading

def test_first():
    pass

def test_hangs_in_python():
    threading.Event().wait()

def test_hangs_in_c():
    collections.deque(itertools.repeat(None), maxlen=0)  # handles no signal

def test_last():
    pass
"""


def run(folder, name):
    (folder / "test_hangs.py").write_text(HANGS)
    limits = ["-o", "timeout=1", "-o", "faulthandler_timeout=4", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), *limits]
    return subprocess.run(
        [*command, "-v", "test_hangs.py", "-k", f"first or last or {name}"],
        cwd=folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_others_go_on(tmp_path):
    done = run(tmp_path, "python")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "FAILED test_hangs.py::test_hangs_in_python - Failed: Timeout (>1.0s)" in done.stdout
    assert "threading.Event().wait()" in done.stdout  # the stack
    assert "1 failed, 2 passed" in done.stdout


@pytest.mark.slow
def test_what_no_signal_reaches_ends_the_run_with_its_stacks(tmp_path):
    done = run(tmp_path, "in_c")
    assert done.returncode != 0
    assert "in test_hangs_in_c" in done.stderr
    assert "test_hangs.py::test_hangs_in_c" in done.stdout.splitlines()[-1]
