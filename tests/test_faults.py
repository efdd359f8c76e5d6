"""Faults on real processes, with the order check off and on: each ends in the right answer or in an error in time.

``FAULTS`` is the table; `faults` does what goes wrong, `fault_ranks` launches the ranks and sees how they end.
docs/faults.md says the same in words.
"""

import contextlib
import copy
import re
from dataclasses import dataclass
from functools import partial
from itertools import product

import faults
import pytest
import torch
import torch.distributed as dist
from fault_ranks import CHECK_TIMEOUT, MEETING, TIMEOUT, Launch, Launches, Setting
from faults import batch, one_process, sized
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncbn

LOUD = "RuntimeError|SIGABRT"  # of a collective: in Python, or gloo's abort
AFTERWARDS = f"OrderError|{LOUD}"  # of a rank that comes back when the others have ended


@dataclass(frozen=True)
class Fault:
    """What is expected, in the words of `fault_ranks.End.kind`, alternatives with "|" between.

    ``off`` and ``on`` are for the order check off and on: "right" if all ranks compute what one process does; "silent"
    if they end without an error, yet with other numbers; "ValueError" if all raise that. Else ``off`` is how the ranks
    end, and ``on`` the layer at which every message shows the rank ``named``, which did what it should not. That rank
    itself may end in another way, off and on: ``guilty``.
    """

    run: object
    off: str
    on: str
    guilty: tuple[str, str] = (LOUD, "OrderError")
    named: int = faults.GUILTY
    waits: str = ""  # for a time-out: "off", "on" or "both"
    world_size: int = 2
    wake_after: float = 0.0
    store_on_rank_0: bool = False
    truth: object = one_process
    tolerance: float = 1e-9
    programs: bool = False  # ranks of their own interpreter
    slow: bool = False

    @property
    def name(self):
        words = [self.run.__name__, f"{self.world_size}_ranks" if self.world_size > 2 else ""]
        words += ["for_long" if self.wake_after > TIMEOUT else "", "with_the_store" if self.store_on_rank_0 else ""]
        words += ["programs" if self.programs else ""]
        return "-".join(filter(None, words))


def right(run, on="right", **options):
    return Fault(run, "right", on, **options)


def dies(run, how, on="norm1", **options):
    """Expect that the rank ends by itself, last seen at the layer ``on``."""
    return Fault(run, LOUD, on, (how, how), waits="on", **options)


TWO_MODELS = partial(one_process, model=faults.two_models, usual=faults.step_of_each)
EVAL = r"norm3\b.* eval mode"  # what a rank did last
OF_PAIR = r"norm2\b.* \(ranks 0-1\)"

FAULTS = [
    # which layers, in which order, of which size
    Fault(faults.skips_a_layer, LOUD, "norm3"),
    Fault(faults.skips_a_layer, LOUD, "norm3", world_size=3, slow=True),
    Fault(faults.skips_a_layer_under_torchs_checks, "RuntimeError", "norm3", ("RuntimeError", "OrderError")),
    Fault(faults.skips_a_layer_in_ddp, LOUD, "norm3", slow=True),
    Fault(faults.skips_the_last_layer, LOUD, "norm2"),
    Fault(faults.skips_a_layer_for_one_row, LOUD, "norm3"),
    Fault(faults.skips_all_layers_for_one_row, LOUD, "norm1", ("returned", "returned"), waits="on", slow=True),
    right(faults.uses_other_parameters_in_ddp, slow=True, truth=partial(one_process, model=faults.WithParts)),
    Fault(faults.swaps_layers_of_one_size, "silent", "norm2"),
    Fault(faults.swaps_layers_of_one_size, "silent", "norm2", world_size=3, slow=True),
    Fault(faults.swaps_layers_of_two_sizes, LOUD, r"right\b", slow=True),
    Fault(faults.calls_a_layer_twice, "silent", "norm1", slow=True),
    Fault(faults.has_other_channels, LOUD, "norm2", waits="off"),
    Fault(faults.leaves_a_layer_unconverted, LOUD, "norm3"),
    Fault(faults.swaps_two_models, LOUD, "1.left"),
    Fault(faults.swaps_two_models_of_one_class, "silent", "1.norm1", truth=TWO_MODELS),
    Fault(faults.swaps_two_models_that_nothing_holds, "silent", "silent", truth=TWO_MODELS, slow=True),
    # dtypes, gradients, modes
    right(faults.has_another_dtype, on="norm1", tolerance=1e-4),
    right(faults.autocasts_alone, on="norm1", tolerance=0.2, slow=True),
    Fault(faults.has_frozen_inputs, LOUD, "norm1"),
    Fault(faults.runs_without_gradients, LOUD, "norm1"),
    Fault(faults.gives_a_mask_alone, LOUD, "norm1.* forward with a mask"),
    Fault(faults.evaluates_while_others_train, LOUD, "norm1", ("returned", "returned"), waits="on"),
    Fault(faults.evaluates_while_others_train_in_ddp, LOUD, EVAL, (LOUD, LOUD), waits="both", slow=True),
    Fault(faults.is_frozen, LOUD, EVAL, ("returned", "returned"), waits="on"),
    Fault(faults.is_frozen_in_ddp, LOUD, EVAL, (LOUD, LOUD), waits="both", slow=True),
    Fault(faults.calls_forward_once_more, LOUD, "norm1"),
    Fault(faults.calls_no_backward, LOUD, "norm1", slow=True),
    Fault(faults.leaves_an_output_out_of_the_loss, LOUD, "left"),
    Fault(faults.has_a_penalty_alone, LOUD, "norm3", waits="off", slow=True),
    Fault(faults.accumulates_more, LOUD, "norm1", (LOUD, LOUD), named=0, waits="both", slow=True),
    Fault(faults.compiles_alone, "right", "has not", (LOUD, LOUD), waits="on", slow=True),
    right(faults.checkpoints_alone, slow=True),
    Fault(faults.repeats_exchanges_alone, LOUD, "norm1", slow=True),
    right(faults.computes_with_other_kernels),
    Fault(faults.has_another_eps, "silent", r"norm2.* eps 0\.5"),
    Fault(faults.has_another_group, LOUD, "has not", (LOUD, LOUD), waits="both", world_size=4, slow=True),
    Fault(faults.has_another_group_in_one_layer, LOUD, OF_PAIR, waits="both", world_size=4),
    # mishaps
    Fault(faults.raises_and_goes_on, LOUD, "norm1"),
    dies(faults.raises_in_forward, "Mishap"),
    dies(faults.raises_in_forward, "Mishap", world_size=3, slow=True),
    dies(faults.raises_in_backward, "Mishap", on="norm3"),
    dies(faults.raises_in_backward_in_ddp, "Mishap", on="norm3", slow=True),
    dies(faults.gets_an_input_of_the_wrong_width, "ValueError"),
    dies(faults.has_fewer_batches, "returned"),
    dies(faults.exits, "SystemExit"),
    dies(faults.is_interrupted, "KeyboardInterrupt"),
    dies(faults.is_terminated, "SIGTERM"),
    dies(faults.is_killed_in_forward, "SIGKILL"),
    dies(faults.is_killed_in_forward, "SIGKILL", world_size=3),
    dies(faults.is_killed_in_backward, "SIGKILL", on="norm3"),
    dies(faults.is_killed_between_steps, "SIGKILL"),
    dies(faults.kills_rank_0, "SIGKILL", named=0),
    dies(faults.kills_rank_0, "SIGKILL", named=0, store_on_rank_0=True),
    dies(faults.raises_in_forward, "Mishap", programs=True, slow=True),
    dies(faults.exits, "SystemExit", programs=True, slow=True),
    dies(faults.is_interrupted, "SIGINT", programs=True, slow=True),
    dies(faults.is_killed_in_forward, "SIGKILL", programs=True, slow=True),
    right(faults.stops_in_forward, programs=True, slow=True, wake_after=1.0),
    right(faults.stops_in_forward, wake_after=1.0),
    right(faults.stops_in_backward, wake_after=1.0),
    Fault(faults.stops_in_forward, LOUD, "norm1", (LOUD, AFTERWARDS), waits="both", wake_after=TIMEOUT + 4.0),
    Fault(faults.stops_in_backward, LOUD, "norm3", (LOUD, AFTERWARDS), waits="both", wake_after=TIMEOUT + 4.0),
    # data
    right(faults.gets_one_empty_batch, truth=partial(one_process, batches=sized(3, 0))),
    right(faults.gets_empty_batches, truth=partial(one_process, batches=sized(0, 0))),
    right(faults.gets_single_values, truth=partial(one_process, batches=sized(1, 0, 1)), world_size=3),
    Fault(faults.gets_one_value_in_all, "ValueError", "ValueError"),
    Fault(faults.runs_under_join, "ValueError", "ValueError"),
    right(faults.evaluates_on_rank_0),
]


def is_short(fault, check):
    return fault.waits in ("both", "on" if check else "off")


def setting_of(fault, check, folder):
    timeouts = (TIMEOUT, CHECK_TIMEOUT) if is_short(fault, check) else (MEETING, MEETING)
    return Setting(folder, check, timeouts, fault.store_on_rank_0, fault.programs)


def parameter(fault, check):
    marks = [pytest.mark.slow] if fault.slow else []
    return pytest.param(fault, check, marks=marks, id=f"{fault.name}-{'checked' if check else 'unchecked'}")


@pytest.fixture(scope="module")
def launches(request, tmp_path_factory):
    """Launch what the tests of this run will ask for, several at a time."""
    wanted = [item.callspec.params for item in request.session.items if "launches" in item.fixturenames]
    to_come = {}
    for fault, check in sorted(((p["fault"], p["check"]) for p in wanted), key=lambda both: not is_short(*both)):
        setting = setting_of(fault, check, tmp_path_factory.mktemp("fault") / "ranks")
        launch = partial(Launch, setting, fault.run, fault.world_size, wake_after=fault.wake_after)
        to_come[fault.name, check] = launch
    launches = Launches(to_come)
    yield launches
    launches.close()


@pytest.mark.parametrize(("fault", "check"), [parameter(*both) for both in product(FAULTS, (False, True))])
def test_fault(launches, fault, check):
    ends = launches.ends((fault.name, check))
    expected = fault.on if check else fault.off
    print(*(f"rank {rank}: {end.kind}, {end.error}\n{end.output}" for rank, end in enumerate(ends)), sep="\n")
    if expected in ("right", "silent"):
        assert [end.kind for end in ends] == ["returned"] * len(ends)
        found = list(differences([end.result for end in ends], fault.truth(fault.world_size), fault.tolerance))
        assert bool(found) is (expected == "silent"), found
    elif expected == "ValueError":
        assert [end.kind for end in ends] == ["ValueError"] * len(ends)
    elif check:
        expect_order_errors(fault, ends)
    else:
        expect_kinds(fault, ends, fault.off, fault.guilty[0])
        expect_hints(fault, ends)


def differences(results, truth, tolerance):
    """Yield what differs between the ranks' results and those of one process."""
    for step, wanted in enumerate(truth["y"]):
        yield from far(f"output {step}", torch.cat([r["y"][step].double() for r in results]), wanted, tolerance)
    for name, wanted in truth["gradients"].items():
        yield from far(f"gradient of {name}", sum(r["gradients"][name] for r in results), wanted, tolerance)
    for name, wanted in truth["buffers"].items():
        for rank, r in enumerate(results):
            yield from far(f"{name} of rank {rank}", r["buffers"][name], wanted, tolerance)


def far(what, actual, wanted, tolerance):
    absolute = tolerance * max([1.0, *wanted[wanted.isfinite()].abs().flatten().tolist()])
    try:
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=absolute, equal_nan=True, check_dtype=False)
    except AssertionError as error:
        yield f"{what}: {error}"


def expect_hints(fault, ends):
    """An error of an exchange that reaches Python says which layer, on which rank, and what to do."""
    for rank, end in enumerate(ends):
        if end.kind == "RuntimeError" and rank != fault.named:
            message = end.error[1]
            assert re.search(rf"exchange of .*(norm[123]|left|right)\b.*, on rank {rank}\b", message), message
            assert "SYNCBN_CHECK_ORDER=1" in message, message


def expect_kinds(fault, ends, others, guilty):
    for rank, end in enumerate(ends):
        kinds = guilty if rank == fault.named else others
        assert end.kind in kinds.split("|"), f"rank {rank}: expected {kinds}, got {end.kind}"


def expect_order_errors(fault, ends):
    """Every other rank says where the guilty one is; so does that rank, if it found the difference too."""
    expect_kinds(fault, ends, "OrderError", fault.guilty[1])
    wanted = rf"^  rank {fault.named}: (last )?{fault.on}"
    if fault.store_on_rank_0:
        wanted = "cannot use the process group's store"
    waited = fault.waits in ("on", "both")
    for rank, end in enumerate(ends):
        if end.kind == "OrderError" and not (waited and rank == fault.named):
            message = end.error[1]
            assert re.search(wanted, message, re.MULTILINE), message
            assert f"rank {rank}" in message, message
            assert re.search(r"\b(norm[123]|left|right)\b", message), message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_nan_and_inf_are_those_of_one_process(run, value, kernels, dtype):
    """NaN where nn.BatchNorm on the joined batch has it, and no channel beside; the same on all ranks, for good.

    Of running statistics: Inf, which stays Inf in nn.BatchNorm, may have become NaN.
    """
    results = run(faults.gets_an_odd_value, 2, value, kernels, dtype)
    truth = one_process(2, model=faults.just_norms, batches=faults.odd_values(value))
    for name, buffer in results[0]["buffers"].items():
        assert buffer.numpy().tobytes() == results[1]["buffers"][name].numpy().tobytes(), name
    for result in (*results, truth):
        result["buffers"] = {k: v.where(v.isfinite(), torch.nan) for k, v in result["buffers"].items()}
    assert not list(differences(results, truth, 1e-9 if dtype == torch.float64 else 1e-4))
    for name in ("0.running_mean", "0.running_var", "2.running_mean", "2.running_var"):
        assert truth["buffers"][name].isnan().tolist() == [False, False, True, False]


def goes_on(rank, world_size, spec, folder):
    """Compare one layer with nn.BatchNorm in a process group, without one, and in a new one, again and again."""
    group = faults.pair_of(rank) if spec == "pairs" else spec
    layer = syncbn.SyncBatchNorm(4, process_group=group, dtype=torch.float64)
    partners = range(world_size) if spec in (None, "node") else [rank // 2 * 2, rank // 2 * 2 + 1]
    oracle = nn.BatchNorm1d(4, dtype=torch.float64)
    train_beside(layer, oracle, 0, rank, partners)
    for life in (1, 2):
        dist.barrier()
        dist.destroy_process_group()
        train_beside(layer, oracle, 2 * life - 1, rank, [rank])
        store = dist.FileStore(f"{folder}/{life}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        if spec == "pairs":
            with pytest.raises(ValueError, match="no such group exists"):
                layer(batch(0, rank))
            faults.pair_of(rank)  # the layer finds it by its ranks
        train_beside(layer, oracle, 2 * life, rank, partners)
    dist.barrier()


def train_beside(layer, oracle, step, rank, partners):
    """Assert that ``layer`` computes what ``oracle`` does on the joined batches of ``partners``."""
    parts = [batch(step, partner) for partner in partners]
    y, wanted = layer(parts[list(partners).index(rank)]), oracle(torch.cat(parts))
    before = sum(len(part) for part, partner in zip(parts, partners, strict=True) if partner < rank)
    torch.testing.assert_close(y, wanted[before : before + len(y)])
    torch.testing.assert_close(layer.state_dict(), oracle.state_dict())


@pytest.mark.parametrize("spec", [None, 2, "node", "pairs"])
def test_a_layer_goes_on_in_a_new_process_group(run, spec, tmp_path):
    run(goes_on, 4, spec, tmp_path)


def sample(rank, world_size, drop_last):
    data = TensorDataset(batch(0, 0, 11))
    sampler = DistributedSampler(data, world_size, rank, shuffle=False, drop_last=drop_last)
    model = syncbn.convert(faults.Net())
    ddp = DistributedDataParallel(model)
    parts = [x for (x,) in DataLoader(data, batch_size=4, sampler=sampler)]
    return faults.result(model, [faults.step_of(ddp, x) for x in parts]), parts


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_distributed_sampler_with_an_uneven_last_batch(run, drop_last):
    """It gives every rank as many batches: 4 and 2 images, or 4 and 1."""
    results, parts = zip(*run(sample, 2, drop_last), strict=True)
    assert [len(x) for x in parts[0]] == [4, 1 if drop_last else 2]
    truth = faults.Net()
    ys = [faults.step_of(truth, torch.cat(each)) for each in zip(*parts, strict=True)]
    assert not list(differences(results, faults.result(truth, ys), 1e-9))  # DDP's mean, twice


def stages(rank, world_size, is_apart, is_on):
    """Each rank runs its own stage of a pipeline on what it has by now from the stage before."""
    stages = nn.ModuleList([faults.Net(), faults.Net()])
    with torch.no_grad():
        stages[1].linears[0].weight.mul_(2)
    plain = copy.deepcopy(stages[rank])
    groups = [dist.new_group([r]) for r in range(world_size)]  # of the ranks that have the same stage
    stage = syncbn.convert(stages, process_group=groups[rank] if is_apart else None)[rank]
    with syncbn.debug.check_order(timeout=30) if is_on else contextlib.nullcontext():
        try:
            for step in range(2):
                faults.learn(stage(batch(step, rank))), faults.learn(plain(batch(step, rank)))
        except syncbn.debug.OrderError as error:
            return str(error)
    pairs = zip(stage.parameters(), plain.parameters(), strict=True)
    return all(torch.allclose(p.grad, other.grad, rtol=1e-9) for p, other in pairs)


def test_stages_of_a_pipeline(run):
    """Layers of one size answer each other: wrong without a word, until each stage has a group, or the check is on."""
    assert run(stages, 2, False, False) == [False, False]
    assert run(stages, 2, True, False) == run(stages, 2, True, True) == [True, True]
    for message in run(stages, 2, False, True):
        assert "rank 0: 0.norm1 (ModuleList), forward" in message
        assert "rank 1: 1.norm1 (ModuleList), forward" in message
