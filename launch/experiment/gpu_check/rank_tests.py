"""Parts `ranks_one_gpu` and `nccl_ranks`: the tests of the layer and of masks on several ranks, and a step under DDP.

On one GPU the ranks talk over gloo, which reduces CUDA tensors through the host; NCCL refuses to share a GPU.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from . import ddp_step
from .result import Outcome, Row, Table
from .runner import ROOT


def measure_shared(device: str) -> Outcome:
    """Run the matrix with one GPU visible, or on the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    rows, failures, num_passed = _run_tests(device, {"CUDA_VISIBLE_DEVICES": visible})
    errors, more = ddp_step.compare(device, "gloo", share=True)
    return _outcome(rows, failures + more, num_passed, errors, f"gloo, up to 8 ranks on one {device} device")


def measure_gpus(device: str) -> Outcome:
    """Run the matrix with all GPUs visible: NCCL for as many ranks as there are GPUs, gloo for more."""
    rows, failures, num_passed = _run_tests(device, {})
    errors, more = ddp_step.compare(device, "nccl", share=False)
    return _outcome(rows, failures + more, num_passed, errors, f"NCCL on up to {torch.cuda.device_count()} GPUs")


def _outcome(rows: list[Row], failures: list[str], num_passed: int, errors: list[Row], how: str) -> Outcome:
    worst = max((row["error"] / row["tolerance"] for row in errors), default=0.0)
    kernels = ", ".join(sorted({row["back end"] for row in errors}))
    summary = (
        f"{how}: {num_passed} tests passed; DDP step, 2 ranks, on {kernels}: worst error {worst:.2g} of the tolerance"
    )
    tables = [Table("Tests by function", rows), Table("A step under DDP against one process in float64", errors)]
    return Outcome(summary, tables, failures)


def _run_tests(device: str, more: dict[str, str]) -> tuple[list[Row], list[str], int]:
    """Run the tests in a process; return rows by test function, the failed tests, and how many passed."""
    environment = {**os.environ, **more, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins of others are not under test
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        files, options = (
            ["tests/test_batchnorm.py", "tests/test_masks.py"],
            ["-m", "gpu", "-v", "-p", "no:cacheprovider"],
        )
        command = [sys.executable, "-m", "pytest", *files, *options, "--device", device, f"--junitxml={path}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        cases = list(ElementTree.parse(path).iter("testcase")) if path.exists() else []
    rows, failures = _by_function(cases)
    num_passed = sum(row["passed"] for row in rows)
    if not num_passed or (done.returncode and not failures):
        failures.append(f"pytest ended with exit code {done.returncode}, {num_passed} tests passed; see its log")
    return rows, failures, num_passed


def _by_function(cases: list[ElementTree.Element]) -> tuple[list[Row], list[str]]:
    rows: dict[str, Row] = {}
    failures = []
    for case in cases:
        name = case.get("name", "")
        row = rows.setdefault(name.split("[")[0], {"test": name.split("[")[0], "passed": 0, "failed": 0})
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        row["failed" if problem is not None else "passed"] += 1
        if problem is not None:
            first = (problem.get("message") or problem.tag).strip().splitlines()
            failures.append(f"{name}: {problem.tag}: {_telling(problem.text or '') or first[0]}")
    return list(rows.values()), failures


def _telling(text: str) -> str:
    """Return the last line of a traceback that pytest marked as the error."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ") and line[1:].strip()]
    return marked[-1] if marked else ""
