"""SyncBatchNorm on four gloo ranks beside flax' BatchNorm(axis_name) on four host devices, both in parts."""

import os
from importlib.util import find_spec

import pytest
import torch
from parity import compare, draw_case, expected, joined, run_cases, start
from witnesses import ask

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("flax") is None, reason="flax is not installed"),
]
SEED = 1000 * int(os.environ.get("PROPERTY_SEED", "0"))


def job(case, axis, **more):
    """Say in flax' words what a case is."""
    dtype, ours = case.xs[0][0].dtype, start(case)
    return more | {
        "xs": [joined(xs, axis) for xs in case.xs],
        "dys": [joined(dys, axis) for dys in case.dys],
        "axis": axis,
        "dtype": str(dtype).removeprefix("torch."),
        "param_dtype": str(dtype).removeprefix("torch."),
        "epsilon": case.layer["eps"],
        "momentum": 1 - case.layer["momentum"],
        "use_scale": "weight" in ours,
        "use_bias": "bias" in ours,
        "weights": {{"weight": "scale", "bias": "bias"}[name]: value for name, value in ours.items()},
    }


def test_four_ranks_equal_four_devices_of_flax(run):
    """Equal parts, as flax averages the devices' means; both of its formulas for the variance."""
    cases = [draw_case(SEED + seed, even=True) for seed in range(8)]
    cases += [draw_case(SEED + seed, even=True, dtype=torch.float32) for seed in range(8, 12)]
    axes = [1 if seed % 3 else -1 for seed in range(len(cases))]
    jobs = [
        job(case, axis, use_fast_variance=seed % 2 == 0)
        for seed, (case, axis) in enumerate(zip(cases, axes, strict=True))
    ]
    answers = ask("flax_witness.py", jobs)
    results = run(run_cases, 4, cases)
    for k, case in enumerate(cases):
        wanted = expected(answers[k], case, axes[k])
        compare([result[k] for result in results], wanted, case)
