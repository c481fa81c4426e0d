"""What is fastest on a GPU: a small table, measured when somebody asks, and kept on disk.

Kernels divide their work by rules that were made from registers and shared memory (tilings.py,
hopper.py). Beside what a rule says these modules list further candidates, all of them compiled and
read like any other configuration. ``python -m pyattn warmup --gpu`` times the candidates on the GPU
at hand and keeps a table of the fastest; no other call measures anything. A choice is for a class
of calls, as "forward half 128 causal": what is chosen, the kind of dtype, the width, and what else
matters.

Another choice adds up in another order, so results change by rounding. A process therefore reads
its table once, at the first call on a device, and keeps to it. A table serves the device, the
compiler and the sources that it was measured with; any other is passed over, as is one that cannot
be read, and then the rules hold. So they do where PYATTN_TUNING is "default".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..disk import cache_folder, read_plain, write_plain
from . import compile
from .device import Device

VARIABLE = "PYATTN_TUNING"

MEASURED = ("softmax", "hopper", "tilings")
"""How the names of sources begin that a table depends on."""

Choice = TypeVar("Choice")

_tables: dict[tuple[str, tuple[int, int]], Mapping[str, Any]] = {}
_trial: Mapping[str, Any] | None = None


def chosen(device: Device, name: str, candidates: Sequence[Choice]) -> Choice:
    """Return what the device's table says for a class; the first candidate if that is none."""
    found = table(device).get(name)
    return candidates[candidates.index(found)] if found in candidates else candidates[0]


def table(device: Device) -> Mapping[str, Any]:
    """Return the choices in use on a device, by class; empty where the rules hold."""
    if _trial is not None:
        return _trial
    key = device.name, device.capability
    if key not in _tables:
        _tables.setdefault(key, _read(device))
    return _tables[key]


def file(device: Device) -> Path | None:
    """Return where the table of a device is kept."""
    folder = cache_folder()
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    version = ".".join(map(str, device.capability))
    return folder and folder / "cuda" / f"tuning-{name}-{version}.json"


def _read(device: Device) -> Mapping[str, Any]:
    path = None if os.environ.get(VARIABLE) == "default" else file(device)
    stored = read_plain(path) if path else None
    if stored is None:
        return {}
    try:
        content = json.loads(stored)
        if content["made for"] != made_for(device):
            return {}
        return {name: _immutable(choice) for name, choice in content["choices"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _immutable(choice: Any) -> Any:
    return tuple(choice) if isinstance(choice, list) else choice


def made_for(device: Device) -> dict[str, str]:
    """Return all that a table of times depends on."""
    return {"device": device.name, "capability": ".".join(map(str, device.capability)),
            "compiler": device.compiler, "sources": _sources()}


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(compile.SOURCES.iterdir()):
        if path.name.startswith(MEASURED) and path.suffix in (".py", ".cu"):
            digest.update((compile.text(path.name) if path.suffix == ".cu"
                           else path.read_text()).encode())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def trial(choices: Mapping[str, Any]) -> Iterator[None]:
    """Use other choices for a while; not for calls from several threads."""
    global _trial
    before = _trial
    _trial = choices
    try:
        yield
    finally:
        _trial = before


def text(device: Device, choices: Mapping[str, Any], seconds: Mapping[str, Any]) -> str:
    """Return a table as it is kept: with the times that its choices were made by."""
    content = {"made for": made_for(device), "choices": choices,
               "microseconds": {name: {told: round(1e6 * time, 1) for told, time in times.items()}
                                for name, times in seconds.items()}}
    sections = []
    for title, rows in content.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        sections.append(f" {json.dumps(title)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def save(device: Device, written: str) -> Path | None:
    """Keep a table; from the next process on it is used.

    Returns None where there is no folder for it, or none that can be written to.
    """
    path = file(device)
    if path is None:
        return None
    write_plain(path, written.encode())
    return path if read_plain(path) == written.encode() else None
