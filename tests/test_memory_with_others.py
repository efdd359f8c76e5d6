"""save_memory and others: several passes, hooks, changes in place, errors, threads, ranks, compile."""

import copy
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from memory_models import Residual, Steps, activate, assert_equal, backward, check, images, kept_bytes, vary
from test_functional import Collectives
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import private
from syncbn.memory import save

pytestmark = pytest.mark.skipif(not private.can_see_hooks, reason="before torch 2.7 save_memory does nothing")


def double_backward(model, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    [gradient] = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (gradient**2).sum().backward()
    return [gradient.detach(), x.grad, *(p.grad for p in model.parameters())]


def several_passes(model, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    loss = (model(x) ** 3).sum()
    passes = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(3)]
    loss.backward()
    return [*passes, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("run", [double_backward, several_passes])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_several_backward_passes(run, activation):
    model = vary(Residual("right", 3, activation).double())
    theirs, x = copy.deepcopy(model), images(dtype=torch.float64)
    syncbn.save_memory(model)
    assert_equal(run(model, x), run(theirs, x))
    assert_equal(run(model, x), run(theirs, x))


class Checkpointed(nn.Module):
    """Parts of a model, some of them checkpointed; an activation stands at the edge of each."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for i, part in enumerate(self.parts):
            x = checkpoint(part, x, use_reentrant=self.use_reentrant) if i % 2 else part(x)
        return nn.functional.conv2d(x, self.parts[0][0].weight)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_within_and_around_a_model(use_reentrant):
    theirs, x = vary(Checkpointed(use_reentrant)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    for _ in range(2):
        assert_equal(backward(ours, x), backward(theirs, x))

    theirs = vary(Residual("right", 3))
    ours = syncbn.save_memory(copy.deepcopy(theirs))

    def around(model):
        return lambda x: checkpoint(model, x, use_reentrant=use_reentrant)

    assert_equal(backward(ours, x, around(ours)), backward(theirs, x, around(theirs)))


def test_hooks_of_others():
    theirs, x = vary(Residual("right", 2)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    backward(ours, x), backward(theirs, x)
    counted = {}
    for model in (ours, theirs):
        saved = counted[model] = []

        def pack(tensor, saved=saved):
            saved.append(tensor.nbytes)
            return tensor * 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        y.square().sum().backward()
    assert_equal([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert 0 < sum(counted[ours]) < sum(counted[theirs])


@pytest.mark.parametrize("name", ["save_on_cpu", "disable_saved_tensors_hooks"])
def test_contexts_of_torch_decide(name):
    arguments = ["none here"] if name.startswith("disable") else []
    theirs, x = vary(Residual("right", 2)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))

    def within(model):
        def run(x):
            with getattr(torch.autograd.graph, name)(*arguments):
                return model(x)

        return run

    assert_equal(backward(ours, x, within(ours)), backward(theirs, x, within(theirs)))


def changed(model, x, change):
    y = model(x)
    with torch.no_grad():
        change(model)
    y.square().sum().backward()


def test_what_is_changed_before_backward_is_refused_as_without():
    holder = {}

    class Holding(nn.Sequential):
        def forward(self, x):
            for module in self:
                x = module(x)
                holder[module] = x
            return x

    model = Holding(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    for change in (
        lambda model: model[1].weight.mul_(2),
        lambda model: holder[model[0]].add_(1),
        lambda model: model[3].weight.mul_(2),
    ):
        for each in (copy.deepcopy(model), syncbn.save_memory(copy.deepcopy(model))):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                changed(each, images().requires_grad_(), change)
    theirs, ours = copy.deepcopy(model), syncbn.save_memory(copy.deepcopy(model))
    for each in (theirs, ours):  # of these autograd keeps no more than numbers of the forward pass
        changed(each, images(), lambda model: model[1].bias.mul_(2))
    assert_equal([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_a_map_that_is_changed_before_the_next_module_is_not_taken_for_another():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act, self.next = (
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.SiLU(),
                nn.Conv2d(8, 2, 3),
            )

        def forward(self, x):
            y = self.act(self.norm(self.conv(x)))
            y *= 2
            y[:, 0] = 1
            return self.next(y) + self.next(y.flip(1))

    check(vary(Changing()), images())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_fails_leaves_nothing_behind(error):
    class Failing(nn.Module):
        fails = True

        def forward(self, x):
            if self.fails:
                raise error
            return x

    failing = Failing()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), failing, nn.ReLU(), nn.Conv2d(8, 2, 3))
    syncbn.save_memory(model)
    with pytest.raises(error):
        model(images())
    failing.fails = False
    check(model, images())
    assert no_hooks()


def test_threads_have_forward_passes_of_their_own():
    model, x = syncbn.save_memory(vary(Residual("right", 3)).eval()), images()
    expected, found = model(x).detach(), []
    backward(model, x)

    def work():
        for _ in range(5):
            y = model(x)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(y, expected) for y, *_ in found)
    for each in found[1:]:
        assert_equal(each, found[0])


def test_nothing_is_done_where_nothing_is_saved():
    model = syncbn.save_memory(vary(Residual("right", 2)).eval())
    with torch.no_grad():
        assert model(images()).grad_fn is None
    with torch.inference_mode():
        model(images())
    plain = vary(Residual("right", 2)).eval()
    torch.func.vmap(lambda x: model(x[None]))(images())
    parameters = dict(model.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, images()).square().sum())(parameters)
    expected = torch.func.grad(lambda p: torch.func.functional_call(plain, p, images()).square().sum())(parameters)
    assert_equal([*gradient.values()], [*expected.values()])


def test_compiled_it_does_nothing_and_says_so_once(monkeypatch):
    monkeypatch.setattr(save, "_told", set())
    theirs, x = vary(Residual("right", 2)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        found = backward(ours, x, compiled), backward(ours, x, compiled)
    told = [str(warning.message) for warning in caught if "save_memory" in str(warning.message)]
    assert told == ["syncbn.save_memory does nothing here: torch.compile recomputes by itself what costs little."]
    expected = backward(theirs, x)
    torch.testing.assert_close(found[0][:3], expected[:3])
    torch._dynamo.reset()


def of_ranks(rank, world_size, kind):
    torch.manual_seed(0)
    model = vary(Residual("in place", 6))
    xs = images(2 * world_size, 3, 8, 8).chunk(world_size)[rank]
    results = []
    for saves in (False, True):
        each = syncbn.convert(copy.deepcopy(model))
        if saves:
            syncbn.save_memory(each)
        run = torch.nn.parallel.DistributedDataParallel(each) if kind == "ddp" else each
        if kind == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for block in each.blocks:
                fully_shard(block)
            fully_shard(each)
        backward(each, xs, run)
        with Collectives() as seen:
            found = backward(each, xs, run)
        results.append((found, len(seen.seen), kept_bytes(each, xs)))
        del run
    (theirs, num_theirs, bytes_theirs), (ours, num_ours, bytes_ours) = results
    if kind == "fsdp2":
        ours, theirs = ([getattr(t, "_local_tensor", t) for t in found] for found in (ours, theirs))
    assert_equal(ours, theirs)
    assert num_ours == num_theirs
    assert bytes_ours < bytes_theirs
    return True


@pytest.mark.parametrize("kind", ["ddp", "bare", "fsdp2"])
def test_over_ranks_with_the_same_collectives(run, kind):
    assert run(of_ranks, 2, kind) == [True, True]


def clamp(model, y):
    with torch.no_grad():
        y.clamp_(max=0.5)
    return model.act(y)


def clamp_before_a_function(model, y):
    with torch.no_grad():
        y.clamp_(max=0.5)
    return F.relu(y)


def clamp_before_a_sum(model, y):
    with torch.no_grad():
        y.clamp_(max=0.5)
    return F.relu_(torch.add(y, 1.0) + y)


def quantize(model, y):
    y.data = (y.data * 4).round() / 4
    return model.act(y)


@pytest.mark.parametrize("between", [clamp, clamp_before_a_function, clamp_before_a_sum, quantize])
def test_a_change_that_autograd_did_not_record(between):
    check(vary(Steps(activate)), images())  # the kind is known
    theirs, x = vary(Steps(between)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    assert_equal(backward(ours, x), backward(theirs, x))


def no_hooks():
    return not private.top_saved_tensors_hooks(True)


def test_recursion_through_a_checkpoint():
    class Recursive(Steps):
        def forward(self, x, depth=2):
            x = self.act(self.norm(F.pad(self.conv(x), (1, 1, 1, 1))[:, :3]))
            return x if depth == 0 else checkpoint(self, x, depth - 1, use_reentrant=False)

    theirs = Recursive(None, nn.BatchNorm2d(3))
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    for _ in range(3):
        assert_equal(backward(ours, images())[:3], backward(theirs, images())[:3])
        assert no_hooks()


def test_after_an_interrupt_another_model_is_watched():
    def interrupt(model, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        syncbn.save_memory(Steps(interrupt))(images())
    check(vary(Steps(activate)), images())
    assert no_hooks()


def test_a_model_is_freed_without_the_garbage_collector():
    model = syncbn.save_memory(Residual("right", 2))
    backward(model, images())
    model = weakref.ref(model)
    assert model() is None


def test_forward_mode():
    theirs, x = vary(Residual("right", 2)).eval(), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    tangents = []
    for model in (ours, theirs):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent.detach())
    assert_equal(*[[tangent] for tangent in tangents])


def test_layers_that_checkpoint_themselves():
    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    class Act(nn.SiLU):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    theirs, x = Steps(activate, Norm(8)), images()
    theirs.act = Act()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    assert_equal(backward(ours, x)[:8], backward(theirs, x)[:8])
