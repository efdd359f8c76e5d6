"""The layer against one process, over the matrix of splits, dtypes, shapes, layouts and options."""

from dataclasses import replace

import pytest
import torch
from oracle import Case, compare, make_case, run_case, truth
from ranks import RankError

pytestmark = pytest.mark.gpu

# Relative to the largest value: float64 and float32 as promised for mean/std <= 100; half types at the rounding of
# their own output (2^-8 and 2^-11), doubled for the rounding of dx after that of y's factors.
RTOL = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

SPLITS = {
    "even": lambda w: [2] * w,
    "uneven": lambda w: [1 + 2 * r for r in range(w)],
    "one empty": lambda w: [0 if r == w - 1 else 2 for r in range(w)],
    "all but one empty": lambda w: [3 if r == 0 else 0 for r in range(w)],
    "all empty": lambda w: [0] * w,
}
TAILS = {"2-D": (), "3-D": (5,), "4-D": (4, 3), "5-D": (2, 3, 2), "one pixel": (1, 1)}


def run_cases(rank, world_size, cases):
    return [run_case(rank, case) for case in cases]


def check(run, world_size, cases, rtol=None):
    results = run(run_cases, world_size, cases)
    for i, case in enumerate(cases):
        compare([result[i] for result in results], truth(case), case, rtol or RTOL[case.xs[0][0].dtype])


def shapes(split, world_size, tail, channels=3):
    return [(n, channels, *tail) for n in SPLITS[split](world_size)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_any_split_equals_one_process(run, world_size, split):
    cases = [
        make_case(shapes(split, world_size, tail), steps=2, dtype=dtype, layout=layout)
        for tail in TAILS.values()
        for dtype in (torch.float64, torch.float32)
        for layout in (None, "channels_last", "permuted", "strided")
        if sum(SPLITS[split](world_size)) != 1 or tail not in ((), (1, 1))
    ]
    check(run, world_size, cases)


def test_eight_ranks(run):
    check(run, 8, [make_case([(r % 3, 4, 3, 2) for r in range(8)], steps=2)])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_uneven_maps(run, world_size):
    shapes = [(r % 3, 3, 2 + r, 5 - r) for r in range(1, world_size + 1)]  # one rank is empty, from three ranks up
    check(run, world_size, [make_case(shapes, dtype=dtype) for dtype in (torch.float64, torch.float32)])


def test_groups_of_one_are_plain_batchnorm(run):
    whole = make_case([(2, 3, 4), (3, 3, 4)], layer={"process_group": 1})
    results = run(run_cases, 2, [whole])
    for rank, result in enumerate(results):
        alone = replace(whole, xs=[[xs[rank]] for xs in whole.xs], dys=[[dys[rank]] for dys in whole.dys])
        compare(result, truth(alone), alone, 1e-10)


@pytest.mark.parametrize("split", ["even", "uneven", "one empty"])
@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"bias": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"track_running_stats": False},
        {"eps": 1e-2},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_options(run, options, split):
    for world_size in (2, 3):
        sizes = shapes(split, world_size, (3, 2))
        check(
            run,
            world_size,
            [make_case(sizes, steps=3, layer=options, dtype=d) for d in (torch.float64, torch.float32)],
        )
    check(run, 1, [make_case([(4, 3, 2)], steps=3, layer=options)])


@pytest.mark.parametrize(
    "case",
    [{"frozen_weight": True}, {"x_requires_grad": False}, {"x_requires_grad": False, "frozen_weight": True}],
    ids=str,
)
def test_what_requires_grad(run, case):
    check(run, 2, [make_case(shapes("uneven", 2, (3, 2)), **case)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("param_dtype", ["float32", "half"])
@pytest.mark.parametrize("split", ["even", "uneven", "one empty"])
def test_half_types(run, dtype, param_dtype, split):
    param_dtype = torch.float32 if param_dtype == "float32" else dtype
    check(
        run,
        2,
        [
            make_case(shapes(split, 2, (8, 8)), dtype=dtype, param_dtype=param_dtype, layout=layout)
            for layout in (None, "channels_last")
        ],
    )


def test_one_value_per_rank(run):
    """BatchNorm1d at one sample per rank, and a 1x1 map: the group's count decides."""
    check(run, 2, [make_case([(1, 3), (1, 3)]), make_case([(1, 3, 1, 1), (1, 3, 1, 1)]), make_case([(1, 3), (2, 3)])])


def one_value(rank, world_size, tail):
    x = torch.ones(1 if rank == 1 else 0, 3, *tail)
    run_case(rank, Case([[x] * world_size], [[x] * world_size], dtype=torch.float32))


@pytest.mark.parametrize("tail", [(), (1, 1)])
def test_one_value_in_the_group_raises_on_every_rank(run, tail):
    with pytest.raises(RankError) as caught:
        run(one_value, 3, tail)
    errors = set(caught.value.errors.values())
    assert len(errors) == 1
    assert len(caught.value.errors) == 3
    kind, message = errors.pop()
    assert kind == "ValueError"
    assert message.startswith("Expected more than 1 value per channel when training, got ")


@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize(("ratio", "limit", "var_limit"), [(100, 2e-5, 2e-5), (1e3, 3e-4, 1e-4), (1e4, 3e-3, 1e-4)])
@pytest.mark.parametrize("split", ["even", "uneven", "one empty"])
def test_large_means(run, ratio, limit, var_limit, split, layout):
    """float32 output and dx within 3e-7 * mean/std, variance within 1e-4, up to mean/std = 1e4."""
    sizes, options = shapes(split, 2, (16, 16)), {"layer": {"momentum": 1.0}, "layout": layout}
    case = make_case(sizes, dtype=torch.float32, mean=ratio, std=1.0, **options)
    results, expected = run(run_cases, 2, [case]), truth(case)
    for rank, (result,) in enumerate(results):
        for what in ("y", "dx"):
            torch.testing.assert_close(result[what][0].double(), expected[what][0][rank], rtol=2e-5, atol=limit)
        variance = result["running_var"].double()
        torch.testing.assert_close(variance, expected["running_var"], rtol=var_limit, atol=0)


def test_an_outlier_does_not_spoil_the_variance(run):
    """The shift of the sums is taken from a few samples: one that lies 1e4 standard deviations off is among them."""
    case = make_case([(64, 3), (40, 3)], dtype=torch.float32, mean=0.0, std=1.0, layer={"momentum": 1.0})
    case.xs[0][0][0] += 1e4
    check(run, 2, [case])
