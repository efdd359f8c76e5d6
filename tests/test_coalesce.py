"""Several layers with one exchange: the function, and torchvision's residual blocks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_functional import Collectives

import syncbn
from syncbn.functional import sync_batch_norm_coalesced

FEATURES = (3, 5, 2)
SHAPES = [[(2, 3, 4, 4), (2, 5, 2), (3, 2)], [(1, 3, 4, 4), (0, 5, 2), (1, 2)]]  # by rank; the second has none of one


def draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=torch.float64) * 2 + 1 for s in rank] for rank in shapes]


def parameters():
    generator = torch.Generator().manual_seed(9)
    rows = [[torch.rand(c, generator=generator, dtype=torch.float64) + 0.5 for c in FEATURES] for _ in range(4)]
    return rows  # running means and variances, weights, biases


def coalesced(rank, world_size, xs, dys, create_graph):
    means, variances, weights, biases = parameters()
    weights[1].requires_grad_(), biases[1].requires_grad_(), weights[0].requires_grad_()
    inputs = [x.clone().requires_grad_(i != 2) for i, x in enumerate(xs[rank])]  # the third asks for no gradient
    with Collectives() as seen:
        ys = sync_batch_norm_coalesced(inputs, means, variances, weights, biases, True, 0.3, 1e-3)
        loss = sum((y * y * dy).sum() for y, dy in zip(ys, dys[rank], strict=True))
        wanted = [inputs[0], inputs[1], weights[0], weights[1], biases[1]]
        grads = torch.autograd.grad(loss, wanted, create_graph=create_graph)
        if create_graph:
            second = torch.autograd.grad(sum(g.square().sum() for g in grads[:2]), inputs[:2])
            return [s.detach() for s in second]
    return [y.detach() for y in ys], [g.detach() for g in grads], means + variances, seen.seen


def expected(xs, dys, create_graph):
    means, variances, weights, biases = parameters()
    weights[1].requires_grad_(), biases[1].requires_grad_(), weights[0].requires_grad_()
    inputs = [torch.cat(parts).requires_grad_() for parts in zip(*xs, strict=True)]
    dys = [torch.cat(parts) for parts in zip(*dys, strict=True)]
    rows = zip(inputs, means, variances, weights, biases, strict=True)
    ys = [F.batch_norm(*row, True, 0.3, 1e-3) for row in rows]
    loss = sum((y * y * dy).sum() for y, dy in zip(ys, dys, strict=True))
    wanted = [inputs[0], inputs[1], weights[0], weights[1], biases[1]]
    grads = torch.autograd.grad(loss, wanted, create_graph=create_graph)
    if create_graph:
        return torch.autograd.grad(sum(g.square().sum() for g in grads[:2]), inputs[:2])
    return ys, grads, means + variances


def test_numbers_are_those_of_one_process_with_one_exchange_each_way(run):
    xs, dys = draw(SHAPES, 1), draw(SHAPES, 2)
    ys, grads, statistics = expected(xs, dys, False)
    results = run(coalesced, 2, xs, dys, False)
    for i, y in enumerate(ys):
        torch.testing.assert_close(torch.cat([found[0][i] for found in results]), y.detach(), rtol=1e-10, atol=1e-12)
    for i, grad in enumerate(grads):
        parts = [found[1][i] for found in results]
        whole = torch.cat(parts) if i < 2 else sum(parts)  # inputs are split, parameters' gradients summed
        torch.testing.assert_close(whole, grad, rtol=1e-10, atol=1e-11)
    for found in results:
        torch.testing.assert_close(found[2], statistics, rtol=1e-10, atol=1e-12)
        num_forward, num_backward = sum(2 * c + 1 for c in FEATURES), 2 * (3 + 5)
        assert [(name, size) for name, size, _ in found[3]] == [
            ("allgather_base", num_forward),
            ("allgather_base", num_backward),
        ]


def test_second_order(run):
    xs, dys = draw(SHAPES, 3), draw(SHAPES, 4)
    results = run(coalesced, 2, xs, dys, True)
    for i, want in enumerate(expected(xs, dys, True)):
        torch.testing.assert_close(torch.cat([found[i] for found in results]), want, rtol=1e-8, atol=1e-9)


def mixed(rank, world_size):
    one = [torch.full((1, 2), 1.0 + rank), torch.randn(2, 3, 4).bfloat16()]
    running = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    ys = sync_batch_norm_coalesced(one, *running, training=True)
    evaluated = sync_batch_norm_coalesced(one, *running)
    return [y.dtype for y in ys], ys[0], running[0][0], [y.shape for y in evaluated]


def test_dtypes_differ_and_eval_is_local(run):
    for rank, (dtypes, y, mean, shapes) in enumerate(run(mixed, 2)):
        assert dtypes == [torch.float32, torch.bfloat16]
        torch.testing.assert_close(y, torch.full((1, 2), 1.0 if rank else -1.0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean, torch.full((2,), 0.15))
        assert shapes == [(1, 2), (2, 3, 4)]


def test_bad_input():
    x, none = torch.randn(2, 3), [None, None]
    with pytest.raises(ValueError, match=r"got 2 inputs, 1 running_means, 2 running_vars, 2 weights, 2 biases"):
        sync_batch_norm_coalesced([x, x], [None], none, training=True)
    with pytest.raises(ValueError, match="of one device, got cpu, meta"):
        sync_batch_norm_coalesced([x, x.to("meta")], none, none, training=True)
    with pytest.raises(ValueError, match="eps to be positive"):
        sync_batch_norm_coalesced([x, x], none, none, training=True, eps=0)
    assert sync_batch_norm_coalesced([], [], [], training=True) == ()


@pytest.fixture
def torchvision():
    """Skip here, not in the ranks' processes."""
    return pytest.importorskip("torchvision.models", reason="torchvision does not import beside this torch")


def resnets(arch):
    from torchvision import models

    torch.manual_seed(0)
    return getattr(models, arch)(num_classes=4).double()


def train_resnet(rank, world_size, arch, together):
    model = syncbn.convert(resnets(arch))
    if together:
        assert syncbn.coalesce(model) is model
    torch.manual_seed(rank)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with Collectives() as seen:
        y = model(x)
        (y * torch.linspace(0, 1, 4, dtype=torch.float64)).square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    return y.detach(), gradients, dict(model.state_dict()), len(seen.seen)


@pytest.mark.parametrize(
    ("arch", "num_apart", "num_together"),
    [("resnet18", 40, 34), pytest.param("resnet50", 106, 98, marks=pytest.mark.slow)],
)
def test_residual_blocks_exchange_less_and_compute_the_same(run, torchvision, arch, num_apart, num_together):
    apart, together = (run(train_resnet, 2, arch, flag, timeout=120) for flag in (False, True))
    for one, other in zip(apart, together, strict=True):
        assert (one[3], other[3]) == (num_apart, num_together)
        torch.testing.assert_close(other[:3], one[:3], rtol=1e-8, atol=1e-10)


def watched(rank, world_size):
    block = resnets("resnet18").layer2[0]
    syncbn.coalesce(syncbn.convert(block))
    x, calls = torch.randn(2, 64, 4, 4, dtype=torch.float64), []
    hook = block.bn2.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for change in (lambda: None, hook.remove, block.bn2.eval, block.train):
        change()
        with Collectives() as seen:
            block(x)
        counts.append(len(seen.seen))
    return counts, len(calls)


def test_a_layer_with_hooks_or_in_eval_runs_by_itself(run, torchvision):
    for counts, num_calls in run(watched, 2):
        assert counts == [3, 2, 2, 2]  # bn1 and both; together; bn1 and the shortcut; together
        assert num_calls == 1


def test_blocks_copy_pickle_evaluate_convert_again_and_come_back(torchvision):
    model = resnets("resnet18").eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected, classes = model(x), [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    syncbn.coalesce(syncbn.coalesce(syncbn.convert(model)))
    changed = [type(m).__name__ for m in model.modules()]
    assert changed.count("CoalescedBlock") == 3
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
    assert list(model.state_dict()) == keys
    grouped = syncbn.convert(copy.deepcopy(model), "gn", num_groups=8)
    assert torch.isfinite(grouped(x)).all()
    syncbn.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("_syncbn_block" in m.__dict__ for m in model.modules())
    assert torch.equal(model(x), expected)


def compiled(rank, world_size):
    torch._dynamo.reset()
    block = resnets("resnet18").layer2[0]
    syncbn.coalesce(syncbn.convert(block))
    torch.manual_seed(rank)
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    expected = copy.deepcopy(block)(x)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    return y.detach(), expected.detach()


def test_a_block_compiles_without_graph_break(run, torchvision):
    for y, want in run(compiled, 2, timeout=120):
        torch.testing.assert_close(y, want)


def test_a_model_without_such_blocks_is_a_warning():
    with pytest.warns(UserWarning, match="found no BasicBlock or Bottleneck"):
        syncbn.coalesce(torch.nn.Linear(2, 2))
