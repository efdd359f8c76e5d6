"""Which ranks share statistics: group specs, their groups, copies and pickles."""

import copy
import gc
import io
import pickle
import socket
import weakref

import pytest
import torch
import torch.distributed as dist
from oracle import compare, make_case, run_case, truth
from ranks import RankError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import syncbn
from syncbn import compat, private
from syncbn.distributed import exchange, subgroups


def members(layer):
    """Return the global ranks whose statistics ``layer`` shares, seen from what it computes."""
    layer = copy.deepcopy(layer).double().train()
    layer.momentum = 1.0
    x = torch.full((1, layer.num_features), float(2 ** dist.get_rank()), dtype=torch.float64)
    layer(torch.cat([x, x]))
    group = layer.group_spec.resolve()
    size = 1 if group is None else dist.get_world_size(group)
    total = round(layer.running_mean[0].item() * size)
    return [rank for rank in range(dist.get_world_size()) if total >> rank & 1]


def groups_of_specs(rank, world_size, specs):
    return [members(syncbn.SyncBatchNorm(2, process_group=spec)) for spec in specs]


def test_int_and_world(run):
    results = run(groups_of_specs, 4, [2, None, 4, 1, 2])
    for rank, result in enumerate(results):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert result == [pair, [0, 1, 2, 3], [0, 1, 2, 3], [rank], pair]


def node_of(rank, world_size):
    socket.gethostname = lambda: f"host{rank // 2}"
    try:
        return members(syncbn.SyncBatchNorm(2, process_group="node"))
    finally:
        import _socket

        socket.gethostname = _socket.gethostname


def test_node(run):
    assert run(node_of, 3) == [[0, 1], [0, 1], [2]]


def process_group_and_mesh(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "data"))
    groups = [dist.new_group(r) for r in ([0, 3], [1, 2])]
    mine = groups[0] if rank in (0, 3) else groups[1]
    layers = [syncbn.SyncBatchNorm(2, process_group=g) for g in (mine, mesh["replica"], mesh["data"])]
    return [members(layer) for layer in layers]


def test_process_group_and_device_mesh(run):
    results = run(process_group_and_mesh, 4)
    assert results[0] == [[0, 3], [0, 2], [0, 1]]
    assert results[3] == [[0, 3], [1, 3], [2, 3]]


def different_order(rank, world_size):
    """Layers met in another order on each rank: groups are still made in one order."""
    specs = [2, 4, 1, "node"]
    layers = {spec: syncbn.SyncBatchNorm(2, process_group=spec) for spec in (specs if rank % 2 else specs[::-1])}
    made = layers[2].group_spec.resolve()
    return dist.get_process_group_ranks(made), [members(layers[spec]) for spec in (1, 2, 4)]


def test_groups_are_made_in_one_order(run):
    for rank, (made, specs) in enumerate(run(different_order, 4)):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert made == pair
        assert specs == [[rank], pair, [0, 1, 2, 3]]


def declared_on_one_rank(rank, world_size):
    """A spec that only one rank has (a model not yet collected, say) makes no rank wait for the others."""
    other = syncbn.SyncBatchNorm(2, process_group=2) if rank == 0 else None
    syncbn.convert(torch.nn.BatchNorm1d(2))(torch.randn(3, 2))
    found = members(syncbn.convert(torch.nn.BatchNorm1d(2), process_group=4))
    del other
    return found


def test_a_spec_of_one_rank_alone_is_no_collective(run):
    assert run(declared_on_one_rank, 4, timeout=40) == [[0, 1, 2, 3]] * 4


def subgroups_equal_one_process(rank, world_size, case):
    return run_case(rank, case)


def test_a_subgroup_equals_one_process(run):
    case = make_case([(1 + r, 3, 4) for r in range(4)], steps=2, layer={"process_group": 2})
    results = run(subgroups_equal_one_process, 4, case)
    for ranks in ([0, 1], [2, 3]):
        part = copy.deepcopy(case)
        part.xs = [[step[r] for r in ranks] for step in case.xs]
        part.dys = [[step[r] for r in ranks] for step in case.dys]
        compare([results[r] for r in ranks], truth(part), part, 1e-10)


def new_world(rank, world_size, path):
    """A process group destroyed under the layer and made anew: int specs find new groups."""
    layer = syncbn.SyncBatchNorm(2, process_group=2)
    first = members(layer)
    compat.destroy_process_group()
    alone = layer(torch.randn(4, 2))  # no process group: plain BatchNorm
    dist.init_process_group("gloo", store=dist.FileStore(path, world_size), rank=rank, world_size=world_size)
    return first, tuple(alone.shape), members(layer)


def test_groups_of_a_new_world(run, tmp_path):
    for rank, (first, _, second) in enumerate(run(new_world, 4, str(tmp_path / "store"))):
        assert first == second == [rank // 2 * 2, rank // 2 * 2 + 1]


def copies(rank, world_size):
    group = dist.new_group([0, 1])
    layer = syncbn.SyncBatchNorm(2, process_group=group)
    other = copy.deepcopy(layer)
    assert other.process_group is group
    assert other.weight is not layer.weight
    again = pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(layer), file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)[0]
    ema = torch.optim.swa_utils.AveragedModel(torch.nn.Sequential(layer))
    ema.update_parameters(torch.nn.Sequential(layer))
    world = pickle.loads(pickle.dumps(syncbn.SyncBatchNorm(2, process_group=dist.group.WORLD)))
    return [members(m) for m in (other, again, loaded, ema.module[0], world)]


def test_copies_share_and_pickles_find_the_group(run):
    for result in run(copies, 2):
        assert result == [[0, 1]] * 5


def after_destroying(rank, world_size):
    """The usual end of a script: the process group is gone, the model is still printed and saved."""
    model = torch.nn.Sequential(syncbn.SyncBatchNorm(2, process_group=dist.new_group([0, 1])))
    everyone = syncbn.SyncBatchNorm(2, process_group=dist.group.WORLD)
    model(torch.randn(2, 2))
    compat.destroy_process_group()
    assert "ranks [0, 1]" in repr(model)
    assert "ranks [0, 1]" in repr(copy.deepcopy(everyone))
    again = pickle.loads(pickle.dumps(model))
    assert again(torch.randn(2, 2)).shape == (2, 2)  # no process group: plain BatchNorm
    file = io.BytesIO()
    torch.save(again, file)


def test_models_are_printed_and_saved_after_the_process_group_is_gone(run):
    run(after_destroying, 2)


def pickle_without_group(rank, world_size):
    group = dist.new_group([0, 1, 2])
    if rank < 3:
        data = pickle.dumps(syncbn.SyncBatchNorm(2, process_group=group))
        dist.destroy_process_group(group)
        layer = pickle.loads(data)
        layer.eval()(torch.randn(2, 2))
        with pytest.raises(ValueError, match=r"ranks \[0, 1, 2\].*no such group exists"):
            layer.train()(torch.randn(2, 2))
        assert "ranks [0, 1, 2]" in repr(layer)


def test_a_pickled_group_that_is_gone_is_named(run):
    run(pickle_without_group, 4)


def test_pickles_load_without_torch_distributed(run):
    layer = pickle.loads(pickle.dumps(syncbn.SyncBatchNorm(2, process_group=2)))
    assert layer.process_group == 2
    assert layer(torch.randn(3, 2)).shape == (3, 2)


def not_dividing(rank, world_size, convert):
    if convert:
        model = torch.nn.BatchNorm1d(2)
        try:
            syncbn.convert(model, process_group=2)
        finally:
            assert type(model) is torch.nn.BatchNorm1d
    syncbn.SyncBatchNorm(2, process_group=2)(torch.randn(2, 2))


@pytest.mark.parametrize("convert", [False, True])
def test_a_size_that_does_not_divide_the_world(run, convert):
    with pytest.raises(RankError) as caught:
        run(not_dividing, 3, convert)
    assert len(caught.value.errors) == 3
    for kind, message in caught.value.errors.values():
        assert kind == "ValueError"
        assert "divides the world size 3" in message
        assert "[1, 3]" in message


def not_a_member(rank, world_size):
    group = dist.new_group([0, 1])
    if rank == 2:
        syncbn.convert(torch.nn.BatchNorm1d(2), process_group=group)
    dist.barrier()


def test_a_group_that_this_rank_is_not_in(run):
    with pytest.raises(RankError) as caught:
        run(not_a_member, 3, timeout=30)
    kind, message = caught.value.errors[2]
    assert (kind, "not a member" in message) == ("ValueError", True)


@pytest.mark.parametrize("spec", [0, -1, True, 2.0, "nodes", [0, 1]])
def test_unusable_specs(spec):
    with pytest.raises(ValueError, match="process_group: expected None"):
        syncbn.SyncBatchNorm(2, process_group=spec)


def meshes(rank, world_size):
    """All ranks of a mesh share: the world, a part of it, one rank; in copies, pickles and a further world too."""
    whole = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))
    rows = DeviceMesh("cpu", [[[0], [3]], [[1], [2]]], mesh_dim_names=("row", "b", "c"))
    given = [whole, whole["a", "b"], whole["b", "c"], rows["b", "c"], rows["c"]]
    layers = [syncbn.SyncBatchNorm(2, process_group=mesh) for mesh in given]
    assert layers[0].group_spec.resolve() is dist.group.WORLD
    assert layers[4].group_spec.resolve() is None
    assert all(layer.process_group is mesh for layer, mesh in zip(layers, given, strict=True))
    assert "DeviceMesh" in repr(layers[3])
    again = [copy.deepcopy(layers[3]), pickle.loads(pickle.dumps(layers[3]))]
    assert members(again[0]) == members(again[1]) == members(layers[3])
    assert again[1].group_spec.resolve() is layers[3].group_spec.resolve()
    assert again[1].group_spec.resolve()._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 22
    dist.new_group([0, 1])  # named as on the others, whatever was made beside
    return [members(layer) for layer in layers]


def test_meshes_of_several_dimensions(run):
    for rank, found in enumerate(run(meshes, 4, timeout=44)):
        row, column = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert found == [[0, 1, 2, 3], column, row, [0, 3] if rank in (0, 3) else [1, 2], [rank]]


def mesh_of_the_others(rank, world_size):
    mesh = DeviceMesh("cpu", [[0, 1]])
    if rank == 2:
        with pytest.raises(ValueError, match="expected a DeviceMesh that rank 2 is in, got"):
            syncbn.SyncBatchNorm(2, process_group=mesh)
        return None
    layer = syncbn.SyncBatchNorm(2, process_group=mesh)  # made by these two alone
    before = members(layer), members(syncbn.SyncBatchNorm(2, process_group=mesh))
    dist.destroy_process_group(layer.group_spec.resolve())
    return before


def test_a_mesh_that_this_rank_is_not_in(run):
    assert run(mesh_of_the_others, 3, timeout=40) == [([0, 1], [0, 1])] * 2 + [None]


def mesh_without_the_private_names(rank, world_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "_new_group", None)
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))
        return members(syncbn.SyncBatchNorm(2, process_group=mesh["b", "c"]))


def test_a_mesh_without_the_private_names(run):
    assert run(mesh_without_the_private_names, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def compiled_mesh(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))["b", "c"]
    layer = syncbn.SyncBatchNorm(2, process_group=mesh, momentum=1.0)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.full((2, 2), float(rank)))
    return layer.running_mean.tolist()


@pytest.mark.slow
def test_compile_with_a_mesh_of_several_dimensions(run):
    assert run(compiled_mesh, 4, timeout=120) == [[0.5] * 2] * 2 + [[2.5] * 2] * 2


def timeouts(rank, world_size):
    layer = syncbn.SyncBatchNorm(2, process_group=2)
    layer(torch.randn(2, 2))
    read = [
        g._get_backend(torch.device("cpu")).options._timeout for g in (dist.group.WORLD, layer.group_spec.resolve())
    ]
    return [t.total_seconds() for t in read]


def test_subgroups_inherit_the_time_out(run):
    assert run(timeouts, 4, timeout=44) == [[22.0, 22.0]] * 4


def same_bits(rank, world_size):
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(rank))
    layer = syncbn.SyncBatchNorm(7)
    layer(x)
    return layer.running_mean, layer.running_var


def test_statistics_are_bit_identical_on_all_ranks(run):
    results = run(same_bits, 4)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def tell(rank, world_size):
    return subgroups._gather_json([[2, "node"] * rank, f'höst "{rank}" \'\udc80\n' * rank])


def test_ranks_tell_each_other_text_not_pickles(run):
    told = [[[2, "node"] * rank, f'höst "{rank}" \'\udc80\n' * rank] for rank in range(3)]
    assert run(tell, 3) == [told] * 3


def sums_used_twice(rank, world_size, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_GATHER_BYTES", limit)
        x = torch.arange(1.0, 4.0).add(rank).requires_grad_()
        dy = torch.full((3,), 1.0 + rank)
        once, again = (
            exchange.DifferentiableSum.apply(x * 2, dist.group.WORLD, "a layer", "forward", ()) for _ in range(2)
        )
        (dx,) = torch.autograd.grad(once + again, x, dy, create_graph=True)
        return once.detach(), dx.detach(), dy


@pytest.mark.parametrize("limit", [0, 2**20], ids=["all_reduce", "gather"])
def test_the_gradient_of_a_sum_leaves_the_gradient_it_gets(run, limit):
    """One gradient that two sums receive: an all_reduce in place would change it for the second."""
    for rank, (summed, dx, dy) in enumerate(run(sums_used_twice, 2, limit)):
        assert summed.tolist() == [6, 10, 14]
        assert dx.tolist() == [2 * 2 * (1 + 2)] * 3  # each rank's gradient, summed, of both sums
        assert dy.tolist() == [1 + rank] * 3


def world_left_behind(rank, world_size, specs):
    specs = [*specs, init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))["b", "c"]]
    layers = [syncbn.SyncBatchNorm(2, process_group=spec) for spec in specs]
    for layer in layers:
        layer(torch.randn(3, 2))
    groups = [weakref.ref(dist.group.WORLD), *(weakref.ref(layer.group_spec.resolve()) for layer in layers)]
    compat.destroy_process_group()
    gc.collect()
    return [group() for group in groups]


def test_no_group_outlives_destroy_process_group(run):
    """One that did now and then aborted its process at the end of the interpreter, inside gloo."""
    assert run(world_left_behind, 4, [2, 4, "node", None]) == [[None] * 6] * 4
