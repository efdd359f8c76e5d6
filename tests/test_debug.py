"""The order check: what differs between ranks, who is missing, names, and what it costs in store operations."""

import contextlib
import copy
import re
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from test_many_ranks import on_threads, process  # noqa: F401  # a fixture
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import compat
from syncbn.compat import DDP_OPTIONS
from syncbn.debug import OrderError, check_order
from syncbn.debug import store as store_module
from syncbn.debug.signature import SIZE, Signature, is_same, ranks, unpack

ODD = 1  # the rank that does something else
LONG, SHORT = 40, 1  # seconds: nothing waits that long; where somebody is missing for good


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm1, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x, order=("norm1", "norm2")):
        for linear, norm in zip((self.first, self.second), order, strict=True):
            x = linear(x)
            x = x if norm is None else getattr(self, norm)(x).relu()
        return x


class Wrapper(nn.Module):
    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def batch(rank, step=0):
    return torch.randn(5 + rank, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def caught(function, *args):
    """Return the message of the OrderError that ``function`` raises, None if it raises nothing."""
    try:
        function(*args)
    except OrderError as error:
        return str(error)
    return None


# What ranks do that differ: function(model, x, is_odd).


def swaps_layers(model, x, is_odd):
    model(x, ("norm2", "norm1") if is_odd else ("norm1", "norm2"))


def skips_a_layer(model, x, is_odd):
    model(x, (None, "norm2") if is_odd else ("norm1", "norm2"))


def skips_the_last_layer(model, x, is_odd):
    model(x, ("norm1", None if is_odd else "norm2")).pow(3).sum().backward()


def has_other_channels(model, x, is_odd):
    if is_odd:
        model.first, model.norm1 = nn.Linear(4, 7), syncbn.SyncBatchNorm(7)
        syncbn.convert(model)  # names it
    model.norm1(model.first(x))


def has_another_dtype(model, x, is_odd):
    dtype = torch.float64 if is_odd else torch.float32
    model.to(dtype)(x.to(dtype))


def needs_no_gradient(model, x, is_odd):
    model.norm1(torch.ones(3, 6).normal_().requires_grad_(not is_odd))


def has_no_grad_mode(model, x, is_odd):
    with torch.no_grad() if is_odd else contextlib.nullcontext():
        model(x)


def differentiates_twice(model, x, is_odd):
    x.requires_grad_()
    torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=is_odd)


def stops_before_the_second_order(model, x, is_odd):
    x.requires_grad_()
    (dx,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    if is_odd:
        model(x)
    dx.square().sum().backward()


def has_fewer_batches(model, x, is_odd):
    syncbn.update_bn_stats(model, [x] if is_odd else [x, x])


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1 = nn.BatchNorm1d(6)
        self.layer1 = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())
        self.layer1.bn1 = nn.BatchNorm1d(6)


def takes_a_layer_of_the_same_last_name(model, x, is_odd):
    stem = syncbn.convert(Stem())
    (stem.layer1.bn1 if is_odd else stem.bn1)(model.first(x))


def takes_the_other_model_of_the_same_names(model, x, is_odd):
    generator, discriminator = (syncbn.convert(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))) for _ in range(2))
    with check_order(nn.ModuleDict({"generator": generator, "discriminator": discriminator}), LONG):
        (discriminator if is_odd else generator)(x)


def takes_another_layer_of_a_list(model, x, is_odd):
    layers = nn.ModuleList([syncbn.SyncBatchNorm(4) for _ in range(3)])
    with check_order(layers, timeout=LONG):
        for layer in layers if is_odd else reversed(layers):
            layer(x)


def has_another_eps(model, x, is_odd):
    if is_odd:
        model.norm1.eps = 1e-3
    model(x)


def has_another_momentum(model, x, is_odd):
    if is_odd:
        model.norm1.momentum = None
    model(x)


def calls_the_function(model, x, is_odd):
    x = model.first(x)
    syncbn.functional.sync_batch_norm(x, None, None, training=True) if is_odd else model.norm1(x)


DIFFERENCES = {  # what differs, and what the message says of rank 0 and 2, and of the odd rank
    swaps_layers: ("layer", "norm1 (Net), forward, 6 channels, float32", "norm2 (Net), forward"),
    skips_a_layer: ("layer", "norm1 (Net), forward", "norm2 (Net), forward"),
    skips_the_last_layer: ("layer, direction", "norm2 (Net), forward, 6", "norm1 (Net), backward, 6"),
    has_other_channels: ("channels, numbers", "norm1 (Net), forward, 6 channels", "norm1 (Net), forward, 7 channels"),
    has_another_dtype: ("dtype", "norm1 (Net), forward, 6 channels, float32", "6 channels, float64"),
    needs_no_gradient: ("gradient of the input", "input needs gradient", "no input gradient"),
    has_no_grad_mode: ("gradient of the input", "input needs gradient", "no input gradient"),
    differentiates_twice: ("direction", "norm2 (Net), backward, 6", "norm2 (Net), backward with create_graph, 6"),
    stops_before_the_second_order: ("direction", "second-order backward", "norm1 (Net), forward"),
    has_fewer_batches: ("direction", "norm1 (Net), forward", "update_bn_stats, statistics, 27 numbers"),
    takes_a_layer_of_the_same_last_name: ("layer", "bn1 (Stem), forward", "layer1.bn1 (Stem), forward"),
    takes_the_other_model_of_the_same_names: (
        "layer",
        "generator.1 (ModuleDict), forward",
        "discriminator.1 (ModuleDict), forward",
    ),
    takes_another_layer_of_a_list: ("layer", "2 (ModuleList), forward", "0 (ModuleList), forward"),
    has_another_eps: ("settings", "13 numbers, eps 1e-05, momentum 0.1", "13 numbers, eps 0.001, momentum 0.1"),
    has_another_momentum: ("settings", "13 numbers, eps 1e-05, momentum 0.1", "13 numbers, eps 1e-05, momentum None"),
    calls_the_function: ("layer", "norm1 (Net), forward", "sync_batch_norm, forward"),
}


def differ(rank, world_size, does):
    model = syncbn.convert(Net())
    with check_order(LONG):
        model(batch(rank)).pow(3).sum().backward()
        return caught(does, model, batch(rank), rank == ODD)


@pytest.mark.parametrize("does", DIFFERENCES, ids=lambda does: does.__name__)
def test_a_difference_raises_on_every_rank_what_it_is(run, does):
    messages = run(differ, 3, does)
    differing, usual, odd = DIFFERENCES[does]
    assert len({message.replace(f"This is rank {rank}.", "") for rank, message in enumerate(messages)}) == 1
    head, *lines, last = messages[0].split("\n")
    assert "(ranks 0-2)" in head
    assert set(differing.split(", ")) <= set(head.split("they differ in ")[1].rstrip(":").split(", "))
    assert last == "This is rank 0."
    assert [line.split(":")[0] for line in lines] == ["  ranks 0, 2", "  rank 1"]
    assert usual in lines[0]
    assert odd in lines[1]


# Ranks that do not come: function(model, x), called by the odd rank alone.


def stops(model, x):
    model.norm1(model.first(x))


def raises_in_its_own_forward(model, x):
    with contextlib.suppress(ZeroDivisionError):
        model.norm1(model.first(x)) / (1 // 0)


def runs_in_eval_mode(model, x):
    model.norm1(model.first(x))
    model.norm2.eval()(model.second(model.first(x)))


def miss(rank, world_size, does):
    model = syncbn.convert(Net())
    with check_order(LONG):
        model(batch(rank)).pow(3).sum().backward()
        if rank == ODD:
            does(model, batch(rank))
            dist.barrier()
            return caught(model.norm2.train(), model.second(model.first(batch(rank))))
        model.norm1(model.first(batch(rank)))
        with check_order(SHORT):
            message = caught(model.norm2, model.second(model.first(batch(rank))))
        dist.barrier()
        return message


@pytest.mark.parametrize(
    "does",
    [runs_in_eval_mode, *(pytest.param(does, marks=pytest.mark.slow) for does in (stops, raises_in_its_own_forward))],
    ids=lambda does: does.__name__,
)
def test_a_missing_rank_is_named_with_what_it_did_last(run, does):
    *others, late = [message for i, message in sorted(enumerate(run(miss, 3, does)), key=lambda pair: pair[0] == ODD)]
    last = "norm2 (Net), forward in eval mode" if does is runs_in_eval_mode else "norm1 (Net), forward, 6 channels"
    for message in others:
        assert message.startswith("syncbn: rank 1 did not come within 1 s to norm2 (Net), forward, 6 channels")
        assert f"  rank 1: last {last}" in message
        assert "call 5 of group 0 (ranks 0-2)" in message
    assert "gave up; too late at norm2 (Net), forward" in late  # who comes later does not go on alone


def check_alone(rank, world_size):
    layer = syncbn.SyncBatchNorm(2)
    with check_order(SHORT) if rank == 0 else contextlib.nullcontext():
        message = caught(layer, torch.randn(3, 2)) if rank == 0 else None
    dist.barrier()
    return message


@pytest.mark.slow
def test_a_rank_without_the_check_is_named(run):
    assert "rank 1: has not turned the check on, or has not come" in run(check_alone, 2)[0]


def cross_groups(rank, world_size):
    """Rank 1 meets the world, where the others meet their half."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = syncbn.SyncBatchNorm(2, process_group=halves[rank // 2])
    world = syncbn.SyncBatchNorm(2)
    with check_order(LONG):
        mine(torch.randn(3, 2))
        world(torch.randn(3, 2))
        with check_order(SHORT):
            return caught(world if rank == 1 else mine, torch.randn(3, 2))


@pytest.mark.slow
def test_a_rank_in_another_group_is_named(run):
    messages = run(cross_groups, 4)
    assert "call 1 of group 1 (ranks 0-1):\n  rank 1: last" in messages[0]
    assert "call 1 of group 0 (ranks 0-3)" in messages[0]  # where rank 1 is
    assert "ranks 0, 2-3 did not come within 1 s" in messages[1]
    assert messages[2] is None
    assert messages[3] is None


def twins_differ(rank, world_size):
    """A layer in DDP, whose exchanges have a twin of its group: of the world, and of a pair; another on rank 1."""
    pair, messages = dist.new_group([0, 1]), []
    for group in (None, pair) if rank < 2 else (None,):
        ddp = DistributedDataParallel(syncbn.convert(Net(), process_group=group), process_group=group)
        with check_order(LONG):
            messages.append(caught(ddp, torch.randn(3, 4), ("norm2", "norm1") if rank == 1 else ("norm1", "norm2")))
    return messages


def test_a_twin_beside_ddp_is_named(run):
    results = run(twins_differ, 3)
    for rank, messages in enumerate(results):
        assert re.search(r"call 0 of group \d+ \(twin of group 0, ranks 0-2\)", messages[0]), messages[0]
        if rank < 2:
            assert re.search(r"call 0 of group \w+ \(twin of group 1, ranks 0-1\)", messages[1]), messages[1]


def frozen_from_the_start(rank, world_size):
    """Rank 1 has frozen its layers when the others make the twin."""
    model = syncbn.convert(Net())
    ddp = DistributedDataParallel(syncbn.freeze(model) if rank == 1 else model)
    with check_order(SHORT):
        return caught(ddp, torch.randn(3, 4))


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_make_the_twin(run):
    messages = run(frozen_from_the_start, 3)
    assert messages[1] is None
    for rank in (0, 2):
        text = "rank 1 did not come within 1 s to the twin of group 0, about to be made, 0 numbers, call 0 of group 0"
        assert text in messages[rank]
        assert "rank 1: last norm2 (Net), forward in eval mode" in messages[rank]
        assert "found all ranks here" not in messages[rank]


class Counted:
    """A store that counts the calls of its methods."""

    def __init__(self, store, calls):
        self._store, self._calls = store, calls

    def __getattr__(self, name):
        attribute = getattr(self._store, name)
        return partial(self._call, name, attribute) if callable(attribute) else attribute

    def _call(self, name, function, *args):
        result = function(*args)
        self._calls[name] += 1
        return Counted(result, self._calls) if name == "clone" else result


def all_kinds(rank, world_size, is_on, calls=None):
    """Three steps of DDP over layers of the world and of a subgroup, and what else exchanges; all results."""
    torch.manual_seed(0)
    model = nn.Sequential(Net(), syncbn.SyncBatchNorm(6, process_group=2))
    model = DistributedDataParallel(syncbn.convert(model), **DDP_OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    results = []
    with check_order(LONG) if is_on else contextlib.nullcontext():
        for step in range(3):
            model(batch(rank, step)).pow(3).sum().backward()
            optimizer.step()
            results += [p.grad.clone() for p in model.parameters()]
        net, x = model.module[0], batch(rank).requires_grad_()
        (dx,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
        results += torch.autograd.grad(dx.square().sum(), x)
        for reentrant in (True, False):
            x = batch(rank).requires_grad_()
            torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant).pow(3).sum().backward()
            results.append(x.grad)
        results.append(model.eval()(batch(rank)).detach())
        syncbn.update_bn_stats(net, [batch(rank)])
        syncbn.average_bn_stats(net)
        return results + list(model.buffers())


def test_the_same_bits_with_the_check(run):
    for off, on in zip(run(all_kinds, 4, False), run(all_kinds, 4, True), strict=True):
        assert len(off) == len(on)
        assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))


def count_operations(rank, world_size, is_on):
    calls, real = Counter(), store_module._default_store
    store_module._default_store = lambda: Counted(real(), calls)
    layer = syncbn.SyncBatchNorm(3)
    store, sizes = real(), []
    try:
        with check_order(LONG) if is_on else contextlib.nullcontext():
            for step in range(6):
                before = Counter(calls)
                y = layer(torch.randn(4, 3, requires_grad=True))
                y.pow(3).sum().backward()
                dist.barrier()
                while is_on and calls["delete_key"] < 2 * step + 1:  # it is done in the background
                    time.sleep(0.01)
                dist.barrier()
                sizes.append(store.num_keys())
    finally:
        store_module._default_store = real
    return Counter(calls) - before if is_on else calls, sizes


def test_one_write_one_read_one_deletion_per_exchange(run):
    for calls, sizes in run(count_operations, 2, True):
        waits = {} if hasattr(dist.Store, "clone") else {"wait": 2}  # torch 2.6: a connection that others use too
        assert calls == {"multi_set": 2, "multi_get": 2, "delete_key": 2} | waits  # forward and backward
        assert sizes[-1] <= sizes[1]  # the store does not grow


def test_no_operation_with_the_check_off(run):
    assert [calls for calls, _ in run(count_operations, 2, False)] == [{}, {}]


def leave(rank, world_size, direction, kernels):
    model = syncbn.convert(nn.ModuleDict({"norm": nn.BatchNorm1d(3)}))
    x = torch.randn(4, 3, requires_grad=True)
    with syncbn.use_kernels(kernels):
        y = model["norm"](x) if direction == "backward" else None
        dist.barrier()
        if rank == ODD:
            compat.destroy_process_group()
            return None
        with pytest.raises(RuntimeError) as caught:
            model["norm"](x) if y is None else y.pow(3).sum().backward()
    cause = caught.value.__cause__
    return str(caught.value), cause and (type(cause) is type(caught.value), str(cause))


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_error_of_an_exchange_says_where(run, direction, kernels):
    text, cause = run(leave, 2, direction, kernels)[0]
    assert f"the exchange of norm (ModuleDict), {direction}, on rank 0" in text
    assert "SYNCBN_CHECK_ORDER=1" in text
    same_class, message = cause
    assert same_class
    assert text.startswith(message)


def remake(rank, world_size, path):
    """Two worlds on one store; the second must not read the rows of the first."""
    model = syncbn.convert(Net())
    dist.barrier()  # all are connected
    compat.destroy_process_group()
    for world in range(2):
        store = dist.PrefixStore(f"world{world}", dist.FileStore(path, world_size))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        real = store_module._default_store
        store_module._default_store = lambda: dist.FileStore(path, world_size)  # as worlds of one prefix would
        try:
            with check_order(LONG):
                swaps = ("norm1", "norm2") if world == 0 else ("norm2", "norm1")
                assert caught(model, batch(rank), swaps) is None
        finally:
            store_module._default_store = real
        dist.barrier()
        compat.destroy_process_group()


def test_a_process_group_made_anew_on_the_same_store(run, tmp_path):
    run(remake, 2, str(tmp_path / "store"))


def remake_after_use_by_one(rank, world_size, path):
    """In the first world rank 0 alone ran in eval mode under the check."""
    model, real = syncbn.convert(Net()), store_module._default_store
    dist.barrier()  # all are connected
    compat.destroy_process_group()
    store_module._default_store = lambda: dist.FileStore(path, world_size)
    try:
        for world in range(2):
            store = dist.PrefixStore(f"world{world}", dist.FileStore(path, world_size))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            with check_order(LONG):
                if world == 1:
                    assert caught(model.train(), batch(rank)) is None
                elif rank == 0:
                    model.eval()(batch(rank))
            dist.barrier()
            compat.destroy_process_group()
    finally:
        store_module._default_store = real


def test_a_process_group_made_anew_after_only_one_rank_wrote(run, tmp_path):
    run(remake_after_use_by_one, 2, str(tmp_path / "store"))


def apart(rank, world_size):
    """Rank 1 makes groups of one, for which the others do not come."""
    layer = syncbn.SyncBatchNorm(3, process_group=1 if rank == ODD else None)
    if rank == 0:
        dist.barrier()
        compat.destroy_process_group()
        return None
    dist.barrier()
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(4, 3))
    return str(caught.value)


def test_an_error_while_groups_are_made_says_where(run):
    message = run(apart, 2)[1]
    assert "SyncBatchNorm(3), when the process groups were made, on rank 1" in message
    assert "SYNCBN_CHECK_ORDER=1" in message


def stand_still(rank, world_size):
    class Still:
        timeout = property(lambda self: __import__("datetime").timedelta(seconds=9))

        def __getattr__(self, name):
            return (lambda *_: self) if name in ("clone", "set_timeout") else (lambda *_: release.wait())

    release, real = threading.Event(), (store_module._default_store, store_module._GRACE)
    store_module._default_store, store_module._GRACE = Still, 0.1
    try:
        with check_order(SHORT):
            return caught(syncbn.SyncBatchNorm(2), torch.randn(3, 2))
    finally:
        release.set()
        store_module._default_store, store_module._GRACE = real


def test_a_store_that_stands_still_ends_in_an_error(run):
    for rank, message in enumerate(run(stand_still, 2)):
        assert f"on rank {rank} cannot use the process group's store: it has not answered for 1.1 s" in message
        assert "SyncBatchNorm(2), forward" in message


def over_threads(rank, world_size):
    net = syncbn.convert(Net())

    def one(index):
        model = copy.deepcopy(net)
        model(batch(index)).pow(3).sum().backward()
        return caught(swaps_layers, model, batch(index), index == ODD)

    with check_order(LONG):
        return on_threads(4, one)


def test_torchs_threaded_group(process):  # noqa: F811
    for message in process(over_threads):
        assert "ranks 0, 2-3: norm1 (Net)" in message
        assert "rank 1: norm2 (Net)" in message


def names(model):
    return [layer._layer_name for layer in model.modules() if isinstance(layer, syncbn.SyncBatchNorm)]


def test_names_come_from_the_model_that_was_converted_or_is_checked():
    model = syncbn.convert(nn.Sequential(syncbn.convert(Net())))
    assert names(model) == ["0.norm1 (Sequential)", "0.norm2 (Sequential)"]  # the larger one came last
    assert names(copy.deepcopy(model)) == names(model)
    for wrappers in (["module"], ["_orig_mod", "module"], ["_fsdp_wrapped_module"]):
        wrapped = syncbn.convert(Net())
        for name in wrappers:
            wrapped = Wrapper(name, wrapped)
        assert names(wrapped) == ["norm1 (Net)", "norm2 (Net)"]
    written = nn.ModuleDict({"norm": syncbn.SyncBatchNorm(64)})
    assert names(written) == [None]
    with check_order(written):
        assert names(written) == ["norm (ModuleDict)"]
    assert names(syncbn.convert(nn.BatchNorm1d(3))) == [None]


def in_ddp(rank, world_size):
    """A model that nobody converted has the names of the module in DDP."""
    model = nn.Sequential(nn.Linear(4, 6), syncbn.SyncBatchNorm(6))
    ddp = DistributedDataParallel(model, **DDP_OPTIONS)
    before = names(model)
    ddp(batch(rank))
    return before, names(model)


def test_names_of_a_model_in_ddp(run):
    assert run(in_ddp, 2) == [([None], ["1 (Sequential)"])] * 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("norm1 (Net)", "backbone.norm1 (Sequential)", True),
        ("norm1 (Net)", "norm1 (Net)", True),
        ("norm1 (Generator)", "norm1 (Discriminator)", False),
        ("norm1 (Net)", "xnorm1 (Net)", False),
        ("a.norm1 (Net)", "b.norm1 (Net)", False),
        ("SyncBatchNorm(64)", "SyncBatchNorm(64)", True),
        ("SyncBatchNorm(64)", "sync_batch_norm", False),
        ("SyncBatchNorm(64)", "norm1 (Net)", True),
        ("bn1 (ResNet)", "layer1.0.bn1 (ResNet)", False),
    ],
)
def test_one_rank_may_hold_the_model_in_a_larger_one(one, other, same):
    assert is_same(one, other) is same
    assert is_same(other, one) is same


def another_order_of_making(rank, world_size):
    """What one rank makes for itself between two models of the same names is no difference."""
    models = [syncbn.convert(Net())]
    models += [syncbn.convert(Net())] if rank == ODD else []
    models += [syncbn.convert(Net())]
    with check_order(LONG):
        return caught(lambda: [models[i](batch(rank)) for i in (0, -1, 0, -1)])


def test_more_models_on_one_rank_are_no_difference(run):
    assert run(another_order_of_making, 2) == [None, None]


def test_a_row_has_one_size_whatever_the_name():
    for name in ("", "a", "x" * 400 + ".norm", "ä" * 300):
        signature = Signature("backward with create_graph", "64", "float32", "", "99", "", name)
        row = signature.pack()
        assert len(row) == SIZE
        back = unpack(row)
        assert back[:-1] == signature[:-1]
        assert name.endswith(back.name)
        assert len(back.name) >= min(len(name), 90)


def test_ranks_are_written_shortly():
    assert ranks([3]) == "rank 3"
    assert ranks([4, 0, 1, 2, 7, 8]) == "ranks 0-2, 4, 7-8"


def test_settings_are_read_and_refused(monkeypatch):
    for text, is_on in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("SYNCBN_CHECK_ORDER", text)
        assert (syncbn.debug._read_switch() is not None) is is_on
    monkeypatch.setenv("SYNCBN_CHECK_ORDER_TIMEOUT", "7.5")
    assert syncbn.debug._read_switch().timeout == 7.5
    for text in ("soon", "0", "nan", "-1"):
        monkeypatch.setenv("SYNCBN_CHECK_ORDER_TIMEOUT", text)
        with pytest.raises(ValueError, match="SYNCBN_CHECK_ORDER_TIMEOUT: expected seconds, more than 0"):
            syncbn.debug._read_switch()
    monkeypatch.setenv("SYNCBN_CHECK_ORDER", "yes")
    with pytest.raises(ValueError, match="expected 1"):
        syncbn.debug._read_switch()
    with pytest.raises(ValueError, match="more than 0 seconds"), check_order(0):
        pass


def default_timeout(rank, world_size):
    dist.barrier()  # nobody leaves while others still connect
    return syncbn.debug._OrderCheck(None).timeout_in(dist.group.WORLD)


def test_the_check_speaks_before_the_group(run):
    assert run(default_timeout, 2, timeout=100) == [40, 40]  # 0.8 of the 50 s that `run` gives the group
    assert run(default_timeout, 2, timeout=1000) == [300, 300]
