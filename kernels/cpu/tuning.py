"""What is fastest on this CPU: a small table, measured once and kept on disk.

The table decides how work is cut, never what is computed: another table changes results by no more
than rounding. Until ``python -m pyattn warmup --tune`` has made one for the host, built-in figures
serve; PYATTN_TUNING names a file to be used instead, or is "default" for the built-in ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
from collections.abc import Iterator
from pathlib import Path

from pyattn.checks import OptionError

from ..disk import cache_folder
from . import host
from .compile import KINDS

VARIABLE = "PYATTN_TUNING"


@dataclasses.dataclass(frozen=True)
class Table:
    """By kind of kernel."""

    chunk: dict[str, int]
    """Tiles of keys whose scores a forward holds at a time."""
    short: dict[str, int]
    """Queries of a group, heads times tokens, up to which keys are better read where they lie."""


DEFAULT = Table(chunk={"float32": 8, "float64": 4, "bfloat16": 8},
                short={"float32": 32, "float64": 32, "bfloat16": 8})

CANDIDATES: dict[str, tuple[int, ...]] = {"chunk": (2, 4, 8, 16), "short": (1, 4, 8, 16, 32, 64)}

_trial: Table | None = None


def table() -> Table:
    """Return the table in use."""
    return _trial or _kept()


@functools.cache
def _kept() -> Table:
    path = source()
    return DEFAULT if path is None else _read(path)


def source() -> Path | None:
    """Return the file that a table is read from; None stands for the built-in figures."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return None if chosen == "default" else Path(chosen)
    path = host_file()
    return path if path is not None and path.exists() else None


def host_file() -> Path | None:
    """Return where this host's table is kept."""
    folder = cache_folder()
    name = hashlib.sha256(repr(host.target()).encode()).hexdigest()[:16]
    return folder and folder / f"tuning-{name}.json"


def _read(path: Path) -> Table:
    """Read a table, which must have a sensible figure for every kind."""
    try:
        content = json.loads(path.read_text())
        figures = {name: {kind: operator.index(content[name][kind]) for kind in KINDS}
                   for name in CANDIDATES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"the tuning table {path} cannot be read ({type(error).__name__}: "
                          f"{error}); make it anew, or set {VARIABLE}=default") from error
    for name, by_kind in figures.items():
        for kind, figure in by_kind.items():
            if not CANDIDATES[name][0] <= figure <= CANDIDATES[name][-1]:
                low, high = CANDIDATES[name][0], CANDIDATES[name][-1]
                raise OptionError(f"the tuning table {path} must have {name} from {low} to {high}; "
                                  f"got {figure} for {kind}")
    return Table(**figures)


@contextlib.contextmanager
def trial(candidate: Table) -> Iterator[None]:
    """Use another table for a while; not for calls from several threads."""
    global _trial
    _trial = candidate
    try:
        yield
    finally:
        _trial = None


def save(found: Table) -> Path | None:
    """Keep a table for this host; from the next process on it is used.

    Returns None where there is no folder for it, or none that can be written to.
    """
    path = host_file()
    if path is None:
        return None
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        part.replace(path)
    except OSError:
        return None
    return path
