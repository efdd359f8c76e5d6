"""Exactness at many ranks, as threads of one process: torch's own threaded process group, which torch's tests rest on.

It is private and not gloo: collectives copy between threads, and process groups are objects of one thread each. What
runs here is the layer, the exchange of either kind, and autograd in each thread; not the network, and not groups by
number or "node", whose cache is one per process.
"""

import threading
import traceback
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from oracle import compare, make_case, run_case, truth
from ranks import Ranks

import syncbn


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A process of its own: the threaded group changes torch.distributed for good."""
    pool = Ranks(tmp_path_factory.mktemp("stores"))
    yield lambda function, *args: pool.run(function, 1, *args, initialize=False, timeout=300)[0]
    pool.close()


def on_threads(world_size, function):
    """Return what ``function(rank)`` returned on each thread, all of them ranks of one threaded process group."""
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    results, errors, store = [None] * world_size, [], dist.HashStore()
    if not hasattr(threaded.ThreadLocalWorld, "comms"):  # which torch 2.11 asks for, and does not give
        threaded.ThreadLocalWorld.comms = []

    def serve(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            with torch.autograd.set_multithreading_enabled(False):  # backward stays in the rank's thread
                results[rank] = function(rank)
            dist.destroy_process_group()
        except BaseException as error:
            errors.append(f"rank {rank}: {traceback.format_exc()}")
            threaded.ProcessLocalGroup.exception_handle(error)  # lets the others go

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=240)
        assert not any(thread.is_alive() for thread in threads), f"a rank hangs; others said {errors[:1]}"
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    assert not errors, errors[0]
    return results


def uneven(num_ranks):
    """Every fifth rank is empty, the others have 1 to 3 images."""
    shapes = [(0 if rank % 5 == 4 else 1 + rank % 3, 3, 2, 2) for rank in range(num_ranks)]
    return make_case(shapes, steps=2, label=f"{num_ranks} ranks")


def part_of(case, ranks):
    """Return the case of some ranks, joined to one."""
    join = [[[torch.cat([step[rank] for rank in ranks])] for step in steps] for steps in (case.xs, case.dys)]
    return replace(case, xs=join[0], dys=join[1])


def join(results):
    """Return the results of some ranks as if they were one, whose statistics they must all have."""
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert all(torch.equal(results[0][name], other[name]) for other in results), f"{name} differs between ranks"
    joined = {
        what: [torch.cat(parts) for parts in zip(*(r[what] for r in results), strict=True)] for what in ("y", "dx")
    }
    return {**results[0], **joined, **{what: sum(r[what] for r in results) for what in ("weight", "bias")}}


def run_threaded(rank, world_size, case, group_size, gathers):
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    threaded.ProcessLocalGroup.getBackendName = lambda group: "gloo" if gathers else "threaded"
    num_ranks = len(case.xs[0])
    parts = [range(start, start + group_size) for start in range(0, num_ranks, group_size)]

    def run_rank(rank):
        groups = [dist.new_group(list(part)) for part in parts] if len(parts) > 1 else [None]
        layer = syncbn.SyncBatchNorm(3, dtype=case.dtype, process_group=groups[rank // group_size])
        return run_case(rank, case, layer)

    results = on_threads(num_ranks, run_rank)
    return [join([results[rank] for rank in part]) for part in parts]


@pytest.mark.parametrize(
    ("num_ranks", "group_size", "gathers"),
    [
        pytest.param(64, 64, True, id="64 gathering"),  # as groups that say they are gloo do
        pytest.param(64, 64, False, id="64"),
        pytest.param(64, 16, False, id="64 in groups of 16"),
        pytest.param(256, 256, False, id="256", marks=pytest.mark.slow),
        pytest.param(256, 256, True, id="256 gathering", marks=pytest.mark.slow),
        pytest.param(1024, 1024, False, id="1024", marks=pytest.mark.slow),
    ],
)
def test_many_ranks_equal_one_process(process, num_ranks, group_size, gathers):
    case = uneven(num_ranks)
    for i, result in enumerate(process(run_threaded, case, group_size, gathers)):
        part = part_of(case, range(i * group_size, (i + 1) * group_size))
        compare([result], truth(part), part, 1e-10)
