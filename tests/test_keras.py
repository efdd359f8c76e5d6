"""SyncBatchNorm beside Keras' BatchNormalization: on the joined batch, and synchronized by TensorFlow."""

import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import oracle
import pytest
import torch
from oracle import make_case, run_case
from parity import compare, draw_case, expected, in_keras_words, joined, num_values, run_cases
from witnesses import ask

import syncbn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed"),
]
SEED = 1000 * int(os.environ.get("PROPERTY_SEED", "0"))


def ask_keras(cases, axes):
    return ask("keras_witness.py", [in_keras_words(case, axis) for case, axis in zip(cases, axes, strict=True)])


def test_any_split_equals_keras_on_the_joined_batch(run):
    """Outputs, gradients and moving statistics of three steps: drawn shapes, splits, axes, arguments and dtypes."""
    cases = [draw_case(SEED + seed) for seed in range(24)]
    cases += [draw_case(SEED + seed, dtype=torch.float32) for seed in range(24, 48)]
    half = {"dtype": torch.float16, "param_dtype": torch.float32}
    cases += [draw_case(SEED + seed, **half) for seed in range(48, 56)]
    axes = [1 if seed % 3 else -1 for seed in range(len(cases))]
    answers = ask_keras(cases, axes)
    for world_size in (1, 2, 3, 4):
        chosen = [i for i, case in enumerate(cases) if len(case.xs[0]) == world_size]
        results = run(run_cases, world_size, [cases[i] for i in chosen])
        for k, i in enumerate(chosen):
            wanted = expected(answers[i], cases[i], axes[i])
            compare([result[k] for result in results], wanted, cases[i])


KERAS_DEFAULTS = {"eps": 1e-3, "momentum": 0.01}


def test_what_keras_defaults_mean(run):
    """Keras' momentum is the share of the old value, its eps 1e-3: with others, the results differ."""
    case = make_case([(2, 3, 4), (0, 3, 4), (1, 3, 4)], steps=4, std=0.1, layer=KERAS_DEFAULTS)
    described = in_keras_words(case, 1)
    del described["epsilon"], described["momentum"]
    [answer] = ask("keras_witness.py", [described])
    others = [replace(case, layer=KERAS_DEFAULTS | wrong) for wrong in ({"eps": 1e-5}, {"momentum": 0.99})]
    right, *wrong = zip(*run(run_cases, 3, [case, *others]), strict=True)
    wanted = expected(answer, case, 1)
    compare(right, wanted, case)
    for results in wrong:
        with pytest.raises(AssertionError, match="is off by"):
            oracle.compare(results, wanted, case, 1e-3)


def test_moving_variance_is_biased(run):
    """One step from 1: Keras adds the variance that it divides by, torch and syncbn n / (n - 1) of it."""
    case = make_case([(1, 3, 2), (2, 3, 2)], layer=KERAS_DEFAULTS)
    [answer] = ask_keras([case], [1])
    ours = run(run_cases, 2, [case])[0][0]["running_var"] - 0.99
    theirs = torch.tensor(answer["variables"][0]["moving_variance"]) - 0.99
    assert num_values(case) == 6
    torch.testing.assert_close(ours, theirs * 6 / 5, rtol=1e-9, atol=0)


def frozen_rank(rank, world_size, case, statistics):
    layer = syncbn.SyncBatchNorm(case.num_features, dtype=case.dtype, **case.layer)
    layer.load_state_dict(statistics, strict=False)
    return run_case(rank, case, syncbn.freeze(layer).train())


def test_not_trainable_means_eval_statistics(run):
    """Keras' trainable=False, though called with training=True, is our `freeze`."""
    case = make_case([(2, 3, 4), (3, 3, 4)], steps=2, layer={"eps": 1e-3, "momentum": 0.5})
    statistics = {"running_mean": torch.tensor([0.5, 1, 2]), "running_var": torch.tensor([0.5, 1, 2])}
    described = in_keras_words(case, 1)
    described["weights"] |= {"moving_mean": np.array([0.5, 1, 2]), "moving_variance": np.array([0.5, 1, 2])}
    answers = ask("keras_witness.py", [described | {"training": False}, described | {"trainable": False}])
    results = run(frozen_rank, 2, case, statistics)
    compare(results, expected(answers[0], case, 1, training=False), case)
    for what in ("y", "dx"):
        assert np.array_equal(answers[0][what], answers[1][what])
    assert answers[1]["gradients"] == [{}, {}]


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="tensorflow is not installed")
def test_three_ranks_equal_three_replicas_of_tensorflow(run):
    """synchronized=True under MirroredStrategy, whose replicas may be uneven or empty, too."""
    seeds = [seed for seed in range(SEED, SEED + 40) if 1 + seed % 4 == 3]
    cases = [draw_case(seed, dtype=dtype) for seed in seeds for dtype in (torch.float64, torch.float32)]
    axes = [1 if i % 3 else -1 for i in range(len(cases))]
    answers = ask("tensorflow_witness.py", [in_replicas(case, axis) for case, axis in zip(cases, axes, strict=True)])
    results = run(run_cases, 3, cases)
    for k, case in enumerate(cases):
        wanted = expected(answers[k], case, axes[k])
        compare([result[k] for result in results], wanted, case)


def in_replicas(case, axis):
    """Keep the ranks' parts apart; on TensorFlow, Keras computes in float64 where it is asked to."""
    described = in_keras_words(case, axis) | {"xs": [], "dys": []}
    del described["float64"]
    for name, steps in (("xs", case.xs), ("dys", case.dys)):
        described[name] = [[joined([part], axis) for part in step] for step in steps]
    return described
