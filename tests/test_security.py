"""What is read is data, not programs; what is written is text; nothing listens."""

import ast
import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import syncbn
from experiment.bench.tables import Table
from experiment.training import report
from experiment.training.datasets import image_files
from experiment.training.datasets.sources import CIFAR10_BYTES, Cifar10, Folder
from syncbn import build

ROOT = Path(syncbn.__file__).parent.parent
NASTY = "[/x] <script>alert(1)</script> | a\nb"

# Modules that run what they read, or that listen.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "http.server", "socketserver", "xmlrpc", "multiprocessing.managers", "torch.distributed.rpc", "torch.hub",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "tempfile.mktemp", "torch.hub.load", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "asyncio.start_server", "socket.create_server",
}  # fmt: skip
FORBIDDEN_METHODS = {
    "bind": "listens", "listen": "listens",
    "extractall": "writes where an archive says", "unpack_archive": "writes where an archive says",
    "all_gather_object": "unpickles what other ranks send", "gather_object": "unpickles what other ranks send",
    "broadcast_object_list": "unpickles what other ranks send", "recv_object_list": "unpickles what other ranks send",
    "scatter_object_list": "unpickles what other ranks send", "render_template_string": "a template from a user",
}  # fmt: skip
REQUIRED = {  # what a call's name ends with: what it must say
    "torch.load": ("weights_only", True),
    "load_from_checkpoint": ("weights_only", True),
    "trainer.fit": ("weights_only", True),
    "trainer.validate": ("weights_only", True),
    "trainer.test": ("weights_only", True),
    "trainer.predict": ("weights_only", True),
    "Environment": ("autoescape", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "np.savez": ("allow_pickle", False),
}


def faults(source):
    """Yield what a Python file does that reads programs, or listens, or writes to a name that others can guess."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None)
            names = [alias.name for alias in node.names]
            for name in [base, *(f"{base}.{name}" for name in names)] if base else names:
                if name in FORBIDDEN_MODULES:
                    yield f"line {node.lineno}: imports {name}"
        elif isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {fault}" for fault in call_faults(node))
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("/tmp", "/var/tmp", "/dev/shm")):
            yield f"line {node.lineno}: a name in a folder of everybody: {node.value}"


def call_faults(node):
    name, said = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    if name.split(".")[-1] in FORBIDDEN_METHODS:
        yield f"{name} {FORBIDDEN_METHODS[name.split('.')[-1]]}"
    for ending, (keyword, value) in REQUIRED.items():
        says = getattr(said.get(keyword), "value", None) is value
        if f".{name}".endswith(f".{ending}") and not says:
            yield f"{name} without {keyword}={value}"
    if isinstance(said.get("shell"), ast.Constant) and said["shell"].value:
        yield f"{name} with a shell"


def test_no_file_reads_programs_or_listens():
    paths = [*(ROOT / "syncbn").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    assert len(paths) > 50
    found = [f"{path.relative_to(ROOT)}: {fault}" for path in paths for fault in faults(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing import managers",
        "from http.server import HTTPServer",
        "x = torch.load(path)",
        "x = torch.load(path, weights_only=False)",
        "x = np.load(path)",
        "trainer.fit(task, ckpt_path=path)",
        "self.trainer.validate(task)",
        "Task.load_from_checkpoint(path)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "jinja2.Environment()",
        "dist.all_gather_object(everyone, mine)",
        "tar.extractall(folder)",
        "server.bind(('', 0))",
        "open('/tmp/results.csv', 'w')",
        "tempfile.mktemp()",
    ],
)
def test_the_search_finds(source):
    assert list(faults(source))


def folder_with(tmp_path, data, name="a.png"):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / name).write_bytes(data)
    source = Folder(str(tmp_path), size=8, mean=[0.5] * 3, std=[0.5] * 3, global_batch_size=1)
    source.load()
    return source.splits.train.images


def encoded(form, size=(32, 32)):
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, form)
    return file.getvalue()


def png_that_claims(width, height):
    """Write a PNG of a few bytes whose header announces more."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("width", [8_193, 2**30], ids=["beyond the limit", "beyond the limit of Pillow"])
def test_a_decompression_bomb_is_an_error_that_names_the_file(tmp_path, width):
    images = folder_with(tmp_path, png_that_claims(width, 8_192))
    path = tmp_path / "train" / "cat" / "a.png"
    with pytest.raises(ValueError, match=rf"cannot read {path}: .*(pixels|DecompressionBomb|limit)"):
        images[0]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_truncated_image_is_refused_by_name(tmp_path, form):
    data = encoded(form)
    images = folder_with(tmp_path, data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"cannot read {tmp_path / 'train' / 'cat' / 'a.png'}: "):
        images[0]


@pytest.mark.parametrize("form", ["EPS", "GIF", "ICO"])
def test_other_formats_are_not_decoded_whatever_the_file_is_called(tmp_path, form):
    with pytest.raises(ValueError, match=r"cannot read .*a\.png: cannot identify"):
        folder_with(tmp_path, encoded(form))[0]


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    images = folder_with(tmp_path, encoded("PNG"))
    assert images[0].shape == (3, 32, 32)
    monkeypatch.setattr(image_files, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1000 bytes, got"):
        images[0]


def test_cifar10_reads_no_more_than_a_file_can_hold(tmp_path, monkeypatch):
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (tmp_path / name).write_bytes(bytes(CIFAR10_BYTES))
    with (tmp_path / "data_batch_2.bin").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"data_batch_2.bin .*10000 at most, got 30730001 bytes or more"):
        Cifar10(str(tmp_path), mean=[0.5] * 3, std=[0.5] * 3, global_batch_size=1).load()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0)
    yield build._cache
    os.umask(before)


def test_the_folder_of_libraries_is_for_its_user_alone_whatever_the_umask(cache, tmp_path):
    assert cache() == tmp_path / "cache" / "syncbn" / "kernels"
    for folder in (cache(), *list(cache().parents)[:2]):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_libraries_that_others_can_replace_is_refused(cache):
    parent = cache().parent
    parent.chmod(0o777)
    with pytest.raises(PermissionError, match=f"expected {parent} not to be writable for everybody"):
        cache()
    parent.chmod(0o1777)  # as /tmp: others cannot rename what is not theirs
    assert cache()


def test_markdown_and_terminal_show_what_users_typed():
    """The comparison's page has its own test, with a browser."""
    table = Table(title="t", columns=["a", "b"], rows=[[NASTY, "1"], ["x", "2"]])
    lines = table.markdown().splitlines()
    row = next(line for line in lines if "alert" in line)
    assert row == "| [/x] &lt;script&gt;alert(1)&lt;/script&gt; \\| a b | 1 |"
    assert "<script" not in table.markdown()
    console = Console(file=io.StringIO(), width=200)
    table.show(console)
    assert "[/x] <script>alert(1)</script>" in console.file.getvalue()


def test_the_results_of_a_run_are_not_markup(tmp_path, capsys):
    results = dict.fromkeys(("test_accuracy", "test_loss", "train_error", "images_per_second"), 0.5)
    results.update(dict.fromkeys(("world_size", "per_rank_batch_size", "accumulate", "global_batch_size"), 1))
    results.update({"arm": NASTY, "score": "accuracy", "eval_split": "test", "evaluations": {"rank0": {}}})
    results["simulate"] = None
    report.print_table(results, Path("[/runs]"))
    shown = capsys.readouterr().out
    assert "[/x] <script>" in shown
    assert "[/runs]" in shown
