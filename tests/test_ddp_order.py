"""Ranks whose graphs differ under DDP: its reductions and the exchanges must not wait for each other."""

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import compat
from syncbn.distributed import subgroups
from syncbn.distributed.exchange import group_of
from syncbn.distributed.groups import GroupSpec

DEPTH, WIDTH = 3, 4
UNUSED = {"find_unused_parameters": True}
TINY = {"bucket_cap_mb": 1e-6}  # one bucket per parameter
ADAPTERS = [f"{where}{i}" for i in range(DEPTH) for where in ("before", "after")]  # of a norm
# The adapters that each rank uses; the third rank is there in tests of three.
BEHIND = [{"before0"}, set(), set()]
IN_FRONT = [set(), {"after1"}, set()]
SEVERAL = [{"before0", "after1", "before2"}, {"after0", "before1"}, {"after2"}]


class Net(nn.Module):
    """Blocks of a linear layer and a norm, and adapters in front of each norm and behind it that a rank may leave out.

    ``is_adapter_first``: the adapters are registered first, so that their buckets come last. ``checkpoints``: None, or
    the variant of checkpointing.
    """

    def __init__(self, is_adapter_first=False, checkpoints=None):
        super().__init__()
        torch.manual_seed(0)
        parts = {
            "linears": nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]),
            "norms": nn.ModuleList([nn.BatchNorm1d(WIDTH) for _ in range(DEPTH)]),
            "adapters": nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ADAPTERS}),
        }
        for name in list(parts)[:: -1 if is_adapter_first else 1]:
            setattr(self, name, parts[name])
        self.checkpoints = checkpoints
        self.double()

    def forward(self, parts, used):
        """Run on ``parts``, the inputs of one rank or of all, each with the adapters that its rank has in ``used``."""
        x, sizes = torch.cat(parts), [len(part) for part in parts]
        for i in range(DEPTH):
            if self.checkpoints:
                x = checkpoint(self.block, i, x, sizes, used, use_reentrant=self.checkpoints == "reentrant")
            else:
                x = self.block(i, x, sizes, used)
        return x

    def block(self, i, x, sizes, used):
        x = self.norms[i](self.adapt(f"before{i}", self.linears[i](x), sizes, used))
        return self.adapt(f"after{i}", x, sizes, used).tanh()

    def adapt(self, name, x, sizes, used):
        parts = zip(x.split(sizes), used, strict=True)
        return torch.cat([self.adapters[name](part) if name in names else part for part, names in parts])


class AllUsed(Net):
    """What a rank leaves out it uses with weight 0, as plain DDP wants it."""

    def forward(self, parts, used):
        left_out = [self.adapters[name].weight.sum() for name in self.adapters if name not in used[0]]
        left_out += [self.adapters[name].bias.sum() for name in self.adapters if name not in used[0]]
        return super().forward(parts, used) + 0 * sum(left_out)


def inputs(step, world_size):
    generator = torch.Generator().manual_seed(step)
    parts = [torch.randn(3 + r, WIDTH, dtype=torch.float64, generator=generator) for r in range(world_size)]
    return [part.requires_grad_() for part in parts]  # reentrant checkpointing asks for it


def numbers(model):
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return gradients, [b.clone() for b in model.buffers()]


def one_process(world_size, plan, *args):
    """Return gradients, averaged as DDP does, and buffers for each step of ``plan``, which is what each rank uses."""
    model, found = Net(*args), []
    for step, used in enumerate(plan):
        model.zero_grad()
        model(inputs(step, world_size), used[:world_size]).pow(3).sum().div(world_size).backward()
        found.append(numbers(model))
    return found


def in_ddp(rank, world_size, plan, options, make=Net, spec=None):
    """Do on ranks what `one_process` does; ``spec`` "DDP's": the very group that DDP reduces in."""
    model = make()
    if spec == "DDP's":
        spec = dist.new_group()
        options = options | {"process_group": spec}
    options, is_static = dict(options), options.get("static_graph") == "later"
    if is_static:
        del options["static_graph"]
    ddp, found = DistributedDataParallel(syncbn.convert(model, process_group=spec), **options), []
    if is_static:
        ddp._set_static_graph()
    for step, used in enumerate(plan):
        model.zero_grad()
        ddp([inputs(step, world_size)[rank]], [used[rank]]).pow(3).sum().backward()
        found.append(numbers(model))
    return found


def assert_equal(results, expected):
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [TINY, {}, TINY | {"gradient_as_bucket_view": True}], ids=str)
@pytest.mark.parametrize("is_adapter_first", [False, True])
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_unused_parameters_of_some_ranks(run, world_size, is_adapter_first, options):
    for used in (BEHIND, IN_FRONT, SEVERAL):
        plan = [used, used[1::-1] + used[2:], used]
        expected = one_process(world_size, plan, is_adapter_first)
        assert_equal(run(in_ddp, world_size, plan, UNUSED | options, partial(Net, is_adapter_first)), expected)


@pytest.mark.parametrize("static_graph", [True, "later"])
@pytest.mark.parametrize("is_adapter_first", [False, True])
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_static_graphs_that_differ_between_ranks(run, world_size, is_adapter_first, static_graph):
    for used in (BEHIND, IN_FRONT, SEVERAL):
        options = {"static_graph": static_graph} | TINY
        expected = one_process(world_size, [used] * 4, is_adapter_first)
        assert_equal(run(in_ddp, world_size, [used] * 4, options, partial(Net, is_adapter_first)), expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_ddp_with_weight_0_for_what_a_rank_leaves_out(run, world_size):
    for used in (BEHIND, BEHIND[::-1], IN_FRONT, SEVERAL):
        expected = one_process(world_size, [used] * 3)
        assert_equal(run(in_ddp, world_size, [used] * 3, TINY, AllUsed), expected)


@pytest.mark.parametrize("spec", [2, "node", "DDP's"])
def test_groups_that_are_those_of_ddp(run, spec):
    expected = one_process(2, [SEVERAL] * 2)
    assert_equal(run(in_ddp, 2, [SEVERAL] * 2, UNUSED | TINY, Net, spec), expected)


@pytest.mark.parametrize("checkpoints", ["non-reentrant", "reentrant"])
def test_recomputation_stays_apart(run, checkpoints):
    """It runs in the backward pass, where no DDP module is in its forward pass any more."""
    options = TINY | ({"static_graph": True} if checkpoints == "reentrant" else UNUSED)
    for spec in (None, "DDP's"):
        expected = one_process(2, [SEVERAL] * 3)
        assert_equal(run(in_ddp, 2, [SEVERAL] * 3, options, partial(Net, False, checkpoints), spec), expected)


def with_order_check(rank, world_size, plan, options):
    with syncbn.debug.check_order(timeout=30):
        return in_ddp(rank, world_size, plan, options)


def test_the_order_check_finds_nothing(run):
    assert_equal(run(with_order_check, 2, [SEVERAL] * 2, UNUSED | TINY), one_process(2, [SEVERAL] * 2))


def in_pairs(rank, world_size):
    """Two data-parallel groups, each with DDP and layers in it; the second takes another number of steps."""
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    if rank < 2:
        dist.new_group([0, 1], use_local_synchronization=True)  # ranks have made different numbers of groups
    model, found = syncbn.convert(Net(), process_group=pair), []
    ddp = DistributedDataParallel(model, process_group=pair, **UNUSED, **TINY)
    for step in range(2 + rank // 2):
        model.zero_grad()
        ddp([inputs(step, 2)[rank % 2]], [SEVERAL[rank % 2]]).pow(3).sum().backward()
        found.append(numbers(model))
    return found


def test_groups_of_some_ranks(run):
    expected = one_process(2, [SEVERAL] * 3)
    for rank, found in enumerate(run(in_pairs, 4)):
        torch.testing.assert_close(found, expected[: 2 + rank // 2], rtol=1e-9, atol=1e-10)


def on_two_ranks_of_three(rank, world_size):
    """A twin that some ranks make must not disturb the groups that all make afterwards."""
    pair = dist.new_group([0, 1])
    if rank < 2:
        ddp = DistributedDataParallel(syncbn.convert(Net(), process_group=pair), process_group=pair, **UNUSED, **TINY)
        ddp([inputs(0, 2)[rank]], [SEVERAL[rank]]).pow(3).sum().backward()
    everyone, other = dist.new_group(), dist.new_group([1, 2])
    x = torch.ones(1)
    dist.all_reduce(x, group=everyone)
    return x.item(), dist.get_world_size(other) if rank else 2


def test_a_twin_leaves_the_others_groups_alone(run):
    assert run(on_two_ranks_of_three, 3) == [(3.0, 2)] * 3


def accumulated(rank, world_size, plan):
    """Gradients of several micro-batches under no_sync, then of two forwards before one backward."""
    model = syncbn.convert(Net())
    ddp = DistributedDataParallel(model, **UNUSED, **TINY)
    for step, used in enumerate(plan):
        with contextlib.nullcontext() if step == len(plan) - 1 else ddp.no_sync():
            ddp([inputs(step, world_size)[rank]], [used[rank]]).pow(3).sum().backward()
    found = numbers(model)
    model.zero_grad()
    ys = [ddp([inputs(step, world_size)[rank]], [plan[0][rank]]) for step in range(2)]
    sum(y.pow(3).sum() for y in ys).backward()
    return found, numbers(model)


def test_several_batches_per_step(run):
    model, plan = Net(), [SEVERAL, BEHIND, IN_FRONT]
    for step, used in enumerate(plan):
        model(inputs(step, 2), used[:2]).pow(3).sum().div(2).backward()
    found = numbers(model)
    model.zero_grad()
    ys = [model(inputs(step, 2), SEVERAL[:2]) for step in range(2)]
    sum(y.pow(3).sum() for y in ys).div(2).backward()
    assert_equal(run(accumulated, 2, plan), (found, numbers(model)))


def two_models(rank, world_size):
    """As of a GAN: the second model runs on the output of the first, and on its own again."""
    models = [syncbn.convert(Net()), syncbn.convert(Net(True))]
    first, second = (DistributedDataParallel(model, **UNUSED, **TINY) for model in models)
    for step in range(2):
        for model in models:
            model.zero_grad()
        fake = first([inputs(step, world_size)[rank]], [SEVERAL[rank]])
        second([fake.detach()], [BEHIND[rank]]).pow(3).sum().backward()
        second([fake], [IN_FRONT[rank]]).pow(3).sum().backward()
    return [numbers(model) for model in models]


def test_two_models_in_ddp(run):
    models, sizes = [Net(), Net(True)], [3, 4]
    for step in range(2):
        for model in models:
            model.zero_grad()
        fake = models[0](inputs(step, 2), SEVERAL[:2])
        models[1](fake.detach().split(sizes), BEHIND[:2]).pow(3).sum().div(2).backward()
        models[1](fake.split(sizes), IN_FRONT[:2]).pow(3).sum().div(2).backward()
    assert_equal(run(two_models, 2), [numbers(model) for model in models])


class Functional(Net):
    """The norms as a function, which has no layer that could know of DDP."""

    def block(self, i, x, sizes, used):
        x = self.adapt(f"before{i}", self.linears[i](x), sizes, used)
        norm = self.norms[i]
        norm.num_batches_tracked.add_(1)
        x = syncbn.functional.sync_batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True)
        return self.adapt(f"after{i}", x, sizes, used).tanh()


def functional_in_ddp(rank, world_size):
    model, found = Functional(), []
    ddp = DistributedDataParallel(model, **UNUSED, **TINY)
    for step in range(2):
        model.zero_grad()
        ddp([inputs(step, world_size)[rank]], [SEVERAL[rank]]).pow(3).sum().backward()
        found.append(numbers(model))
    return found


def test_the_function_in_ddp(run):
    assert_equal(run(functional_in_ddp, 2), one_process(2, [SEVERAL] * 2))


def compiled_in_ddp(rank, world_size, plan, which):
    model, found = syncbn.convert(Net()), []
    ddp = DistributedDataParallel(model, **UNUSED, **TINY)
    for module in {"norms": model.norms, "model": [model], "ddp": [ddp]}[which]:
        module.compile(backend="aot_eager")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # while torch traces
    with torch._dynamo.config.patch(optimize_ddp=False):  # which wants larger buckets
        for step, used in enumerate(plan):
            model.zero_grad()
            ddp([inputs(step, world_size)[rank]], [used[rank]]).pow(3).sum().backward()
            found.append(numbers(model))
    return found, dist.get_process_group_ranks(next(iter(subgroups._made[dist.group.WORLD].values()))())


@pytest.mark.parametrize("which", ["norms", "model", "ddp"])
@pytest.mark.slow
def test_compiled_models(run, which):
    expected = one_process(2, [SEVERAL] * 2)
    for found, ranks in run(compiled_in_ddp, 2, [SEVERAL] * 2, which, timeout=180):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        assert ranks == [0, 1]


def groups_of(rank, world_size):
    """Which group each kind of spec has outside DDP, in it, and outside again."""
    other = dist.new_group()
    specs = {"world": GroupSpec(None), "other": GroupSpec(other), "pair": GroupSpec(2)}
    seen = []

    class Look(nn.Linear):
        def forward(self, x):
            look()
            return super().forward(x)

    def look():
        seen.append({name: group_of(spec, name) for name, spec in specs.items()})

    look()
    ddp = DistributedDataParallel(Look(2, 2))
    look()
    ddp(torch.ones(1, 2))
    ddp(torch.ones(1, 2))
    look()
    assert seen[0] == seen[1]
    assert seen[0]["world"] is dist.group.WORLD
    assert seen[2] == seen[3] == seen[4]
    assert seen[2]["world"] is not dist.group.WORLD
    assert dist.get_process_group_ranks(seen[2]["world"]) == list(range(world_size))
    assert seen[2]["other"] is other
    assert seen[2]["pair"] is seen[0]["pair"]
    assert specs["world"].resolve() is dist.group.WORLD
    again = GroupSpec(None)  # never in the forward pass of DDP
    assert group_of(again, "again") is seen[2]["world"]


def test_only_the_group_that_ddp_reduces_in_has_a_twin(run):
    run(groups_of, 4)


def made_for_flags(rank, world_size):
    """On another backend than gloo, whose groups are not free, DDP must say that graphs may differ."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    world = dist.group.WORLD
    try:
        for flags in ((False, False), (True, False), (False, True)):
            subgroups._made.clear()
            ddp = SimpleNamespace(process_group=world, find_unused_parameters=flags[0], static_graph=flags[1])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(subgroups, "active_ddp", lambda ddp=ddp: ddp)
                assert (subgroups.twin_of(world.group_name) is None) is not any(flags)
    finally:
        dist.destroy_process_group()


def test_other_backends_than_gloo(run):
    run(made_for_flags, 1, initialize=False)


def new_worlds(rank, world_size, path):
    """Train in DDP, in a world made anew, and in a copy and a pickle there."""
    model, found = syncbn.convert(Net()), []
    for life in range(3):
        ddp = DistributedDataParallel(model, **UNUSED, **TINY)
        model.zero_grad()
        ddp([inputs(0, world_size)[rank]], [SEVERAL[rank]]).pow(3).sum().backward()
        found.append(numbers(model)[0])
        twin, world = weakref.ref(group_of(model.norms[0].group_spec, "")), weakref.ref(dist.group.WORLD)
        assert twin() is not world()
        assert twin()._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 30
        model = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m][life](model)
        del ddp
        dist.barrier()
        compat.destroy_process_group()
        gc.collect()
        assert (twin(), world()) == (None, None)
        store = dist.FileStore(f"{path}{life}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
    return found


def test_worlds_made_anew(run, tmp_path):
    expected = one_process(2, [SEVERAL])[0][0]
    for found in run(new_worlds, 2, str(tmp_path / "store"), timeout=60):
        assert_equal(found, expected)
