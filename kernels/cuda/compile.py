"""CUDA C++ sources as one text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

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
