"""Random programs on random splits of a batch, against nn.BatchNorm in float64 on one process.

Hypothesis draws a world size and a few `programs.Program` for it; each is plain data, printed when it fails and shrunk
to the least that still fails. The draw is the same every time; ``PROPERTY_SEED=1`` gives other cases.
"""

import os

import hypothesis
import pytest
import torch
from differences import differences
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from machines import run_programs
from programs import Do, Forward, Norm, Program

hypothesis.configuration.set_hypothesis_home_dir(os.devnull)  # nothing is kept between runs
SEED = int(os.environ.get("PROPERTY_SEED", "0"))
COMMON = settings(
    database=None,
    deadline=None,  # the machine may be busy
    phases=[Phase.generate],  # a failure says its program at once: shrinking it takes longer than a test may
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
LAYOUTS = ["contiguous", "channels_last", "permuted", "expanded", "offset", "sliced"]
CHANGES = [
    "backward",
    "eval",
    "train",
    "deepcopy",
    "pickle",
    "state_dict",
    "round_trip",
    "freeze_parameters",
    "thaw_parameters",
]

norms = st.builds(
    Norm,
    num_features=st.integers(1, 5),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
    momentum=st.sampled_from([0.1, None, 0.0, 1.0, 0.7]),
    affine=st.booleans().map(lambda no: not no),
    bias=st.booleans().map(lambda no: not no),
    track_running_stats=st.booleans().map(lambda no: not no),
    converted=st.booleans(),
)


def steps(world_size):
    forward = st.builds(
        Forward,
        sizes=st.tuples(*[st.integers(0, 4)] * world_size),
        layout=st.sampled_from(LAYOUTS),
        dy_layout=st.sampled_from(LAYOUTS),
        mode=st.sampled_from(["grad", "grad", "grad", "no_grad", "inference"]),
        requires_grad=st.booleans().map(lambda no: not no),
    )
    return st.lists(forward | forward | st.builds(Do, st.sampled_from(CHANGES)), min_size=1, max_size=8).map(tuple)


def groups(world_size):
    divisors = st.sampled_from([size for size in range(1, world_size + 1) if world_size % size == 0])
    labels = st.tuples(*[st.integers(0, 2)] * world_size)
    return st.none() | divisors | st.just("node") | st.tuples(st.just("mesh"), divisors) | labels


def programs(world_size):
    kernels = st.tuples(*[st.sampled_from(["reference", "auto"])] * 2)
    return st.builds(
        Program,
        norms=st.lists(norms, min_size=1, max_size=2).map(tuple),
        steps=steps(world_size),
        tail=st.lists(st.integers(1, 4), max_size=3).map(tuple),
        uneven_maps=st.booleans(),
        group=groups(world_size),
        dtypes=st.sampled_from(DTYPES),
        mean=st.sampled_from([0.5, 0.0, -30.0]),
        std=st.sampled_from([1.0, 0.01, 20.0]),
        kernels=st.tuples(*[kernels] * world_size),
        seed=st.integers(0, 3),
    )


batches = st.integers(1, 6).flatmap(
    lambda world_size: st.tuples(st.just(world_size), st.lists(programs(world_size), min_size=1, max_size=4))
)


def check(ranks, batch):
    world_size, some = batch
    results = ranks.run(run_programs, world_size, some)
    for program, mine in zip(some, zip(*results, strict=True), strict=True):
        found = differences(program, mine)
        if found:
            pytest.fail("\n".join(["", *found, f"of {program} on {world_size} ranks"]), pytrace=False)


@hypothesis.seed(SEED)
@settings(COMMON, max_examples=8)
@given(batch=batches)
def test_any_program_equals_one_process(ranks, batch):
    check(ranks, batch)


@pytest.mark.slow
@hypothesis.seed(SEED + 1)
@settings(COMMON, max_examples=200)
@given(batch=batches)
def test_hundreds_of_programs_equal_one_process(ranks, batch):
    check(ranks, batch)
