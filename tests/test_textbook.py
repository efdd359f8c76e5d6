"""The batch normalization that textbooks write by hand, with its own semantics, and a CNN with and without biases."""

import copy

import pytest
import torch
from oracle import make_case
from parity import num_values, run_cases, start, unbiased
from torch import nn

import syncbn


class ByHand(nn.Module):
    """Batch normalization of (N, C) and (N, C, H, W) as textbooks teach it.

    Whether gradients are recorded decides what normalizes, not train(); `momentum` is the share of the old value; the
    moving averages are plain attributes, and the moving variance is biased.
    """

    def __init__(self, num_features, num_dims, momentum=0.9, eps=1e-5):
        super().__init__()
        shape = (1, num_features) if num_dims == 2 else (1, num_features, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        self.beta = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.moving_mean, self.moving_var = torch.zeros_like(self.beta.data), torch.ones_like(self.beta.data)
        self.momentum, self.eps = momentum, eps

    def forward(self, x):
        mean, var = self.moving_mean, self.moving_var
        if torch.is_grad_enabled():
            dims = {2: 0, 4: (0, 2, 3)}[x.dim()]
            mean = x.mean(dims, keepdim=True)
            var = ((x - mean) ** 2).mean(dims, keepdim=True)
            self.moving_mean = self.momentum * self.moving_mean + (1 - self.momentum) * mean.detach()
            self.moving_var = self.momentum * self.moving_var + (1 - self.momentum) * var.detach()
        return self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta


TAILS = {2: (), 4: (4, 2)}


@pytest.mark.parametrize("num_dims", [2, 4])
@pytest.mark.parametrize("sizes", [(5,), (2, 4), (2, 0, 4), (1, 3, 0, 2)], ids=str)
def test_ranks_equal_the_layer_written_by_hand(run, sizes, num_dims):
    """With gradients, in training mode: its momentum 0.9 is our 0.1, its variance lacks Bessel's correction."""
    case = make_case([(size, 3, *TAILS[num_dims]) for size in sizes], steps=3, layer={"momentum": 0.1}, seed=num_dims)
    layer, moving_vars = ByHand(3, num_dims), []
    for parameter, value in zip((layer.gamma, layer.beta), start(case).values(), strict=True):
        parameter.data.copy_(torch.tensor(value).view_as(parameter))
    results = [result[0] for result in run(run_cases, len(sizes), [case])]
    for step, (xs, dys) in enumerate(zip(case.xs, case.dys, strict=True)):
        x = torch.cat(xs).requires_grad_()
        y = layer(x)
        (y * torch.cat(dys)).sum().backward()
        moving_vars.append(layer.moving_var.flatten())
        close(torch.cat([result["y"][step] for result in results]), y.detach())
        close(torch.cat([result["dx"][step] for result in results]), x.grad)
    close(sum(result["weight"] for result in results), layer.gamma.grad.flatten())
    close(sum(result["bias"] for result in results), layer.beta.grad.flatten())
    for result in results:
        close(result["running_mean"], layer.moving_mean.flatten())
        close(result["running_var"], unbiased(moving_vars, num_values(case), 0.1))
        assert (result["running_var"] - layer.moving_var.flatten()).abs().min() > 1e-3


def close(actual, wanted, rtol=1e-9):
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=1e-11)


def beside():
    """The layer written by hand and ours, both after one step on the same batch, and another batch."""
    generator = torch.Generator().manual_seed(3)
    first, x = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator) * 2 + 1
    by_hand, ours = ByHand(3, 2), syncbn.SyncBatchNorm(3, dtype=torch.float64)
    close(ours(first), by_hand(first))
    ours.running_var.copy_(by_hand.moving_var[0])  # without Bessel's correction
    return by_hand, ours, x


def test_without_gradients_it_uses_moving_averages_even_in_training_mode():
    """Ours uses the batch, and moves: train() decides."""
    by_hand, ours, x = beside()
    as_evaluated = copy.deepcopy(ours).eval()(x).detach()
    with torch.no_grad():
        y = by_hand.train()(x)
        close(y, as_evaluated)
        assert (ours.train()(x) - y).abs().max() > 0.1
    assert int(ours.num_batches_tracked) == 2


def test_in_eval_mode_with_gradients_it_uses_the_batch():
    """As for saliency maps, or where no_grad was forgotten; ours uses the running statistics, which stay."""
    by_hand, ours, x = beside()
    before, mean = by_hand.moving_mean.clone(), ours.running_mean.clone()
    y = by_hand.eval()(x)
    close(y, copy.deepcopy(ours).train()(x))
    assert (ours.eval()(x) - y).abs().max() > 0.1
    assert not torch.equal(by_hand.moving_mean, before)
    assert torch.equal(ours.running_mean, mean)


def test_its_moving_averages_are_not_saved():
    """Saved and loaded, it evaluates as if it had never been trained; ours evaluates as before."""
    by_hand, ours, x = beside()
    assert [*by_hand.state_dict()] == ["gamma", "beta"]
    loaded, ours_loaded = ByHand(3, 2), syncbn.SyncBatchNorm(3, dtype=torch.float64)
    loaded.load_state_dict(by_hand.state_dict())
    ours_loaded.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert (loaded(x) - by_hand(x)).abs().max() > 0.1
        assert torch.equal(ours_loaded.eval()(x), ours.eval()(x))


def cnn(bias):
    """Blocks of convolution, BatchNorm, ReLU and pooling, and a classifier; the weights are the same either way."""
    torch.manual_seed(0)
    blocks = []
    for ins, outs in ((2, 4), (4, 6)):
        conv = nn.Conv2d(ins, outs, 3, padding=1)
        nn.init.normal_(conv.bias)
        if not bias:
            conv.register_parameter("bias", None)
        blocks.append(nn.Sequential(conv, nn.BatchNorm2d(outs), nn.ReLU(), nn.MaxPool2d(2)))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()


def test_audit_lists_the_biases_before_batch_norm():
    images = torch.randn(8, 2, 8, 8, dtype=torch.float64)
    for model in (cnn(bias=False), syncbn.convert(cnn(bias=False))):
        assert syncbn.audit(model, images, 2, 4).redundant_biases == []
    for model in (cnn(bias=True), syncbn.convert(cnn(bias=True))):
        assert syncbn.audit(model, images, 2, 4).redundant_biases == ["0.0.bias", "1.0.bias"]


def cnn_rank(rank, world_size, sizes, bias):
    """Outputs, gradients by name, and running statistics of a converted CNN on this rank's images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(sizes), 2, 8, 8, dtype=torch.float64, generator=generator).split(sizes)[rank]
    weights = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator).split(sizes)[rank]
    model = syncbn.convert(cnn(bias))
    y = model(images)
    (y * weights).sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def test_a_bias_before_batch_norm_changes_nothing(run):
    """It moves into the running mean. Its gradient is zero over all ranks; one rank's part of it is not."""
    with_bias, without = (run(cnn_rank, 3, (3, 0, 2), bias) for bias in (True, False))
    for (y, gradients, buffers), (wanted, wanted_gradients, wanted_buffers) in zip(with_bias, without, strict=True):
        close(y, wanted)
        for name, gradient in wanted_gradients.items():
            close(gradients[name], gradient)
        for block in ("0.1", "1.1"):
            close(buffers[f"{block}.running_var"], wanted_buffers[f"{block}.running_var"])
            assert (buffers[f"{block}.running_mean"] - wanted_buffers[f"{block}.running_mean"]).abs().max() > 0.01
    total = {name: sum(result[1][name] for result in with_bias) for name in with_bias[0][1]}
    for block in ("0.0", "1.0"):
        largest = total[f"{block}.weight"].abs().max()
        assert total[f"{block}.bias"].abs().max() < 1e-12 * largest
        assert with_bias[0][1][f"{block}.bias"].abs().max() > 1e-3 * largest
        assert largest > 0.1
