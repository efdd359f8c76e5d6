"""launch/gpu_check.py: what it finds, what it says of bad input, and that one part costs no other."""

import json
import os
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.distributed as dist

import gpu_check
import syncbn
from experiment.bench import rank_pool
from experiment.gpu_check import (
    inputs,
    large_tensors,
    layer,
    phase_cases,
    phases,
    rank_tests,
    registry,
    report,
    requirements,
    worker,
)
from experiment.gpu_check.resnet import ResNet50
from experiment.gpu_check.result import FAILED, OK, SKIPPED, Outcome, Table, make_record
from experiment.gpu_check.runner import ROOT, environment
from syncbn.ops import backends, cpu, cuda, reference, selfcheck, triton

HERE = Path(__file__).parent


def part(name, **options):
    return registry.Part(name, f"what {name} does", f"test_gpu_check:{name}", 60, **options)


def measures(device):
    return Outcome("measured", [Table("Rows", [{"what": "a|b", "ms": [1.0, 2.0, 3.0], "big": 12345.6}], "A note.")])


def finds(device):
    return Outcome("measured", [Table("Rows", [{"error": float("inf")}])], ["first fault", "second fault"])


def raises(device):
    raise ValueError("expected something else\nand more")


def hangs(device):
    time.sleep(600)


def aborts(device):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"child {child.pid}", flush=True)
    os.abort()


def falls_back(device):
    warnings.warn("syncbn.ops.cuda was compared: expected equal results, got NaN", RuntimeWarning, stacklevel=1)
    warnings.warn("another library's", RuntimeWarning, stacklevel=1)
    return Outcome("measured")


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # ended, and nobody has asked how


@pytest.mark.slow
def test_a_part_costs_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    chosen = [part("finds"), part("raises"), part("hangs", cpu_limit=1), part("aborts"), part("measures")]
    assert gpu_check.check(chosen, "cpu", tmp_path, "launch/gpu_check.py --device cpu") == 1
    records = {record["name"]: record for record in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]}
    assert list(records) == ["finds", "raises", "hangs", "aborts", "measures"]
    assert [record["status"] for record in records.values()] == [FAILED] * 4 + [OK]
    assert records["finds"]["failures"] == ["first fault", "second fault"]
    assert records["finds"]["summary"] == "first fault (and 1 more)"
    assert records["raises"]["summary"] == "ValueError: expected something else"
    assert "in raises" in records["raises"]["error"]
    assert records["hangs"]["summary"] == "passed its time limit of 1 s"
    assert records["aborts"]["summary"] == "ended by signal SIGABRT"
    child = int(records["aborts"]["error"].split("child ")[1].split()[0])
    deadline = time.monotonic() + 60
    while not is_gone(child):  # the system ends it in its own time
        assert time.monotonic() < deadline
        time.sleep(0.05)
    printed = capsys.readouterr().out
    table = printed.split("\n\n")[1]
    assert [line.split()[:2] for line in table.splitlines()[2:]] == [[k, r["status"]] for k, r in records.items()]
    text = (tmp_path / "gpu_check.md").read_text()
    for found in (
        "- command: python launch/gpu_check.py --device cpu",
        f"- torch: {torch.__version__}",
        "| hangs | failed |",
        "ok: measures. measured",
        "| a\\|b | 2 (1 to 3) | 12346 |",
        "- second fault",
        "| inf |",
        "A note.",
    ):
        assert found in text, found


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cpu", "--parts", "layer,nonsense"], "compile, got 'nonsense'"),
    ],
)
def test_a_wrong_command_line(arguments, found, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(arguments)
    assert caught.value.code == 2
    assert found in capsys.readouterr().err


def test_without_a_gpu_it_says_so_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(requirements, "num_gpus", lambda: 0)
    assert gpu_check.main(["--output-dir", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert "expected a CUDA GPU, found none (torch " in said
    assert "--device cpu runs" in said


def no_memory():
    raise RuntimeError("CUDA error: out of memory\nmore")


@pytest.mark.parametrize(
    ("name", "probes", "status", "text"),
    [
        ("layer", {"free_memory": lambda: (2**29, 80 * 2**30)}, FAILED,
         "needs 4 GiB free on cuda:0, 0.5 GiB are free of 80"),
        ("layer", {"free_memory": no_memory}, FAILED, "could not even look: CUDA error: out of memory"),
        ("nccl_one", {"has_nccl": lambda: False}, FAILED, "needs NCCL, which this torch"),
        ("compile", {"import_problem": lambda name: f"no {name}"}, FAILED, "needs Triton (pip install triton)"),
        ("ranks_one_gpu", {"import_problem": lambda name: f"no {name}"}, FAILED, "needs pytest"),
        ("nccl_ranks", {"num_gpus": lambda: 1}, SKIPPED, "needs 2 GPUs, 1 is here"),
        ("large", {"import_problem": lambda name: f"no {name}"}, SKIPPED, "needs Triton (pip install triton): "),
        ("large", {"free_memory": lambda: (20 * 2**30, 80 * 2**30)}, SKIPPED, "needs 24 GiB free"),
    ],
)  # fmt: skip
def test_what_a_gpu_machine_lacks(monkeypatch, name, probes, status, text):
    everything = {"free_memory": lambda: (70 * 2**30, 80 * 2**30), "has_nccl": lambda: True, "num_gpus": lambda: 1}
    for probe, value in (everything | {"import_problem": lambda name: ""} | probes).items():
        monkeypatch.setattr(requirements, probe, value)
    [chosen] = registry.choose(name)
    record = worker.run(replace(chosen, target="test_gpu_check:measures"), "cuda")
    assert record["status"] == status
    assert text in record["summary"]


def test_what_a_cpu_cannot_run_is_skipped():
    skipped = {p.name: found for p in registry.PARTS if (found := requirements.unmet(p, "cpu"))}
    one = SKIPPED, "needs a CUDA GPU"
    assert skipped == {"nccl_ranks": (SKIPPED, "needs 2 CUDA GPUs"), "cuda_graph": one, "large": one}


def test_slower_kernels_than_asked_for_are_a_failure():
    record = worker.run(part("falls_back"), "cpu")
    assert record["status"] == FAILED
    assert len(record["failures"]) == 1
    assert "RuntimeWarning: syncbn.ops.cuda was compared" in record["summary"]


def test_what_serves_is_named_and_must_be_the_quickest(monkeypatch):
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3)
    of_triton = type("TritonKernels", (), {"__module__": "syncbn.ops.triton.launch"})()
    for kernels, name in ((of_triton, "triton"), (cuda, "cuda"), (reference, "reference")):
        monkeypatch.setattr(backends, "choose", lambda *_, kernels=kernels: kernels)
        assert inputs.back_end(layer, x) == name
    monkeypatch.setattr(requirements, "import_problem", lambda name: "")
    assert inputs._slower("triton") is None
    assert "on the reference kernels" in inputs._slower("reference")
    assert "not on triton, though Triton is installed" in inputs._slower("cuda")
    with inputs.within(inputs.OPERATORS):
        assert inputs._slower("cuda") is None  # as was asked
    monkeypatch.setattr(requirements, "import_problem", lambda name: "no Triton")
    assert inputs._slower("cuda") is None


def test_the_goals_of_a_layer():
    rows = [
        {"MB": mb, "to SyncBatchNorm": [0.1, ratio, 2.0], "to copy, device": [1.0, to_copy, 2.0]}
        for mb, ratio, to_copy in ((1.0, 0.5, 9.0), (16.0, 0.8, 1.2), (32.0, 0.6, 1.1))
    ]
    assert layer._goals(rows) == [
        "at most 0.7 of nn.SyncBatchNorm's time: missed in 1 of 3, worst 0.80",
        "at most 1.25 of 4 copies on the device for maps from 16 MB: met, worst 1.20",
    ]
    assert layer._goals(rows[:1])[1].endswith("not measured")


def test_a_fault_at_the_end_of_a_large_tensor_is_found(monkeypatch):
    def wrong(*args):
        y, statistics = reference.forward_apply(*args)
        y.view(-1)[-8:] = 0
        return y, statistics

    kernels = SimpleNamespace(**{phase: getattr(reference, phase) for phase in RESULTS})
    monkeypatch.setattr(triton, "kernels_for", lambda *_, **__: kernels)
    for name, value in (("_NUM", 264), ("_PIECE", 64), ("_END", 50)):
        monkeypatch.setattr(large_tensors, name, value)
    assert large_tensors.measure("cpu").failures == []
    kernels.forward_apply = wrong
    labels = ["1x2x264, y", "264x2, y", "1x1x528, y", "1x1x504, y"]
    assert [f.partition(": ")[0] for f in large_tensors.measure("cpu").failures] == labels
    monkeypatch.setattr(triton, "kernels_for", lambda *_, **__: None)
    assert "expected those of triton" in large_tensors.measure("cpu").failures[0]


@pytest.mark.slow
def test_triton_is_compared_in_its_interpreter():
    command = [sys.executable, str(HERE / "gpu_stand_ins.py"), "triton"]
    variables = environment() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=150)
    assert done.returncode == 0, done.stderr
    of_phases, of_large = json.loads(done.stdout.splitlines()[-1])
    assert of_phases["failures"] == of_large["failures"] == []
    # three kinds of each of two shapes, one of the empty one, and for float32 mean/std = 1e4 in two layouts
    assert [row["inputs"] for row in of_phases["tables"][0]["rows"]] == [7, 9, 7, 7]
    assert len(of_large["tables"][0]["rows"]) == 4 * 4


RESULTS = {  # of each phase, in the order of its return value; then what it changes in place
    "forward_reduce": ("sums",),
    "forward_apply": ("y", "statistics", "running_mean", "running_var"),
    "backward_reduce": ("sums", "grad_weight", "grad_bias"),
    "backward_apply": ("dx",),
}


WITH_COUNT = [("forward_reduce", "sums"), ("forward_apply", "statistics")]


def all_off(t):
    return t * 1.001


def all_but_the_count_off(t):
    return torch.cat([t[:-1] * 1.001, t[-1:]])


def the_count_off(t):
    return torch.cat([t[:-1], t[-1:] * 1.001])


def spoilt(function, position, spoil, is_method=False):
    """Return ``function`` with the result at ``position`` spoilt."""

    def wrong(*args):
        found = function(*args)
        several = found if isinstance(found, tuple) else (found,)
        if position >= len(several):
            moved = args[4 + is_method][position - len(several)]  # of Running
            moved.copy_(spoil(moved))
            return found
        several = [t if t is None or i != position else spoil(t) for i, t in enumerate(several)]
        return tuple(several) if isinstance(found, tuple) else several[0]

    return wrong


@pytest.mark.parametrize(("phase", "what"), [(phase, what) for phase, names in RESULTS.items() for what in names])
@pytest.mark.parametrize("name", phases.BACK_ENDS["cpu"])
def test_a_fault_in_a_phase_is_found_by_name(monkeypatch, name, phase, what):
    monkeypatch.setattr(phase_cases, "_SHAPES", phase_cases._SHAPES[:2])
    if phases._open(name) is not None:
        pytest.skip("no C++ compiler is installed")
    of = {"reference": reference, "cpu": cpu.CpuKernels}[name]
    spoil = all_but_the_count_off if (phase, what) in WITH_COUNT else all_off
    wrong = spoilt(getattr(of, phase), RESULTS[phase].index(what), spoil, is_method=name == "cpu")
    monkeypatch.setattr(of, phase, wrong)
    failures = [f for f in phases.measure("cpu").failures if "self-check" not in f]
    assert all(f.startswith(f"{name}.{phase}, ") for f in failures), failures
    assert all(f": {what}: " in f for f in failures), failures
    found = [f for f in failures if f.startswith(f"{name}.{phase}, float32, ")]
    assert [f.split(", ")[2].split(":")[0] for f in found][:2] == ["contiguous", "channels_last"]
    assert 0.0005 < float(found[0].partition("error ")[2].partition(",")[0]) < 0.002


@pytest.mark.parametrize(("phase", "what"), WITH_COUNT)
def test_a_wrong_count_is_found(monkeypatch, phase, what):
    monkeypatch.setattr(phase_cases, "_SHAPES", phase_cases._SHAPES[:1])
    wrong = spoilt(getattr(reference, phase), RESULTS[phase].index(what), the_count_off)
    monkeypatch.setattr(reference, phase, wrong)
    found = [f for f in phases.measure("cpu").failures if f.startswith(f"reference.{phase}, float32, contiguous")]
    assert f"{what}: expected a count of 120, got 120.12" in found[0]


def test_a_batch_that_is_not_counted_is_found(monkeypatch):
    monkeypatch.setattr(phase_cases, "_SHAPES", phase_cases._SHAPES[:1])
    count = reference.forward_reduce
    monkeypatch.setattr(reference, "forward_reduce", lambda x, num_batches_tracked=None: count(x))
    failures = [f for f in phases.measure("cpu").failures if f.startswith("reference.")]
    assert len(failures) == 4 * 3  # dtypes; contiguous, strided, permuted
    assert all(f.endswith("num_batches_tracked: expected 4, got 3") for f in failures)


def test_a_failed_self_check_and_a_failed_build_are_failures(monkeypatch):
    def refuse(*_):
        warnings.warn("expected equal results, got NaN", RuntimeWarning, stacklevel=1)
        return False

    monkeypatch.setattr(phase_cases, "_SHAPES", phase_cases._SHAPES[:1])
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "passes", refuse)
        patch.setattr(phases, "_open", lambda name: None)
        patch.setattr(cpu, "kernels_for", lambda *_: reference)  # as there may be no compiler
        assert phases.measure("cpu").failures == ["cpu: the self-check failed: expected equal results, got NaN"]
    monkeypatch.setattr(phases, "_open", lambda name: "it did not build" if name == "cpu" else None)
    assert phases.measure("cpu").failures == ["cpu is not available: it did not build"]
    monkeypatch.setattr(phases, "_open", lambda name: None if name == "reference" else "FileNotFoundError: c++")
    outcome = phases.measure("cpu")
    assert not outcome.failures
    assert "cpu is not available: FileNotFoundError: c++" in outcome.summary


def test_a_failed_self_check_of_triton_does_not_decide(monkeypatch):
    def refuse(*_):
        warnings.warn("expected equal results, got NaN", RuntimeWarning, stacklevel=1)
        return False

    monkeypatch.setattr(phase_cases, "_SHAPES", phase_cases._SHAPES[:1])
    monkeypatch.setattr(phases, "BACK_ENDS", {"cpu": ("triton",)})
    monkeypatch.setattr(requirements, "import_problem", lambda name: "")
    monkeypatch.setattr(selfcheck, "passes", refuse)
    monkeypatch.setattr(
        triton,
        "kernels_for",
        lambda x, *_, quietly: reference if selfcheck.passes("syncbn.ops.triton", None, x.device) else None,
    )
    assert set(phases.measure("cpu").failures) == {
        "syncbn.ops.triton: the self-check failed: expected equal results, got NaN"
    }
    monkeypatch.setattr(requirements, "import_problem", lambda name: "no Triton")
    assert phases.measure("cpu").failures == ["triton is not available: no Triton"]


def test_a_back_end_that_leaves_an_input_is_found(monkeypatch):
    monkeypatch.setattr(phase_cases, "_SHAPES", phase_cases._SHAPES[:1])
    monkeypatch.setattr(phases, "_open", lambda name: None)
    monkeypatch.setattr(cpu, "kernels_for", lambda *_: None)
    failures = [f for f in phases.measure("cpu").failures if "self-check" not in f]
    assert {f.partition(", ")[0] for f in failures} == {f"cpu.{phase}" for phase in RESULTS}
    assert all("expected kernels for this input, got none" in f for f in failures)


def test_the_matrix_reports_tests_by_name():
    text = """<testsuite><testcase name="test_a[1]"/><testcase name="test_a[2]">
    <failure message="AssertionError: y is off&#10;more">def test():
    E   AssertionError: y is off by 0.1
    E   more</failure></testcase></testsuite>"""
    rows, failures = rank_tests._by_function(list(ElementTree.fromstring(text).iter("testcase")))
    assert rows == [{"test": "test_a", "passed": 1, "failed": 1}]
    assert failures == ["test_a[2]: failure: AssertionError: y is off"]


def test_the_net_is_a_resnet50():
    assert sum(p.numel() for p in ResNet50().parameters()) == 25_557_032


def test_a_record_of_an_unknown_part_is_reported(tmp_path):
    report.write(tmp_path, {"date": "today"}, [make_record("other", FAILED, "a|b\nc", failures=["a|b\nc"])])
    assert "| other | failed | 0 | a\\|b c |" in (tmp_path / "gpu_check.md").read_text()


def test_device_cuda_needs_a_gpu(monkeypatch, pytestconfig):
    monkeypatch.setattr(pytestconfig.option, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="--device cuda: expected a CUDA GPU"):
        conftest.pytest_configure(pytestconfig)


@pytest.mark.parametrize(
    ("device", "num_gpus", "world_size", "expected"),
    [
        ("cpu", 0, 2, ("gloo", None)),
        ("cuda", 1, 1, ("nccl", 0)),
        ("cuda", 1, 4, ("gloo", 0)),
        ("cuda", 2, 2, ("nccl", 1)),
        ("cuda", 2, 3, ("gloo", 1)),
    ],
)
def test_ranks_share_gpus_on_gloo(monkeypatch, tmp_path, device, num_gpus, world_size, expected):
    made, gpus = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: made.append(backend))
    job = rank_pool.Job(lambda *_: None, (), 1 % world_size, world_size, str(tmp_path / "store"), True, 60)
    assert rank_pool._call(job, device) == ("result", None)
    assert (made[0], gpus[0] if gpus else None) == expected


def test_torch_triton_pytest_and_numpy_are_enough():
    """Such is the machine of a GPU: what the experiments need beside them is not there."""
    others = [
        "hydra",
        "omegaconf",
        "rich",
        "lightning",
        "torchmetrics",
        "torchvision",
        "timm",
        "sklearn",
        "matplotlib",
    ]
    names = [f"experiment.gpu_check.{path.stem}" for path in (ROOT / "launch/experiment/gpu_check").glob("[!_]*.py")]
    code = f"import importlib, sys; sys.modules |= dict.fromkeys({others}); [*map(importlib.import_module, {names})]"
    code += "; import gpu_check, ranks, oracle"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "launch", ROOT / "tests")))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True)


@pytest.mark.slow
def test_every_part_on_the_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "gpu_check.py"), "--device", "cpu", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [record["name"] for record in records] == [p.name for p in registry.PARTS]
    for record in records:
        assert record["status"] == (SKIPPED if record["name"] in ("nccl_ranks", "cuda_graph", "large") else OK)
        assert record["status"] == SKIPPED or (record["tables"] and all(table["rows"] for table in record["tables"]))
        assert f"\n{record['name']} " in done.stdout


@pytest.mark.slow
def test_the_cuda_branches_on_stand_ins():
    names = ["machine", "phases", "nccl_one", "determinism", "host_waits", "launches", "layer", "step", "memory"]
    command = [sys.executable, str(HERE / "gpu_stand_ins.py"), *names, "cuda_graph"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    records = {record["name"]: record for record in json.loads(done.stdout.splitlines()[-1])}
    graph = records.pop("cuda_graph")
    assert {name: record["failures"] for name, record in records.items()} == {name: [] for name in names}
    assert "not served by triton here" in str(records["machine"]["tables"])
    columns = records["layer"]["tables"][0]["rows"][0]
    assert {"to syncbn, cuda operators", "to copy", "to copy, device", "copy, time"} <= columns.keys()
    assert graph["summary"].endswith("a stand-in replays nothing")
