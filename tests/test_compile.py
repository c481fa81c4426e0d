"""How kernels are compiled, kept on disk and loaded, with kernels made for these tests."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyattn.kernels import disk
from pyattn.kernels.cpu import compile, host, threads
from pyattn.kernels.cpu.jit import link

LONG = 120
"""Seconds; nothing takes as long unless it hangs."""

SAMPLE = '''
import math

import numba
import numpy as np
from pyattn.kernels.cpu.compile import kernel, part
from pyattn.kernels.cpu.jit.access import fetch_add, load, numbers, rounded, store


@part
def twice(x, unit):
    return rounded(2 * np.float64(x), unit)


@kernel
def double(x, x_step, y, y_step, count, unit, operand):
    """y = 2 x; the steps are bytes."""
    for i in range(count):
        store(y + i * y_step, twice(load(x + i * x_step, operand), unit))


@kernel
def mark(place, queue, units, scratch, unit, operand):
    """Add 1 to what is at `place` for every unit."""
    marks = numbers(place, units, unit)
    while True:
        i = fetch_add(queue, 1)
        if i >= units:
            break
        marks[i] += unit


@kernel
def patience(flag, answer, unit, operand):
    """Wait for somebody to set the flag."""
    turns = 0
    while fetch_add(flag, 0) == 0 and turns < 1_000_000_000:
        turns += 1
    store(answer, fetch_add(flag, 0))


@kernel
def library(x, y, unit, operand):
    store(y, rounded(math.exp(np.float64(load(x, unit))), unit))


@kernel
def failing(x, unit, operand):
    if load(x, unit) > 0:
        raise ValueError


@kernel
def printing(x, unit, operand):
    print(x)


@numba.njit
def allocating(x, unit, operand):
    store(x, np.ones(x).sum())
'''

LOAD = '''
import importlib.util, sys

def register(path):
    name = "pyattn.kernels.cpu.jit.sample"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
'''

DOUBLE = '''
import numpy as np
from pyattn.kernels.cpu import compile

def double(kind):
    x = np.arange(5, dtype=compile.KINDS[kind][1])
    y = np.full(5, np.nan, compile.KINDS[kind][0])
    compile.native("sample.double", kind)(x.ctypes.data, x.itemsize, y.ctypes.data, y.itemsize, 5)
    assert y.tolist() == [0, 2, 4, 6, 8], y
'''

namespace: dict[str, Any] = {}
exec(LOAD + DOUBLE, namespace)
double = namespace["double"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """A module among those that are compiled."""
    path = tmp_path_factory.mktemp("source") / "sample.py"
    path.write_text(SAMPLE)
    namespace["register"](path)
    yield path
    del sys.modules["pyattn.kernels.cpu.jit.sample"]


class Cache:
    """A cache of its own, and what has been compiled for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compiled: list[str] = []

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def cache(sample, tmp_path, monkeypatch) -> Cache:
    cache = Cache(tmp_path / "cache")
    make = link.object_code

    def object_code(kernel: Any, *tags: str) -> tuple[int, bytes]:
        cache.compiled.append(kernel.py_func.__name__)
        return make(kernel, *tags)

    monkeypatch.setenv(disk.CACHE_VARIABLE, str(cache.folder))
    monkeypatch.setattr(link, "object_code", object_code)
    forget(monkeypatch)
    return cache


def forget(monkeypatch) -> None:
    """Be as a new process that has loaded nothing."""
    monkeypatch.setattr(compile, "_loaded", {})


def process(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD + DOUBLE + code, *map(str, arguments)],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=LONG)
    assert process.returncode == 0, errors
    return out.strip()


# What is compiled


@pytest.mark.parametrize("kind", compile.KINDS)
def test_kinds(cache, kind):
    double(kind)
    double(kind)
    assert cache.compiled == ["double"]
    assert [file.name for file in cache.files()] == [f"sample.double-{kind}"]


def test_units_are_taken_once(cache, monkeypatch):
    monkeypatch.setattr(threads, "_count", 4)
    kernel = compile.native("sample.mark", "float64")
    marks = np.zeros(1_000_000)
    threads.run(kernel, marks.ctypes.data, marks.size, 0, 3)
    assert (marks == 1).all()


def test_kernels_run_without_the_gil(cache):
    flag, answer = np.zeros(1, np.int64), np.zeros(1, np.int64)
    patience = compile.native("sample.patience", "float32")

    def set_flag() -> None:
        time.sleep(0.05)
        flag[0] = 7

    other = threading.Thread(target=set_flag)
    other.start()
    patience(flag.ctypes.data, answer.ctypes.data)
    other.join()
    assert answer == 7


EXIT = """
import threading, time
register(sys.argv[1])
from pyattn.kernels.cpu import threads
threads.set_count(2)
flag = np.zeros(2, np.int64)
patience = compile.native("sample.patience", "float32")
both = threading.Barrier(3)

def work(*arguments):
    both.wait()
    patience(flag.ctypes.data, flag.ctypes.data + 8)

threading.Thread(target=threads.run, args=(work, 0, 2, 0, 1), daemon=True).start()
both.wait()
time.sleep(0.05)
"""


def test_the_interpreter_ends_while_kernels_run(cache, sample):
    finish(process(EXIT, sample))


def test_the_c_library_may_be_called(cache):
    x, y = np.array([1.5]), np.zeros(1)
    compile.native("sample.library", "float64")(x.ctypes.data, y.ctypes.data)
    assert y == np.exp(1.5)


@pytest.mark.parametrize(("name", "complaint"), [
    ("failing", "kernel failing can raise an exception"),
    ("printing", "kernel printing needs numba_"), ("allocating", "kernel allocating needs .*NRT_")])
def test_kernels_that_need_python_are_refused(cache, name, complaint):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=complaint):
            compile.native(f"sample.{name}", "float64")
    assert not cache.files()


def test_numba_is_as_before(cache):
    """What others compile after us is linked, run and unlinked as usual."""
    import numba

    double("float32")
    from pyattn.kernels.cpu.jit import sample

    @numba.njit
    def caller(x):
        return sample.twice(x, np.float64(1)) + len(np.ones(3)) + divmod(7, 2)[0]

    assert caller(2.5) == 11
    assert numba.njit(lambda x: x + 1)(1) == 2


# The cache


def test_a_second_process_does_not_import_numba(cache, sample):
    finish(process("register(sys.argv[1]); double('float32')", sample))
    finish(process("double('float32'); assert 'numba' not in sys.modules, 'numba'"))
    double("float32")
    assert cache.compiled == []


def test_two_processes_at_once(cache, sample):
    code = "register(sys.argv[1]); double('float32'); double('float64')"
    for each in [process(code, sample) for _ in range(2)]:
        finish(each)
    assert [file.name for file in cache.files()] == ["sample.double-float32",
                                                     "sample.double-float64"]
    double("float32")
    assert cache.compiled == []


def test_one_compilation_for_all_threads(cache):
    found, together = [], threading.Barrier(4)

    def work() -> None:
        together.wait(LONG)
        found.append(compile.native("sample.double", "float32"))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert cache.compiled == ["double"]
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


DAMAGE = {
    "cut short": lambda content: content[:-1], "empty": lambda content: b"",
    "digest only": lambda content: content[:32],
    "one bit": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    "another file": lambda content: b"#!/bin/sh\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_again(cache, monkeypatch, damage):
    double("float32")
    [file] = cache.files()
    right = file.read_bytes()
    file.write_bytes(DAMAGE[damage](right))
    for _ in range(2):
        forget(monkeypatch)
        double("float32")
    assert cache.compiled == ["double"] * 2
    assert len(cache.files()) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of another kind")
def test_only_this_user_can_write(cache, monkeypatch):
    before = os.umask(0)
    try:
        double("float32")
    finally:
        os.umask(before)
    [file] = cache.files()
    assert file.stat().st_mode & 0o777 == 0o644
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    file.chmod(0o666)
    forget(monkeypatch)
    double("float32")
    assert cache.compiled == ["double"] * 2
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    monkeypatch.setattr(disk, "ROOT", file.stat().st_uid + 2)
    forget(monkeypatch)
    double("float32")
    assert cache.compiled == ["double"] * 3


@pytest.mark.parametrize("obstacle", ["a file", "read-only", "disk full", "no home"])
def test_nowhere_to_write(cache, monkeypatch, obstacle):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError

    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    if obstacle == "a file":
        cache.folder.write_text("not a folder")
    elif obstacle == "read-only":
        monkeypatch.setattr(disk.tempfile, "mkstemp", refuse)
    elif obstacle == "disk full":
        monkeypatch.setattr(Path, "replace", refuse)
    else:
        monkeypatch.delenv(disk.CACHE_VARIABLE)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
        assert sys.platform == "win32" or disk.cache_folder() is None
    for _ in range(2):
        double("float32")
    assert cache.compiled == ["double"]
    assert len(cache.files()) == 0


@pytest.mark.parametrize(("system", "environment", "folder"), [
    ("linux", {}, "/home/ada/.cache/pyattn"),
    ("linux", {"XDG_CACHE_HOME": "/var/xdg"}, "/var/xdg/pyattn"),
    ("linux", {"PYATTN_CACHE_DIR": "/srv/kernels", "XDG_CACHE_HOME": "/var/xdg"}, "/srv/kernels"),
    ("linux", {"PYATTN_CACHE_DIR": ""}, "/home/ada/.cache/pyattn"),
    ("darwin", {}, "/home/ada/Library/Caches/pyattn"),
    ("win32", {"LOCALAPPDATA": "/C/ada"}, "/C/ada/pyattn")])
def test_where_the_cache_is(monkeypatch, system, environment, folder):
    for name in ("PYATTN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert disk.cache_folder() == Path(folder)


@pytest.fixture
def key(monkeypatch):
    compile._key.cache_clear()
    yield lambda: (compile._key.cache_clear(), compile._key())[1]
    monkeypatch.undo()
    compile._key.cache_clear()


def test_what_compiled_code_depends_on(key, tmp_path, monkeypatch):
    sources = tmp_path / "cpu"
    (sources / "jit").mkdir(parents=True)
    (sources / "compile.py").write_text("a = 1")
    (sources / "jit" / "forward.py").write_text("b = 1")
    monkeypatch.setattr(compile, "SOURCES", sources)
    keys = [key()]
    assert key() == keys[0]
    (sources / "jit" / "forward.py").write_text("b = 2")
    keys.append(key())
    (sources / "jit" / "more.py").write_text("")
    keys.append(key())
    (sources / "jit" / "more.py").rename(sources / "jit" / "less.py")
    keys.append(key())
    target = host.target()
    for name in target._fields:
        monkeypatch.setattr(host, "target", lambda name=name: target._replace(**{name: "other"}))
        keys.append(key())
    monkeypatch.setattr(compile.llvmlite, "__version__", "9")
    keys.append(key())
    monkeypatch.setattr(compile, "_numba_version", lambda: "9")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_numbas_version_is_known_without_it(monkeypatch):
    import numba

    assert numba.__version__ in compile._numba_version()
    hidden = importlib.util.find_spec("email")          # a package without a _version.py
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: hidden)
    assert compile._numba_version().startswith(str(hidden.origin))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compile._numba_version() == ""


FORK = """
import os, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
register(sys.argv[1])
double("float32")
before = compile._object_code
compiling = threading.Event()

def slow(*arguments):
    compiling.set()
    time.sleep(0.1)
    return before(*arguments)

compile._object_code = slow
other = threading.Thread(target=double, args=("float64",))
other.start()
compiling.wait()
child = os.fork()
double("float32"); double("float64"); double("bfloat16")
if child == 0:
    os._exit(0)
other.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_another_thread_compiles(cache, sample):
    finish(process(FORK, sample))


# The CPU


PLAIN = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
AVX2 = {"NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt"}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs than x86")
def test_smaller_hosts_have_entries_of_their_own(cache, sample):
    code = ("register(sys.argv[1]); double('float32')\n"
            "from pyattn.kernels.cpu import host\n"
            "print(host.vector_bytes(), host.registers(host.vector_bytes()), host.dot_product())")
    assert finish(process(code, sample, **PLAIN)) == "16 16 None"
    assert finish(process(code, sample, **AVX2)) == "32 16 None"
    double("float32")
    assert len({file.parent for file in cache.files()}) == 3
    names = finish(process("from pyattn.kernels.cpu import host; print(host.target())",
                           NUMBA_CPU_NAME="generic"))
    assert "features=''" in names


@pytest.fixture
def cpu(monkeypatch):
    """Pretend to be another CPU."""
    def pretend(features: str, triple: str = "x86_64-unknown-linux-gnu") -> None:
        host._has.cache_clear()
        monkeypatch.setattr(host, "target", lambda: host.Target(triple, "a cpu", features))

    yield pretend
    host._has.cache_clear()


@pytest.mark.parametrize(("features", "tiles", "mode"), [
    ("+avx2,-avx512bf16", True, None), ("+avx512bf16,+avx512f", True, "avx512bf16"),
    ("+amx-bf16,+amx-tile,+avx512bf16", True, "amx"),
    ("+amx-bf16,+amx-tile,+avx512bf16", False, "avx512bf16"),
    ("+amx-bf16,-amx-tile", True, None), ("+amx-int8,+amx-tile", True, None)])
def test_how_bfloat16_is_multiplied(cpu, monkeypatch, features, tiles, mode):
    cpu(features)
    monkeypatch.setattr(host, "grant_tiles", lambda: tiles)
    assert host.dot_product() == mode


@pytest.mark.parametrize(("features", "triple", "nbytes", "registers"), [
    ("+avx2,+avx512f,+avx512fp16", "x86_64-pc-windows-msvc", 64, 32),
    ("+avx2,-avx512f", "x86_64-apple-darwin", 32, 16), ("", "x86_64-unknown-linux-gnu", 16, 16),
    ("+neon", "aarch64-unknown-linux-gnu", 16, 32), ("+neon", "arm64-apple-darwin", 16, 32)])
def test_vectors(cpu, features, triple, nbytes, registers):
    cpu(features, triple)
    assert host.vector_bytes() == nbytes
    assert host.registers(nbytes) == registers


def test_tiles_are_asked_for_where_there_may_be_any(monkeypatch):
    flags = Path("/proc/cpuinfo")
    there = flags.exists() and " amx_tile " in flags.read_text()
    assert host.grant_tiles() == there
    host.grant_tiles.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not host.grant_tiles()
    host.grant_tiles.cache_clear()
