"""Kernels' text compiled by g++ for the emulator, kept on disk by all that results depend on."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pyattn.kernels.cuda.compile import text

HERE = Path(__file__).parent
# version 4 as GCC 12 and its assembler name sources "<stdin>" in version 5, if not optimized more
FLAGS = ("-std=c++17", "-gdwarf-4", "-g1", "-march=native", "-w", "-fPIC", "-fvisibility=hidden",
         "-fno-gnu-unique", "-fno-strict-aliasing", "-fstack-clash-protection")
QUICKLY = "-O1"    # kernels: most of them are built once and run a few times
WELL = "-O2"       # the emulator itself, which takes most of the time when they run
SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer")

HEADERS = '#include "emulator.hpp"\n#include "formats.hpp"\n'

# What a kernel is entered by; its own text knows nothing of the emulator.
ENTRY = """
#line 1 "entry of {name}"
extern "C" __attribute__((visibility("default"))) int emulate_{name}(
        const void* arguments, u64 argument_bytes, u32 grid_x, u32 grid_y, u32 grid_z,
        u32 threads, u32 shared_bytes, const emulator::Options* options, char* message, int size,
        emulator::Statistics* statistics) {{
    const u32 grid[3] = {{grid_x, grid_y, grid_z}};
    return emulator::Launcher<{name}>::launch(arguments, argument_bytes, grid, threads,
                                              shared_bytes, options, message, size, statistics);
}}
"""


def compiler() -> str | None:
    """Return the C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cache() -> Path:
    """Return the folder of compiled kernels."""
    chosen = os.environ.get("PYATTN_EMULATOR_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "pyattn" / "emulator"


@functools.cache
def _surroundings() -> str:
    """What every result depends on: the compiler, and what "native" means."""
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True,
                             check=True).stdout
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    native = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return version + native


def _with_headers(source: str) -> str:
    """The source and behind it all of the emulator's headers that it includes."""
    parts, met = [source], set()
    for part in parts:
        for name in re.findall(r'#include "([^"]+\.hpp)"', part):
            if name not in met:
                met.add(name)
                parts.append((HERE / name).read_text())
    return "\0".join(parts)


def build(file: str, name: str, macros: Iterable[tuple[str, str | int]] = (), *,
          folders: Iterable[str | Path] = (), flags: Iterable[str] = ()) -> Path:
    """Return the shared library of the kernel `name` in `file`.

    `folders` are looked into for sources before this one and that of the package. `flags` are for
    the compiler: SANITIZE, or EMULATOR_UCONTEXT as a macro where fibers are to be the C library's.
    """
    source = text(file, [*folders, HERE]) + ENTRY.format(name=name)
    flags = [*FLAGS, *flags]
    core = [str(path) for path in _core([WELL, *flags])]
    flags = [QUICKLY, *flags]
    own_flags = flags + [f"-D{key}={value}" for key, value in macros]
    return _cached(name, ".so", source, own_flags, [
        *_headers_at_once(flags), "-shared", "-x", "c++", "-", "-x", "none", *core, "-ldl", "-lrt"])


def _headers_at_once(flags: list[str]) -> list[str]:
    """Have the emulator's headers read from a form that g++ made of them: a third of the time."""
    source = cache() / "headers.hpp"
    if not source.is_file():
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(HEADERS)
    made = _cached("headers", ".hpp.gch", HEADERS, flags, ["-x", "c++-header", str(source)])
    header = made.with_suffix("")
    if not header.is_file():
        header.write_text(HEADERS)    # what is read where that form does not fit
    return ["-include", str(header)]


def _core(flags: list[str]) -> list[Path]:
    """The emulator's own objects, which all kernels share; only kernels are sanitized."""
    flags = [flag for flag in flags if flag not in SANITIZE]
    return [_cached(path.stem, ".o", path.read_text(), flags, ["-c", "-x", "c++", "-"])
            for path in sorted(HERE.glob("*.cpp"))]


def _cached(name: str, suffix: str, source: str, flags: list[str], how: list[str]) -> Path:
    key = "\0".join([_surroundings(), _with_headers(source), *flags])
    made = cache() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"
    if made.is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        fresh = Path(folder) / made.name
        done = subprocess.run([str(compiler()), *flags, f"-I{HERE}", *how, "-o", str(fresh)],
                              input=source, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler()} refuses {name}:\n{done.stderr[:4000]}")
        fresh.replace(made)    # at once: others find all of it or nothing
    return made


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    """Return the library, loaded once."""
    return ctypes.CDLL(str(library))


def line_of(library: Path, place: str) -> str:
    """Return which line of the kernel's text is at `place` ("0x1234") of its library."""
    tool = shutil.which("addr2line")
    if tool is None:
        return place
    done = subprocess.run([tool, "-i", "-e", str(library), place], capture_output=True, text=True,
                          check=False)
    lines = [re.sub(r" \(discriminator \d+\)", "", line) for line in done.stdout.split("\n")]
    return " in ".join(Path(line).name for line in lines if line and not line.startswith("?"))
