"""Threads for the CPU kernels: one pool of our own, so that no threading layer has to be chosen.

Work is a range of units cut into chunks that do not depend on how many threads there are; a thread
that is free takes the next chunk. The caller is one of the threads. This module imports no Numba.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyattn.checks import OptionError, require_integer

OWN_VARIABLE = "PYATTN_NUM_THREADS"
VARIABLES = (OWN_VARIABLE, "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")

_lock = threading.Lock()
_in_pool = threading.local()
_count: int | None = None
_pool: ThreadPoolExecutor | None = None


def get_count() -> int:
    """Return how many threads a call uses."""
    global _count
    if _count is None:
        _count = _default()
    return _count


def set_count(count: int) -> None:
    """Use `count` threads from the next call on, in all Python threads."""
    global _count, _pool
    count = require_integer("number of threads", count, minimum=1)
    with _lock:
        # a pool that is in use lives until its calls are done
        _count, _pool = count, None


def _default() -> int:
    for name in VARIABLES:
        text = os.environ.get(name, "").partition(",")[0].strip()
        if text.isdecimal() and int(text) > 0:
            return int(text)
        if text and name == OWN_VARIABLE:
            raise OptionError(f"{name} must be a positive integer; got {text!r}")
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _helpers() -> tuple[ThreadPoolExecutor | None, int]:
    """Return the pool and how many of its threads may join the caller."""
    global _pool
    if getattr(_in_pool, "yes", False):
        return None, 0
    with _lock:
        count = get_count() - 1
        if _pool is None and count:
            _pool = ThreadPoolExecutor(count, "pyattn", _enter_pool)
        return _pool, count


def _enter_pool() -> None:
    _in_pool.yes = True


def _after_fork() -> None:
    """Threads do not survive a fork, and the lock may have been held by one of them."""
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(work: Callable[[int, int, Any], None], count: int, chunk: int,
        scratch: Callable[[], Any] = lambda: None) -> None:
    """Call ``work(first, last, memory)`` for chunks that make up ``range(count)``.

    `memory` is made by `scratch` once per thread that takes part. An exception of any chunk is
    raised here, after the other threads have stopped.
    """
    chunks = -(-count // chunk)
    if chunks <= 1:
        if chunks:
            work(0, count, scratch())
        return
    taken = itertools.count()
    failed = False

    def take() -> None:
        nonlocal failed
        memory = scratch()
        try:
            while not failed and (number := next(taken)) < chunks:
                work(number * chunk, min(number * chunk + chunk, count), memory)
        except BaseException:
            failed = True
            raise

    pool, helpers = _helpers()
    others = [pool.submit(take) for _ in range(min(helpers, chunks - 1))] if pool else []
    try:
        take()
    finally:
        # those that have not started by now would find nothing to do
        late = [other.cancel() for other in others]
        errors = [other.exception() for other, gone in zip(others, late, strict=True) if not gone]
    for error in errors:
        if error is not None:
            raise error
