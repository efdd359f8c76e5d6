"""Cases of oracle.py for the layers of other packages, and what those answer in our names and on our axis."""

import random

import numpy as np
import oracle
import torch
from oracle import initialize, make_case, run_case
from torch import nn
from versions import torch_norm

NAMES = {  # Keras' and flax'; flax' bias is called as ours
    "gamma": "weight",
    "scale": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "mean": "running_mean",
    "moving_variance": "running_var",
    "var": "running_var",
}
POLICIES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "mixed_float16"}
# float64 and float32 as the witnesses compute; half types: their own rounding, as in test_batchnorm.py.
RTOL = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 2**-10}
AFFINE = [{}, {"bias": False}, {"affine": False}]


def draw_case(seed, *, even=False, dtype=torch.float64, **options):
    """Draw a split over ``1 + seed % 4`` ranks, a shape and the layer's arguments; `even` gives four equal ranks."""
    generator, world_size = random.Random(seed), 1 + seed % 4
    sizes = [generator.randrange(5) for _ in range(world_size)]
    # others may be empty; of two values per channel, dx is a small difference of large numbers: for float64 alone
    sizes[generator.randrange(world_size)] += 2 if dtype == torch.float64 else 8
    sizes = [generator.randint(1, 4)] * 4 if even else sizes
    tail = generator.choice([(), (5,), (3, 4), (2, 3, 2)])
    arguments = {"eps": generator.choice([1e-5, 1e-3, 0.1]), "momentum": generator.choice([0.01, 0.1, 0.5, 1.0])}
    arguments |= generator.choice(AFFINE)
    num_features = generator.randint(1, 6)
    return make_case(
        [(size, num_features, *tail) for size in sizes], steps=3, dtype=dtype, seed=seed, layer=arguments, **options
    )


def joined(parts, axis):
    """Make one batch of the ranks' parts, with the channels on ``axis``."""
    return torch.cat(parts).movedim(1, axis).contiguous().numpy()


def start(case):
    """Give the weight and bias that `oracle.run_case` starts with, by our names."""
    layer = torch_norm(nn.BatchNorm1d, case.num_features, dtype=case.dtype, **case.layer)
    initialize(layer, case)
    return {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}


def in_keras_words(case, axis):
    """Say in Keras' words what a case is."""
    dtype, ours = case.xs[0][0].dtype, start(case)
    return {
        "xs": [joined(xs, axis) for xs in case.xs],
        "dys": [joined(dys, axis) for dys in case.dys],
        "axis": axis,
        "float64": dtype == torch.float64,
        "dtype": POLICIES[dtype],
        "epsilon": case.layer["eps"],
        "momentum": 1 - case.layer["momentum"],
        "scale": "weight" in ours,
        "center": "bias" in ours,
        "weights": {{"weight": "gamma", "bias": "beta"}[name]: value for name, value in ours.items()},
    }


def expected(answer, case, axis, training=True):
    """Translate a witness' lists over the steps into what `oracle.truth` gives."""
    sizes = [len(x) for x in case.xs[0]]
    found = {}
    for what in ("y", "dx"):
        tensors = [torch.tensor(step).double().movedim(axis, 1) for step in answer[what]]
        found[what] = [tensor.split(sizes) for tensor in tensors]
    for gradients in answer["gradients"]:
        for name, value in in_our_names(gradients).items():
            found[name] = found.get(name, 0) + value
    statistics = [in_our_names(variables) for variables in answer["variables"]]
    found["running_mean"] = statistics[-1]["running_mean"]
    theirs = [step["running_var"] for step in statistics]
    found["running_var"] = unbiased(theirs, num_values(case), case.layer["momentum"]) if training else theirs[-1]
    return found


def in_our_names(values):
    return {NAMES.get(name, name): torch.tensor(np.asarray(value)).double() for name, value in values.items()}


def num_values(case):
    return sum(x.numel() for x in case.xs[0]) // case.num_features


def unbiased(theirs, num_values, momentum, before=1.0):
    """Exchange the biased variance in moving variances, one per step, for the unbiased one that torch averages."""
    ours, keep, bessel = before, 1 - momentum, num_values / (num_values - 1)
    for after in theirs:
        ours, before = keep * ours + bessel * (after - keep * before), after
    return ours


def run_cases(rank, world_size, cases):
    return [run_case(rank, case) for case in cases]


def compare(results, wanted, case):
    """Compare the ranks' results with what `expected` gave, relative to the largest value."""
    rtol, wanted = RTOL[case.xs[0][0].dtype], dict(wanted)
    for name in (
        ("weight", "bias") if rtol > RTOL[torch.float64] else ()
    ):  # sums that may cancel: relative to the terms
        if name in wanted:
            total = sum(result[name].double() for result in results)
            terms = sum(dy.double().abs().sum() for dys in case.dys for dy in dys) / case.num_features
            assert (total - wanted[name]).abs().max() <= rtol * terms, f"{case.label}: sum of {name} gradients"
            wanted[name] = total
    oracle.compare(results, wanted, case, rtol)
