"""The suite on other versions of torch, Python and Lightning: `make test-versions`, or one: nox -s 'core(2.6.0)'.

Needs these versions of Python on PATH. Every environment is made once, in .nox, of 3 to 8 GB. The suite runs from the
tree, by PYTHONPATH; the last session writes the table in docs/results/versions.
"""

import json
import platform
import re
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["core", "experiments", "table"]

VERSIONS = {  # torch: Python, torchvision
    "2.6.0": ("3.10", "torchvision==0.21.0"),
    "2.11.0": ("3.12", "torchvision==0.26.0"),
    "2.13.0": ("3.12", "torchvision==0.28.0"),
    "newest": ("3.13", "torchvision"),
}
TOOLS = ["pytest>=9", "pytest-timeout", "hypothesis"]
CORE = [
    "audit", "batchnorm", "build", "collectives", "compat", "compiled", "convert", "converted", "cpu_kernels",
    "cuda_kernels", "ddp", "ddp_order", "debug", "detection", "ecosystem", "fixup", "fold", "freeze", "functional",
    "gans", "ghost", "gpu_check", "layers", "lightning", "lightning_averages", "lightning_namespaces", "local",
    "many_ranks", "masks", "memory", "memory_with_others", "norm_activations", "norms", "other_statistics",
    "patches", "point_clouds", "precise", "precision", "properties", "recompute", "renorm", "replaced",
    "selfsupervision", "speech", "switchable", "synchronized", "textbook", "transforms", "triton_kernels",
    "triton_launch", "weight_norm", "weights", "wrapped",
]  # fmt: skip
EXPERIMENTS = [
    "bench", "classifiers", "compare", "comparison_grid", "comparison_page", "comparison_runner",
    "comparison_statistics", "comparison_store", "conf", "data", "digits", "evaluate", "launch", "memory_format",
    "report", "resume", "scenes", "segmentation", "sharding", "simulate", "sources", "task", "unet",
]  # fmt: skip
FOLDER = Path("docs/results/versions")
RESULTS = Path(".nox/results")
PACKAGES = ("torch", "torchvision", "lightning", "timm", "numpy")


def requirements(extra: str) -> list[str]:
    """Read the requirements of one extra of pyproject.toml; tomllib is not in Python 3.10."""
    text = Path("pyproject.toml").read_text()
    block = re.search(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert block is not None, extra
    return re.findall(r'"([^"]+)"', block[1])


def pinned_to_lowest(extra: str) -> list[str]:
    """Turn every lower bound of an extra into that very version."""
    return [requirement.replace(">=", "==") for requirement in requirements(extra)]


@nox.session
@nox.parametrize(("python", "torch"), [(python, torch) for torch, (python, _) in VERSIONS.items()], ids=list(VERSIONS))
def core(session: nox.Session, torch: str) -> None:
    """Test the library; with torch 2.6.0, beside the oldest Lightning."""
    start(session)
    wanted = ["--upgrade", "torch"] if torch == "newest" else [f"torch=={torch}"]
    lightning = pinned_to_lowest("lightning") if torch == "2.6.0" else requirements("lightning")
    numpy = "numpy<2.4" if torch == "2.11.0" else "numpy"  # newer ones break the interpreter of its Triton, 3.6
    session.install(*wanted, VERSIONS[torch][1], *lightning, "timm", numpy, "torchmetrics", "hydra-core", *TOOLS)
    run_tests(session, "core", [f"tests/test_{name}.py" for name in CORE])


@nox.session(python="3.10")
def experiments(session: nox.Session) -> None:
    """Test launch/ and what it runs with the lowest version of every requirement."""
    start(session)
    session.install("torch==2.6.0", *pinned_to_lowest("experiments"), *TOOLS)
    run_tests(session, "experiments, lowest versions", [f"tests/test_{name}.py" for name in EXPERIMENTS])


def start(session: nox.Session) -> None:
    """Forget the last run: one that ends before its tests must not leave a row of an earlier one."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{session.name}.json").unlink(missing_ok=True)


def run_tests(session: nox.Session, suite: str, paths: list[str]) -> None:
    """Run tests from the tree, and keep what came out for the table."""
    report = (RESULTS / f"{session.name}.xml").resolve()
    report.unlink(missing_ok=True)
    code = (
        "import importlib.metadata as m, json, platform; v = {'python': platform.python_version()};"
        f"v |= {{d.name: d.version for d in m.distributions() if d.name in {PACKAGES}}}; print(json.dumps(v))"
    )
    versions = json.loads(session.run("python", "-c", code, silent=True) or "{}")
    command = ["python", "-m", "pytest", *paths, "-m", "not slow and not nodes", "-q", f"--junit-xml={report}"]
    is_passed = False
    try:
        session.run(*command, env={"PYTHONPATH": str(Path.cwd())})
        is_passed = True
    finally:
        row = {"suite": suite, "date": f"{date.today()}", **versions, **count(report, is_passed)}
        report.with_suffix(".json").write_text(json.dumps(row))


def count(report: Path, is_passed: bool) -> dict[str, int]:
    """Count the tests of a JUnit report; a run that failed otherwise, as by an unlisted skip, is a failure."""
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0, "seconds": 0}
    suite = next(ElementTree.parse(report).iter("testsuite")).attrib
    tests, failed, skipped = (int(suite[key]) for key in ("tests", "failures", "skipped"))
    failed += int(suite["errors"])
    counts = {"passed": tests - failed - skipped, "failed": failed if is_passed else max(failed, 1)}
    return counts | {"skipped": skipped, "seconds": round(float(suite["time"]))}


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Write the table of the last run of every session, and print it."""
    names = [f"core({torch})" for torch in VERSIONS] + ["experiments"]
    paths = [RESULTS / f"{name}.json" for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not path.exists()]
    if missing:
        session.error(f"no table: {', '.join(missing)} did not get as far as its tests; nox -s NAME runs one again")
    rows = [json.loads(path.read_text()) for path in paths]
    columns = ["torch", "python", "torchvision", "lightning", "timm", "numpy", "suite", "passed", "failed"]
    columns += ["skipped", "seconds", "date"]
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    text = f"""# Versions

Made by `make test-versions` on {platform.system()} {platform.machine()}, CPU and gloo. The core suite is that of the
library; a skip has its reason in tests/README.md, and any other fails the run. `make test` runs everything with the
versions in .ci/constraints.txt.

"""
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "README.md").write_text(text)
    sys.stdout.write(text)
    if any(row["failed"] for row in rows):
        session.error("tests failed")
