"""Kernels' text compiled by g++ for the emulator, kept on disk by all that the result depends on."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pyattn.kernels.cuda.compile import text

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-march=native", "-w", "-fPIC", "-fvisibility=hidden",
         "-fno-gnu-unique", "-fno-strict-aliasing")
SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer")

# What the emulator is entered by; kernels know nothing of it.
ENTRY = """
#line 1 "entry of {name}"
extern "C" __attribute__((visibility("default"))) int emulate_{name}(
        const void* arguments, u64 argument_bytes, u32 grid_x, u32 grid_y, u32 grid_z,
        u32 threads, u32 shared_bytes, const emulator::Options* options, char* message, int size,
        emulator::Statistics* statistics) {{
    return emulator::launch({name}, arguments, argument_bytes, grid_x, grid_y, grid_z, threads,
                            shared_bytes, options, message, size, statistics);
}}
"""


def compiler() -> str | None:
    """Return the C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def _about_compiler() -> str:
    """What `-march=native` and a compiler's name leave open."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    about = version.stdout
    processor = Path("/proc/cpuinfo")
    if processor.is_file():
        lines = processor.read_text().splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return about


def cache() -> Path:
    """Return the folder of compiled kernels."""
    chosen = os.environ.get("PYATTN_EMULATOR_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "pyattn" / "emulator"


@functools.cache
def _headers() -> str:
    return "\n".join(path.read_text() for path in sorted(HERE.glob("*.hpp")))


def build(file: str, name: str, macros: Iterable[tuple[str, str | int]] = (), *,
          folders: Iterable[str | Path] = (), sanitize: bool = False) -> Path:
    """Return the shared library of the kernel `name` in `file`.

    `folders` are looked into for sources before this one and that of the package.
    """
    source = text(file, [*folders, HERE]) + ENTRY.format(name=name)
    flags = [*FLAGS, *(SANITIZE if sanitize else ()), *(f"-D{key}={value}" for key, value in macros)]
    key = "\0".join([source, _headers(), _about_compiler(), *flags])
    library = cache() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not library.is_file():
        _compile(source, flags, library)
    return library


def _compile(source: str, flags: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        done = subprocess.run(
            [compiler(), *flags, f"-I{HERE}", "-shared", "-x", "c++", "-", "-o", str(made)],
            input=source, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"g++ refuses {library.name}:\n{done.stderr[:4000]}")
        made.replace(library)    # at once, so that others find all of it or nothing


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    """Return the library, loaded once."""
    return ctypes.CDLL(str(library))
