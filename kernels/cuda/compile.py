"""CUDA C++ sources as one text, and what NVRTC makes of it, kept on disk.

CuPy's own cache does not see which headers a source includes, and CuPy takes no architecture like
"sm_90a"; so this goes through its thin binding of NVRTC.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyattn.checks import BackendError

from ..disk import cache_folder, read, write

Macros = tuple[tuple[str, str | int], ...]

INSTALL = 'pip install "pyattn[cuda13]" (with a driver for CUDA 12: "pyattn[cuda12]")'
"""How to get what the GPU backends need."""

SOURCES = Path(__file__).parent
_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+\.cuh)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


def text(name: str, folders: Iterable[str | Path] = ()) -> str:
    """Return the source file `name` with each header `"*.cuh"` it includes put in, once.

    Compilers are given this one string, so what a compiled kernel depends on is what it holds, and
    a cache may go by it. `#line` marks keep the names and lines of the files in error messages.
    A file is looked for in `folders`, in their order, and then here: a header of the same name in
    one of them stands in for ours. Includes may not depend on macros: each is put in where it is
    first met. Other includes (`<cmath>`, `"emulator.hpp"`) stay as they are.
    """
    places = [Path(folder) for folder in folders] + [SOURCES]
    lines: list[str] = []
    _put_in(name, places, lines, set(), "")
    return "\n".join(lines) + "\n"


def _put_in(name: str, places: list[Path], lines: list[str], met: set[str], asker: str) -> None:
    met.add(name)
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        where = ", ".join(map(str, places))
        raise FileNotFoundError(f"{name}{asker} is in none of: {where}")
    shown = name if path.parent == SOURCES else f"{path.parent.name}/{name}"
    lines.append(f'#line 1 "{shown}"')
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        included = _INCLUDE.match(line)
        if included is None:
            lines.append("" if _ONCE.match(line) else line)
        elif included[1] in met:
            lines.append("")
        else:
            _put_in(included[1], places, lines, met, f", which {shown}:{number} includes,")
            lines.append(f'#line {number + 1} "{shown}"')


FLAGS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""What every kernel is compiled with; the last two are what CuPy compiles its own with."""


def cubin(name: str, macros: Macros, architecture: str) -> bytes:
    """Return the machine code of the source file `name` for "sm_80", "sm_90a", ...

    It is kept on disk by all that it depends on. Compiling takes CuPy and NVRTC, but no GPU.
    """
    version = nvrtc_version()
    options = options_for(macros, architecture)
    source = text(name)
    folder = cache_folder()
    parts = (source, repr(options), repr(version))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = folder and folder / "cuda" / f"{Path(name).stem}-{architecture}-{key}"
    code = read(path) if path else None
    if not code:
        code, _ = compiled(source, name, options)
        if path:
            write(path, code)
    return code


def options_for(macros: Macros, architecture: str) -> tuple[str, ...]:
    """Return what the compiler is told; a macro that is True is 1."""
    given = ((macro, int(value) if isinstance(value, bool) else value) for macro, value in macros)
    return (*FLAGS, *(f"-D{macro}={value}" for macro, value in given), f"-arch={architecture}")


def compiled(source: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Return machine code and the compiler's messages; BackendError with these if it has errors."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        # CuPy takes a zero off the end that belongs to the file
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise BackendError(f"NVRTC {'.'.join(map(str, nvrtc_version()))} cannot compile {name} "
                           f"with {' '.join(options)}: {error}\n"
                           f"{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Return the version of CUDA's runtime compiler, or raise BackendError if it is not there."""
    try:
        return _nvrtc().getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError("NVRTC, which compiles CUDA kernels, cannot be loaded ("
                           f"{type(error).__name__}: {error}); install it by {INSTALL}") from None


def _nvrtc() -> Any:
    from cupy.cuda import nvrtc

    return nvrtc


def architecture(capability: tuple[int, int], *, specific: bool = False) -> str:
    """Return what to compile for, to run on a GPU of `capability`: "sm_80" for (8, 0).

    A GPU runs code for earlier minor versions of its major one; of these NVRTC knows some.
    `specific` code, "sm_90a", uses what no other capability has.
    """
    major, minor = capability
    if specific:
        return f"sm_{major}{minor}a"
    known = [number for number in _nvrtc().getSupportedArchs()
             if number // 10 == major and number % 10 <= minor]
    if not known:
        raise BackendError(f"NVRTC {'.'.join(map(str, nvrtc_version()))} knows no GPU of compute "
                           f"capability {major}.{minor}; install a newer one by {INSTALL}")
    return f"sm_{max(known)}"
