"""The sentences that algebra decides, each beside a norm for which it does not hold."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from experiment.claims import algebra
from experiment.claims.algebra import SENTENCES, Check, output_and_gradients, relative

PAIR, X, DY = algebra._pair()


def by_numpy(weight, bias=None):
    """Convolution and normalization of the batch, in numpy."""
    x, weight = X.numpy(), weight.numpy()
    y = np.zeros((16, 8, 8, 8))
    for i in range(3):
        for j in range(3):
            y += np.einsum("nchw,oc->nohw", x[:, :, i : i + 8, j : j + 8], weight[:, :, i, j])
    y = y if bias is None else y + bias.numpy()[:, None, None]
    mean, var = y.mean((0, 2, 3), keepdims=True), y.var((0, 2, 3), keepdims=True)
    norm = PAIR[1]
    scale, shift = (p.detach().numpy()[:, None, None] for p in (norm.weight, norm.bias))
    return (y - mean) / np.sqrt(var + norm.eps) * scale + shift


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.name)
def test_all_of_them_hold(sentence):
    checks = sentence.measure()
    assert [check.quantity for check in checks if not check.holds] == []
    assert any(check.value > 0 for check in checks)  # measured, in floating point


def test_a_check_can_fail():
    assert not Check("", 2e-12, 1e-12).holds
    assert not Check("", float("nan"), 1e-12).holds


def test_output_equals_numpy_with_any_bias_and_scale():
    y, _ = output_and_gradients(PAIR, X, DY)
    weight = PAIR[0].weight.detach()
    np.testing.assert_allclose(y.numpy(), by_numpy(weight), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(y.numpy(), by_numpy(weight, PAIR[0].bias.detach() + 3), rtol=1e-9, atol=1e-11)
    change = np.abs(by_numpy(7 * weight) - by_numpy(weight)).max()
    assert 1e-8 < change < 1e-4  # by eps alone


def test_without_batch_norm_they_do_not_hold():
    """GroupNorm of one group does not see the scale, but does see a bias per channel; no norm sees both."""
    for norm, sees_scale in ((nn.GroupNorm(1, 8, 1e-30), False), (nn.Identity(), True)):
        net = nn.Sequential(copy.deepcopy(PAIR[0]), norm.double())
        nn.init.zeros_(net[0].bias)
        y, gradients = output_and_gradients(net, X, DY)
        assert gradients["bias"].abs().max() > 1e-3 * gradients["weight"].abs().max()
        with torch.no_grad():
            net[0].weight.mul_(7)
        z, others = output_and_gradients(net, X, DY)
        assert (relative(z, y) > 1e-6) == sees_scale
        assert (relative(7 * others["weight"], gradients["weight"]) > 1e-6) == sees_scale
