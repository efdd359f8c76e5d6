"""Be one of two ranks whose torch seems to have no private names: ``python without_private_names.py RANK STORE``.

The names that `syncbn/private.py` looks up are read from that file, and hidden while syncbn is imported; torch itself
keeps them. Raises where a result is not that of one process. `test_compat.py` runs it.
"""

import copy
import importlib.util
import io
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils._python_dispatch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

SOURCE = (Path(__file__).parents[1] / "syncbn" / "private.py").read_text()
NAMES = set(re.findall(r'^\w+(?:: Any)? = (?:getattr|hasattr)\([\w.]+, "(_\w+)"', SOURCE, re.MULTILINE))
MODULES = set(re.findall(r'find_spec\("([\w.]+)"\)', SOURCE))
MAY_BE_MISSING = {"_top_saved_tensors_default_hooks"}  # in torch 2.6


class Without:
    """A module of which `NAMES` are hidden."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        if name in NAMES:
            raise AttributeError(name)
        return Without(self.module._autograd) if name == "_autograd" else getattr(self.module, name)


def import_without():
    """Import syncbn without the names; return those that were there."""
    modes = torch.utils._python_dispatch
    owners = [torch, dist.distributed_c10d, dist.ProcessGroup, DistributedDataParallel, modes]
    found = {name for owner in (*owners, torch._C, torch._C._autograd) for name in NAMES if hasattr(owner, name)}
    find = importlib.util.find_spec
    find_some = mock.patch("importlib.util.find_spec", lambda name: None if name in MODULES else find(name))
    with ExitStack() as stack:
        stack.enter_context(find_some)
        for owner in owners:
            for name in NAMES & vars(owner).keys():
                stack.callback(setattr, owner, name, vars(owner)[name])
                delattr(owner, name)
        stack.enter_context(mock.patch.object(torch, "_C", Without(torch._C)))
        importlib.import_module("syncbn")
    return found


def check_splits(rank):
    import oracle

    splits = ([(2, 3, 4, 3), (5, 3, 4, 3)], [(3, 3), (0, 3)], [(1, 3), (1, 3)])
    for shapes in splits:
        for dtype in (torch.float64, torch.float32):
            check_case(rank, oracle.make_case(shapes, steps=2, dtype=dtype))


def check_case(rank, case, layer=None):
    import oracle

    results = [None, None]
    dist.all_gather_object(results, oracle.run_case(rank, case, layer))
    results = [{k.removeprefix("_orig_mod."): v for k, v in result.items()} for result in results]
    oracle.compare(results, oracle.truth(case), case, 1e-10 if case.dtype == torch.float64 else 2e-5)


def check_compiled(rank):
    import oracle

    import syncbn

    if torch.__version__.startswith("2.6."):
        print("skipped: torch 2.6 traces collectives that are not functional forward only")
        return
    case = oracle.make_case([(2, 3, 4), (3, 3, 4)], steps=2)
    layer = torch.compile(syncbn.SyncBatchNorm(3, dtype=torch.float64), fullgraph=True, backend="aot_eager")
    check_case(rank, case, layer)


def gradients(model, x, again):
    x = x.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False) if again else model(x)
    y.pow(3).sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def check_recomputation(rank):
    import syncbn

    model = syncbn.convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())
    x = torch.randn(3 + rank, 4, dtype=torch.float64)
    wanted = gradients(copy.deepcopy(model), x, False)
    torch.testing.assert_close(gradients(model, x, True), wanted, rtol=1e-10, atol=1e-12)


def check_groups(rank):
    import oracle

    import syncbn
    from syncbn.private import timeout_of

    assert timeout_of(dist.group.WORLD) is None
    layer = syncbn.SyncBatchNorm(3, process_group=dist.group.WORLD, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(layer, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for one in (layer, again):
        check_case(rank, oracle.make_case([(2, 3), (4, 3)]), one)
    check_case(rank, oracle.make_case([(2, 3), (4, 3)]), syncbn.SyncBatchNorm(3, process_group=2, dtype=torch.float64))


def check_ddp(rank):
    import syncbn

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    ddp = DistributedDataParallel(syncbn.convert(copy.deepcopy(plain)))
    (ddp(x[rank::2]).pow(3).sum() * 2).backward()
    plain(x).pow(3).sum().backward()
    for mine, other in zip(ddp.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-10)


def check_order_check(rank):
    """It says that it cannot run, on both ranks, and nobody waits."""
    import syncbn

    try:
        with syncbn.debug.check_order():
            syncbn.SyncBatchNorm(3)(torch.randn(2, 3))
    except syncbn.debug.OrderError as error:
        assert "_get_default_store" in str(error)  # noqa: PT017
    else:
        raise AssertionError("expected an OrderError")


def main(rank, store):
    missing = NAMES - import_without()
    gone = missing - MAY_BE_MISSING
    assert not gone, f"torch has no {gone} any more: drop the names, or replace them"
    import syncbn

    assert syncbn.ops.backends.choose(torch.ones(2, 3), *[None] * 4) is syncbn.ops.reference
    assert syncbn.private.disable_modes()(lambda: 3)() == 3
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(rank)
    for check in (check_splits, check_compiled, check_recomputation, check_groups, check_ddp, check_order_check):
        check(rank)
        print(check.__name__, flush=True)
    dist.barrier()
    os._exit(0)  # torch 2.6 may hang where a group is destroyed


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
