"""The benchmark: peers that are right, times compared within a round, every row there. No test looks at a time."""

import json
import multiprocessing
import runpy
import signal
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch import nn
from versions import VERSION

from experiment.bench import (
    collectives,
    contenders,
    layer,
    memory,
    plot,
    rank_pool,
    registry,
    save_memory,
    spawn,
    tables,
    timing,
    training_step,
)
from experiment.bench.contenders import CONTENDERS
from syncbn import use_kernels
from syncbn.ops import backends, cpu, reference

ROOT = Path(__file__).parents[1]
SYNCHRONIZED = ["cpu", "reference", "composed", "gather"]
TINY = [
    "layer.contenders=[plain,reference,composed,floor]", "layer.shapes=[[2,3,4,4],[8,3]]", "layer.rounds=2",
    "model=resnet8", "model.width=8", "step.contenders=[plain,bare,reference,gather]", "step.image_size=8",
    "step.rounds=2", "collectives.archs=[resnet18]", "collectives.image_size=32", "collectives.numbers=[9]",
    "collectives.world_sizes=[2]", "collectives.rounds=2", "memory.contenders=[plain,reference]",
    "memory.shapes=[[2,3,4,4]]", "memory.step_contenders=[reference]", "memory.arch=resnet18",
    "memory.image_size=32", "save_memory.models=[unet]", "save_memory.image_size=32", "save_memory.rounds=2",
    "timeout=60",
]  # fmt: skip


def skip_without_compiler(name):
    if name == "cpu" and not cpu.is_ready():
        pytest.skip("no C++ compiler is installed")


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("bench", overrides=[*TINY, *overrides])


def joined(shape, memory_format):
    """Make x and dy of both ranks joined, and one process's float64 answer: y, dx, dweight, dbias, statistics."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x, dy = ((t + i).to(memory_format=memory_format) for i, t in enumerate((x, dy)))
    norm = affine(nn.BatchNorm2d(shape[1], dtype=torch.float64))
    x.requires_grad_()
    y = norm(x)
    y.backward(dy)
    return x.detach(), dy, (y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)


def affine(norm):
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, norm.num_features))
        norm.bias.copy_(torch.linspace(-1, 1, norm.num_features))
    return norm


def differences(rank, world_size, name, memory_format):
    """Compare a contender on this rank's part, an uneven split, with one process."""
    x, dy, truth = joined((7, 5, 3, 4), memory_format)
    mine = slice(0, 2) if rank == 0 else slice(2, 7)
    contender = CONTENDERS[name].convert(affine(nn.BatchNorm2d(5, dtype=torch.float64)))
    part = x[mine].clone().requires_grad_()
    with use_kernels(CONTENDERS[name].kernels):
        y = contender(part)
        y.backward(dy[mine])
    for parameter in (contender.weight, contender.bias):  # local sums, as DDP averages them
        dist.all_reduce(parameter.grad)
    results = (y, part.grad, contender.weight.grad, contender.bias.grad)
    results += (contender.running_mean, contender.running_var)
    truth = (truth[0][mine], truth[1][mine], *truth[2:])
    assert contender.num_batches_tracked == 1
    return [(a - b).abs().max().item() for a, b in zip(results, truth, strict=True)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", SYNCHRONIZED)
def test_peers_are_batchnorm_of_the_joined_batch(run, name, memory_format):
    skip_without_compiler(name)
    for found in run(differences, 2, name, memory_format):
        assert max(found) < 1e-11  # float64, values of order 1, the peers' plain squares included


def bare_and_plain(rank, world_size):
    results = []
    for name in ("plain", "bare"):
        torch.manual_seed(rank)
        model = nn.Sequential(CONTENDERS[name].convert(affine(nn.BatchNorm2d(3))), nn.ReLU(inplace=True))
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        with collectives.Counter() as counter:
            y = model(x)
            y.backward(torch.randn_like(y))
        results.append((y, x.grad, model[0].running_var, counter.num_collectives, counter.num_bytes))
    (plain, bare) = results
    return all(map(torch.equal, plain[:3], bare[:3])), plain[3:], bare[3:]


def test_bare_is_plain_batchnorm_that_waits_as_long(run):
    for same, plain, bare in run(bare_and_plain, 2):
        assert same
        assert plain == (0, 0)
        assert bare == (2, 8 * (2 * 3 + 1 + 2 * 3))


def bare_in_a_graph(rank, world_size):
    """How far both differ, eager and in a graph, and the lengths of what each pass of the graph all-reduces."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    found = []

    def compiler(graph, inputs):
        reduced = [node.args[0] for node in graph.graph.nodes if "all_reduce" in str(node.target)]
        found.append([node.meta["val"].numel() for node in reduced])
        return make_boxed_func(graph)

    results = []
    for name in ("plain", "bare"):
        torch.manual_seed(rank)
        layers = [CONTENDERS[name].convert(affine(nn.BatchNorm2d(3))), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)]
        model = nn.Sequential(*layers, CONTENDERS[name].convert(nn.BatchNorm2d(3)))
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        run = (
            model
            if name == "plain"
            else torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
        )
        y = run(x)
        y.backward(torch.randn_like(y))
        results.append((y.detach(), x.grad, model[0].running_var, model[0].num_batches_tracked))
    return [(a - b).abs().max().item() for a, b in zip(*results, strict=True)], found


def test_bare_in_a_graph_too(run):
    for differences, lengths in run(bare_in_a_graph, 2):
        assert max(differences) < 1e-5
        again = [7, 7] if VERSION < (2, 7) else []  # torch 2.6 repeats the forward pass's in backward
        assert lengths == [[7, 7], [*again, 6, 6]]


def test_the_floor_copies():
    x, dy = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    with spawn.fake_group():
        y = layer.make_layer("floor", x)(x)
    y.backward(dy)
    assert torch.equal(y, x)
    assert torch.equal(x.grad, dy)


def test_every_round_has_an_order_of_its_own_and_warm_up_is_not_counted():
    log = []
    runs = {name: lambda name=name: log.append(name) for name in "abc"}
    times = timing.interleave(runs, num_rounds=40)
    assert {name: len(values) for name, values in times.items()} == {"a": 40, "b": 40, "c": 40}
    rounds = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert len(rounds) == 40 + timing.NUM_WARM_UP
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    first, log[:] = log[:], []
    timing.interleave(runs, num_rounds=40)
    assert log == first  # as it is on every rank


def test_ratios_are_taken_within_a_round():
    base = [1.0, 50.0, 0.1, 7.0, 3.0]  # a machine that is now slow, now fast
    times = {"base": base, "mine": [2 * seconds for seconds in reversed(base)][::-1]}
    rows = {row["contender"]: row for row in timing.summarize(times, ("base", "absent"))}
    assert rows["mine"]["ratios"] == {"base": (2.0, 2.0, 2.0)}
    assert rows["base"]["ms"] == (1e3, 3e3, 7e3)
    assert timing.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_a_step_lasts_as_on_its_slowest_rank():
    assert timing.slowest([{"a": [1.0, 5.0]}, {"a": [2.0, 3.0]}]) == {"a": [2.0, 5.0]}


def rank_and_sum():
    total = torch.ones(1)
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.get_num_threads()


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("here it is")
    dist.barrier()


def fail_on_rank_1_alone():
    if dist.get_rank() == 1:
        raise ValueError("here it is")
    time.sleep(60)


def sleep():
    time.sleep(60)


def both(*args):
    return args


def late(rank, world_size, seconds):
    time.sleep(seconds)
    return "late"


def children():
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.slow
def test_ranks_answer_or_say_why_and_are_gone():
    before = children()
    assert spawn.run(rank_and_sum, 2, spawn.Setting(30)) == [(0, 2.0, 1), (1, 2.0, 1)]
    assert spawn.run(rank_and_sum, 1, spawn.Setting(30, fake=True)) == [(0, 1.0, 1)]  # reduces nothing
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*here it is"):
        spawn.run(fail_on_rank_1, 2, spawn.Setting(30))
    with pytest.raises(RuntimeError, match=r"answer of ranks \[0\] within 0.5 s; set timeout higher"):
        spawn.run(sleep, 1, spawn.Setting(0.5))
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*here it is.*ranks \[0\] were still running 5 s"):
        spawn.run(fail_on_rank_1_alone, 2, spawn.Setting(30))
    with pytest.raises(RuntimeError, match=r"(?s)answer of ranks \[0\] within 0.001 s.*rank 0 of 1 is at\nits start"):
        spawn.run(sleep, 1, spawn.Setting(0.001))
    assert children() == before


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_call_leaves_no_answer_behind(tmp_path):
    pool = rank_pool.RankPool(tmp_path, "cpu", 1, ["torch"])
    options = {"timeout": 30, "initialize": False}
    try:
        assert pool.run(both, 2, "first", **options) == [(0, 2, "first"), (1, 2, "first")]
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            pool.run(late, 2, 1.5, **options)
        assert pool.run(both, 2, "second", **options) == [(0, 2, "second"), (1, 2, "second")]
    finally:
        signal.signal(signal.SIGALRM, before)
        pool.close()


def test_rows_of_the_layer():
    rows = layer.measure(composed())
    cases = [([2, 3, 4, 4], "contiguous"), ([2, 3, 4, 4], "channels_last"), ([8, 3], "contiguous")]
    names = ["plain", "reference", "composed", "floor"]
    assert [((row["shape"], row["format"]), row["contender"]) for row in rows] == list(product(cases, names))
    for row in rows:
        assert row["ratios"].keys() == {"plain", "floor"}
        assert all(0 < low <= median <= high for low, median, high in (row["ms"], *row["ratios"].values()))
        if row["contender"] == "plain":
            assert row["ratios"]["plain"] == (1, 1, 1)
    assert not dist.is_initialized()
    summary, by_case = layer.tabulate(rows)
    assert [line[0] for line in summary.rows] == [CONTENDERS[name].label for name in names]
    assert [line[:2] for line in by_case.rows][1] == ["(2,3,4,4)", "channels_last"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    everyone = [name for name in ("plain", *SYNCHRONIZED, "floor") if name != "cpu" or cpu.is_ready()]
    rows = layer.measure(composed(f"layer.dtype={dtype}", f"layer.contenders=[{','.join(everyone)}]"))
    assert len(rows) == 3 * len(everyone)


def test_contenders_run_on_their_kernels_which_are_chosen_once(monkeypatch):
    skip_without_compiler("cpu")
    chosen, choose = [], backends.choose
    monkeypatch.setattr(backends, "choose", lambda *tensors: chosen.append(choose(*tensors)) or chosen[-1])
    x = torch.randn(2, 5, 3, 7, requires_grad=True)  # which no other test has
    layers = {name: layer.make_layer(name, x) for name in ("reference", "cpu")}
    with spawn.fake_group():
        for _ in range(3):
            for name, norm in layers.items():
                with use_kernels(CONTENDERS[name].kernels):
                    norm(x)
    first, second = chosen
    assert first is reference
    assert isinstance(second, cpu.CpuKernels)


def test_a_part_without_its_base_has_no_ratios_to_it():
    rows = layer.measure(composed("layer.contenders=[reference,floor]"))
    assert all(row["ratios"].keys() == {"floor"} for row in rows)
    summary, by_case = layer.tabulate(rows)
    assert summary.rows[0][1:5] == ["", "", "", ""]
    assert len({len(line) for line in [by_case.columns, *by_case.rows]}) == 1


@pytest.mark.slow
def test_compiled_beside_eager():
    options = "layer.contenders=[plain,plain_compiled,compiled]", "step.contenders=[plain,bare_compiled,compiled]"
    config = composed("timeout=300", "layer.shapes=[[2,3,4,4]]", *options)
    rows = layer.measure(config)
    assert [row["graph_breaks"] for row in rows] == [None, 0, 0] * 2
    summary, by_case = layer.tabulate(rows)
    assert [line[3] for line in summary.rows[:2]] == ["1.00", "1.00"]
    assert float(summary.rows[2][3]) > 0
    assert by_case.rows[0][3].startswith("1.00")
    rows = training_step.measure(config)
    assert [row["graph_breaks"] for row in rows] == [None, 0, 0]
    [table] = training_step.tabulate(rows)
    assert [line[-1] for line in table.rows] == ["", "0", "0"]
    assert table.rows[0][2] == ""  # bare, not compiled, is not among them
    assert table.rows[1][2].startswith("1.00")


@pytest.mark.slow
def test_rows_of_the_step():
    rows = training_step.measure(composed())
    assert [row["contender"] for row in rows] == ["plain", "bare", "reference", "gather"]
    assert all(row["ratios"].keys() == {"bare", "plain"} and row["graph_breaks"] is None for row in rows)
    [table] = training_step.tabulate(rows)
    assert "graph breaks" not in table.columns


def test_collectives_are_counted_and_timed():
    rows = collectives.measure(composed("collectives.contenders=[bare,reference,gather]"))
    found = {(row["contender"], row["direction"]): row for row in rows if row["kind"] == "counted"}
    num_channels = 64 * 5 + 128 * 5 + 256 * 5 + 512 * 5  # of ResNet-18's 20 norm layers
    for name, direction in product(("bare", "reference", "gather"), ("forward", "backward")):
        assert found[name, direction]["collectives"] == 20
    for name in ("bare", "reference"):
        assert found[name, "forward"]["bytes"] == 8 * (2 * num_channels + 20)
        assert found[name, "backward"]["bytes"] == 8 * 2 * num_channels
    timed = [(row["world_size"], row["numbers"], row["contender"]) for row in rows if row["kind"] == "timed"]
    assert timed == [(2, 9, "all_reduce"), (2, 9, "all_gather")]
    assert [len(table.rows) for table in collectives.tabulate(rows)] == [3, 1]


def test_saved_bytes():
    x = torch.randn(10, requires_grad=True)
    assert memory.saved_bytes(lambda: x[:5].exp()) == 20
    assert memory.saved_bytes(lambda: x * x.view(2, 5).view(10)) == 40  # one storage
    assert memory.saved_bytes(lambda: x * x, [x]) == 0


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(4, 64, 14, 14), (2, 512, 7, 7)])
def test_a_layer_saves_its_input_and_little_more(shape, name):
    skip_without_compiler(name)
    with spawn.fake_group():
        row = memory._of_layer(list(shape), name, "cpu")
    assert row["input"] < row["saved"] <= row["input"] + 64 * shape[1] + 1024


class Broken(nn.Module):
    def forward(self, x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2


def test_graph_breaks_are_counted():
    torch._dynamo.reset()
    model = torch.compile(Broken(), backend="eager")
    assert contenders.count_graph_breaks("compiled", lambda: model(torch.ones(2))) == 1
    assert contenders.count_graph_breaks("reference", lambda: model(torch.ones(2))) is None
    with pytest.raises(RuntimeError, match=r"expected torch\.compile to make a graph of compiled, got none"):
        contenders.count_graph_breaks("compiled", lambda: None)


def test_the_figure_has_a_panel_for_each_part():
    times = {name: [1.0, 2.0, 3.0] for name in ("plain", "reference", "plain_compiled", "compiled")}
    rows = timing.summarize(times, ("plain", "plain_compiled"))
    layers = [{"shape": [2, 3], "format": "contiguous", **row} for row in rows]
    pair = timing.summarize({"plain": [1.0, 1.0], "saving": [1.5, 1.5]}, ("plain",))
    saving = [{"model": "unet", "saved": n, "peak": 2 * n, **row} for n, row in zip((8, 4), pair, strict=True)]
    figure = plot.draw({"layer": layers, "step": rows, "save_memory": saving})
    of_layer, of_step, of_memory = ([label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes)
    assert of_layer == [CONTENDERS[name].label for name in ("reference", "compiled")]
    assert of_step == [CONTENDERS[name].label for name in times]
    assert of_memory == ["unet"]
    points = [line.get_xdata()[0] for line in figure.axes[2].lines if line.get_marker() != "None"]
    assert sorted(points) == [0.5, 0.5, 1.5]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="parts: expected some of layer, step"):
        registry.check(composed("parts=[layer,lyer]"))
    with pytest.raises(ValueError, match=r"contenders: expected names out of plain, bare.*, got gathre"):
        registry.check(composed("parts=[memory]", "memory.step_contenders=[gathre]"))
    with pytest.raises(ValueError, match=r"out of plain, bare.*floor, got plain_compiled"):
        registry.check(composed("parts=[collectives]", "collectives.contenders=[plain_compiled]"))


def test_tables_as_text():
    table = tables.as_they_are("T", [{"ranks": 2, "ms": 1.23456}, {"ranks": 4, "note": "a"}])
    assert table.columns == ["ranks", "ms", "note"]
    assert table.markdown().splitlines()[2:] == [
        "| ranks | ms | note |", "| ---: | ---: | --- |", "| 2 | 1.23 |  |", "| 4 |  | a |"
    ]  # fmt: skip


@pytest.mark.slow
def test_peak_of_a_step_in_a_fresh_process():
    rows = memory.measure(composed())
    assert [(row["kind"], row["contender"]) for row in rows] == [
        ("layer", "plain"),
        ("layer", "reference"),
        ("step", "reference"),
    ]
    assert rows[-1]["peak"] > rows[-1]["saved"] > 0
    assert [len(table.rows) for table in memory.tabulate(rows)] == [2, 1]


@pytest.mark.slow
def test_what_save_memory_saves():
    rows = save_memory.measure(composed())
    assert [(row["model"], row["contender"]) for row in rows] == [("unet", "plain"), ("unet", "saving")]
    assert 0 < rows[1]["saved"] < 0.8 * rows[0]["saved"]
    assert min(row["peak"] for row in rows) > 0
    [table] = save_memory.tabulate(rows)
    assert table.rows[0][0] == "unet"


@pytest.mark.slow
def test_the_users_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch" / "bench.py"), "parts=[layer,step]", *TINY])
    runpy.run_path(sys.argv[0], run_name="__main__")
    folder = tmp_path / "outputs" / "bench"
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.md", "bench.svg", "bench.png"}
    results = json.loads((folder / "bench.json").read_text())
    assert {name: len(rows) for name, rows in results["parts"].items()} == {"layer": 12, "step": 4}
    assert {"cpu", "cores", "torch", "threads per process"} <= results["machine"].keys()
    assert results["command"].startswith("python launch/bench.py ")
    text = (folder / "bench.md").read_text()
    assert text.startswith(f"`{results['command']}`, {results['date']}; {results['machine']['cpu']}")
    titles = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    shown = capsys.readouterr().out
    assert len(titles) == 3
    assert all(title in shown for title in titles)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda: expected a GPU, found none"):
        registry.check(composed("device=cuda"))
