"""The documentation: its code runs, its commands are understood, its links and paths exist, its API is complete.

The ```python blocks of one page run in order in one namespace, as a notebook does, in one process. A block with
title="name.py" is a program of its own, which two ranks run.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from itertools import groupby, product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from pytest_examples import find_examples

import syncbn
import syncbn.lightning

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FRAMEWORKS = ROOT / "docs" / "frameworks.md"  # the only page whose blocks may need packages that are not installed
API = sorted((ROOT / "docs" / "api").glob("*.md"))
# The settings of a program in launch/ stand in a file of conf/.
SETTINGS = {"train": "train", "ray_train": "train", "compare": "compare", "bench": "bench", "claims": "claims"}


def name(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


BLOCKS = [block for page in PAGES for block in find_examples(page)]
NOTEBOOKS = sorted({block.path for block in BLOCKS if "title" not in block.prefix_settings()})
PROGRAMS = [(block.path, title) for block in BLOCKS if (title := block.prefix_settings().get("title"))]


def slow(values, is_slow):
    return [pytest.param(*v, marks=[pytest.mark.slow] if is_slow(v[0]) else []) for v in values]


def write_programs(page, folder):
    for block in BLOCKS:
        title = block.prefix_settings().get("title")
        if title and block.path == page:
            (folder / title).write_text(block.source)


def missing(source):
    """Name the packages that a block imports and that are not installed."""
    nodes = [*ast.walk(ast.parse(source))]
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return sorted({top for found_name in found if find_spec(top := found_name.split(".")[0]) is None})


def section(block):
    """Find the heading that a block stands under."""
    lines = block.path.read_text().splitlines()[: block.start_line]
    return next((line for line in reversed(lines) if line.startswith("## ")), "")


def run_block(eval_example, block, namespace):
    """Run one block. Python 3.11 cannot print the tracebacks that pytest-examples makes, and pytest would end."""
    try:
        return eval_example.run(block, module_globals=namespace)
    except Exception as error:
        text = f"{block}, line {error.__traceback__.tb_lineno}: {type(error).__name__}: {error}"
    raise AssertionError(text)


@pytest.mark.parametrize("page", slow([(page,) for page in NOTEBOOKS], FRAMEWORKS.__eq__), ids=name)
def test_the_blocks_of_a_page_run_in_order(page, eval_example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for variable, value in {
        "YOLO_CONFIG_DIR": str(tmp_path),
        "YOLO_OFFLINE": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # each block becomes it
    torch.manual_seed(0)
    write_programs(page, tmp_path)
    namespace, lacking = {}, []
    blocks = [block for block in BLOCKS if block.path == page and "title" not in block.prefix_settings()]
    for _, group in groupby(blocks, section):
        together = [*group]
        lacks = missing("\n".join(block.source for block in together)) if page == FRAMEWORKS else []
        for block in [] if lacks else together:
            namespace |= run_block(eval_example, block, namespace)
        lacking += lacks
    if lacking:
        pytest.skip(f"{lacking[0]} is not installed")


@pytest.mark.parametrize(("page", "title"), slow(PROGRAMS, (ROOT / "README.md").__ne__), ids=name)
def test_programs_run_on_two_ranks(page, title, tmp_path):
    write_programs(page, tmp_path)
    if page == FRAMEWORKS and (lacks := missing((tmp_path / title).read_text())):
        pytest.skip(f"{lacks[0]} is not installed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", title]
    env = {"GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(5):
        result = subprocess.run(torchrun, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        if "terminate called without an active exception" not in result.stderr:  # torch's, see docs/faults.md
            break
    assert result.returncode == 0, result.stdout + result.stderr


def code(page):
    """Yield the lines of all blocks, without the line breaks that a backslash hides, and all code within sentences."""
    text = page.read_text()
    fenced = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^ *```.*?\n(.*?)^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = "\n".join(re.findall(r"^ {4}(.*)$", rest, re.MULTILINE))
    for block in [*fenced, indented]:
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`]+)`", rest)


def commands():
    """Yield (page, program of launch/, its arguments) of every command line; launch/slurm runs launch/train.py."""
    for page in PAGES:
        for line in code(page):
            if match := re.search(r"\blaunch/(\w+)\.py|\blaunch/slurm/\w+\.sbatch", line):
                rest = shlex.split(line[match.end() :], comments=True)
                yield page, match[1] or "train", rest
            if match := re.search(r"\bmake gpu-check ARGS=(.*)", line):
                yield page, "gpu_check", shlex.split(shlex.split(match[1])[0])


def variants(arguments):
    """Yield the overrides of each run: several for a sweep (-m)."""
    given = re.sub(r"--num-workers \d+|(?<!\S)-\S+", "", shlex.join(arguments))
    overrides = OverridesParser.create().parse_overrides(shlex.split(given))
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in overrides
    ]
    return product(*choices)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_compose(page):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for _, program, arguments in (command for command in commands() if command[0] == page):
            assert (ROOT / "launch" / f"{program}.py").exists(), program
            if program == "gpu_check":
                importlib.import_module(program)._parse(arguments)
                continue
            for overrides in variants(arguments):
                config = compose(SETTINGS[program], overrides=list(overrides))
                assert all((ROOT / "conf" / "norm" / f"{arm}.yaml").exists() for arm in config.get("arms", ()))


def test_there_are_commands():
    programs = [program for _, program, _ in commands()]
    assert {*programs} == {*SETTINGS, "gpu_check"}
    assert len(programs) > 20


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_targets_and_paths_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in code(page):
        assert {*re.findall(r"\bmake ([a-z][a-z-]*)", line)} <= {*targets}, line
        for word in re.findall(r"(?<![\w/.~-])(?:syncbn|launch|conf|tests|docs|\.ci)/[\w.*/-]+", line):
            assert [*ROOT.glob(word.rstrip("./"))], word


def slug(heading):
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor and there.suffix == ".md" and there.parent != ROOT / "docs" / "api":  # those are made
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def resolve(path):
    """Find the object of a directive; the function syncbn.audit hides its module, so modules come first."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def test_every_public_name_is_on_one_api_page():
    shown = [resolve(path) for page in API for path in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    callbacks = ["NormConverter", "PreciseStatistics", "SyncBatchNormLayerSync"]
    names = [(syncbn, name) for name in syncbn.__all__] + [(syncbn.lightning, name) for name in callbacks]
    counts = {name: sum(other is getattr(module, name) for other in shown) for module, name in names}
    assert counts == dict.fromkeys(counts, 1)


def test_every_page_is_in_the_navigation_and_short():
    nav = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(nav) == sorted(pages)
    made = ("results", "scaling.md", "multinode.md", "frameworks.md")  # with tables of a report, or of many commands
    lengths = {page: len((ROOT / "docs" / page).read_text().splitlines()) for page in pages}
    assert {page: n for page, n in lengths.items() if n > 150 and not page.startswith(made)} == {}


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = [path for path in tmp_path.rglob("*.html") if "plots" not in str(path)]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="?(?:https?:)?//[^>]*>', text), page
    index = (tmp_path / "search" / "search_index.js").read_text()  # search works in pages opened from disk
    assert all(f'"title":"{found}"' in index for found in ("Quick start", "SyncBatchNorm", "update_bn_stats"))
