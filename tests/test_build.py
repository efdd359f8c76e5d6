"""build.py: a library is built once, by one of several processes or by all, where nobody else can write."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import syncbn
from syncbn import build

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler is installed"
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "home" / "syncbn" / "kernels"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "number.h").write_text("#define NUMBER 1\n")
    (folder / "one.cpp").write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }\n')
    return folder / "one.cpp"


@pytest.fixture
def builds(monkeypatch):
    """Count the builds."""
    names = []
    monkeypatch.setattr(build, "_build", lambda *a, original=build._build: names.append(a[-1].name) or original(*a))
    return names


def test_the_cache_is_used_until_something_changes(source, home, builds, monkeypatch):
    assert [build.load(source).number() for _ in range(2)] == [1, 1]
    assert len(builds) == 1
    assert [path.name for path in home.iterdir()] == builds
    assert home.stat().st_mode & 0o777 == 0o700
    source.with_name("number.h").write_text("#define NUMBER 2\n")
    assert build.load(source).number() == 2
    monkeypatch.setattr(build, "_describe_processor", lambda: "another")
    build.load(source)
    monkeypatch.setenv("CXX", f"{build._find_compiler()[0]} -DNUMBER_OF=3")
    build.load(source)
    assert len(set(builds)) == 4


@pytest.mark.slow
def test_processes_that_start_together(source, home):
    code = "import pathlib, sys; from syncbn import build; print(build.load(pathlib.Path(sys.argv[1])).number())"
    env = os.environ | {"PYTHONPATH": str(Path(syncbn.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=env) for _ in range(2)]
    assert [p.communicate()[0].strip() for p in processes] == [b"1", b"1"]
    assert len(list(home.iterdir())) == 1  # nothing unfinished is left


@pytest.mark.parametrize("what", ["folder", "library"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_what_others_can_write_is_refused(source, home, what, mode):
    build.load(source)
    path = home if what == "folder" else next(home.iterdir())
    path.chmod(mode)
    with pytest.raises(PermissionError, match=rf"expected {path} to be owned by user \d+ .*got owner .* mode .*w"):
        build.load(source)


def test_what_another_user_owns_is_refused(source, monkeypatch):
    build.load(source)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="owned by user 12345"):
        build.load(source)


def test_a_link_to_elsewhere_is_refused(source, home, tmp_path):
    build.load(source)
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="mode l"):
        build.load(source)


@pytest.mark.parametrize("how", ["a file in the way", "read-only", "no home"])
def test_without_a_cache_each_process_builds_for_itself(source, tmp_path, builds, monkeypatch, how):
    if how == "a file in the way":
        (tmp_path / "home").write_text("")
    elif how == "read-only":
        monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert [build.load(source).number() for _ in range(2)] == [1, 1]
    assert len(builds) == 2
    assert not list(temporary.iterdir())
    assert not Path("~").exists()
    assert not Path("relative").exists()


def test_what_the_compiler_refuses_is_not_tried_again_for_a_day(source, home, builds):
    source.write_text("nonsense")
    said = r"(?s)expected `.*one\.cpp.*` to succeed, got exit code 1: .*nonsense"
    with pytest.raises(RuntimeError, match=f"{said}.*to forget it: rm "):
        build.load(source)
    [failed] = home.iterdir()
    with pytest.raises(RuntimeError, match=f"{said}.*not tried again for a day; to forget it: rm {failed}"):
        build.load(source)
    assert len(builds) == 1
    long_ago = failed.stat().st_mtime - build._MEMORY - 1
    os.utime(failed, (long_ago, long_ago))
    with pytest.raises(RuntimeError, match=said):
        build.load(source)
    assert len(builds) == 2
    failed.unlink()
    source.write_text('extern "C" int number() { return 5; }')
    assert build.load(source).number() == 5
    assert [path.suffix for path in home.iterdir()] == [".so"]


def lives(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.slow
def test_a_compiler_that_hangs(source, home, monkeypatch, builds, tmp_path):
    code = (
        "import os, sys, time; '--version' in sys.argv or os.fork(); open(sys.argv[1], 'a').write(f'{os.getpid()} '); "
    )
    code += "'--version' in sys.argv or time.sleep(60)"
    (tmp_path / "hangs.py").write_text(code)
    monkeypatch.setenv("CXX", f"{sys.executable} {tmp_path / 'hangs.py'} {tmp_path / 'pids'}")
    monkeypatch.setattr(build, "TIMEOUT", 6)
    with pytest.raises(TimeoutError, match="to end within 6 s; it was stopped"):
        build.load(source)
    pids = set((tmp_path / "pids").read_text().split())
    assert len(pids) == 3
    end = time.monotonic() + 60
    while any(map(lives, pids)):  # killed, and perhaps not gone so soon
        assert time.monotonic() < end
        time.sleep(0.01)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "_name", lambda *_, name=builds[0]: name)
    assert build.load(source).number() == 1  # the next process tries again
    assert [path.name for path in home.iterdir()] == builds[:1]


def test_who_waited_for_a_build_that_took_too_long_does_not_wait_again(source, home, builds, monkeypatch):
    """Ranks that start together would otherwise try one after the other, five minutes each."""
    name = build._name(source, build._command())
    build._cache()

    @contextlib.contextmanager
    def alone(path, mode):
        (home / name).with_suffix(".timeout").write_text("expected `c++` to end within 300 s; it was stopped")
        yield

    start = iter([100.0])
    with monkeypatch.context() as patch:
        patch.setattr(build, "FileLock", alone)
        patch.setattr(build.time, "time", lambda real=time.time: next(start, None) or real())
        with pytest.raises(TimeoutError, match="it was stopped"):
            build.load(source)
    assert builds == []
    assert build.load(source).number() == 1


@pytest.mark.parametrize(
    "how", ["interrupt", "killed", "killed inside", "killed linker", "out of memory", "no space", "quota"]
)
def test_an_interrupted_build_is_tried_again(source, home, builds, monkeypatch, tmp_path, how):
    if how == "interrupt":
        original = subprocess.Popen.communicate

        def interrupted(process, *args, **kwargs):
            if "-shared" in process.args:
                raise KeyboardInterrupt
            return original(process, *args, **kwargs)

        monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
        error = KeyboardInterrupt
    else:
        end = {
            "killed": "os.kill(os.getpid(), 9)",
            "killed inside": "sys.exit('g++: fatal error: Killed signal terminated program cc1plus')",
            "killed linker": "sys.exit('collect2: fatal error: ld terminated with signal 9 [Killed]')",
            "out of memory": "sys.exit('cc1plus: out of memory allocating 65536 bytes after a total of 1 bytes')",
            "no space": "sys.exit('/usr/bin/ld: final link failed: No space left on device')",
            "quota": "sys.exit('/usr/bin/ld: final link failed: Disk quota exceeded')",
        }[how]
        (tmp_path / "ends.py").write_text(f"import os, sys\nif '--version' not in sys.argv:\n    {end}\n")
        monkeypatch.setenv("CXX", f"{sys.executable} {tmp_path / 'ends.py'}")
        error = RuntimeError
    for _ in range(2):
        with pytest.raises(error):
            build.load(source)
    assert len(builds) == 2
    assert list(home.iterdir()) == []  # nothing is remembered


def test_a_damaged_library_is_built_anew(source, home, builds, monkeypatch):
    problems = ["file too short"]

    def load(path, original=build.ctypes.CDLL):
        if problems:
            raise OSError(problems.pop())
        return original(path)

    monkeypatch.setattr(build.ctypes, "CDLL", load)
    assert build.load(source).number() == 1
    assert len(builds) == 2


def test_no_compiler(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="expected a C\\+\\+ compiler"):
        build.load(source)
