"""Threads for the CPU kernels: a few of our own, so that no threading layer has to be chosen.

A call is cut into units of work that do not depend on how many threads there are; a thread that is
free takes the next one. The caller is one of the threads. This module imports no Numba.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from pyattn.checks import OptionError, require_integer

from .compile import native
from .memory import CACHE_LINE, address, aligned
from .records import BOX

OWN_VARIABLE = "PYATTN_NUM_THREADS"
VARIABLES = (OWN_VARIABLE, "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")

KEPT_BYTES = 2**24
"""A thread keeps scratch memory up to this size for its next call."""

MANY_INVITATIONS = 1000

PATIENCE = 50_000
"""How often a thread looks for what it waits for before it sleeps, one or two milliseconds."""

_count: int | None = None


def get_count() -> int:
    """Return how many threads a call uses."""
    global _count
    if _count is None:
        _count = _default()
    return _count


def set_count(count: int) -> None:
    """Use `count` threads from the next call on, in all Python threads."""
    global _count
    count = require_integer("number of threads", count, minimum=1)
    with _lock:
        _count = count


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


class _Local(threading.local):
    """What each thread has of its own."""

    inside = False
    """Whether the thread is already at work on a call that has several threads."""

    def __init__(self) -> None:
        self.spare: list[_Memory] = []


class _Memory:
    """Scratch memory, and the number of the next unit in a place where no other data is."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # two lines: some CPUs fetch them in pairs
        self.array = aligned((2 * CACHE_LINE + nbytes,), np.uint8)
        self.array.fill(0)      # the system hands out pages when they are first written to
        self.queue = address(self.array)
        self.next_unit = ctypes.c_int64.from_address(self.queue)
        self.scratch = self.queue + 2 * CACHE_LINE


class _Invitation:
    """To help with a call; whoever sets `taken` first decides whether it is accepted."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.error: BaseException | None = None
        self.taken = threading.Lock()
        self.finished = False
        self.over = threading.Lock()
        self.over.acquire()

    def accept(self) -> None:
        """Help, in a helper's thread, unless the call could do without."""
        if self.taken.acquire(blocking=False):
            try:
                self.call()
            except BaseException as error:
                self.error = error
            self.finished = True
            self.over.release()

    def withdraw(self) -> bool:
        """Call it off if nobody has accepted it; say whether that was so."""
        return self.taken.acquire(blocking=False)


class _Box:
    """Where a helper who is awake finds what to do, without Python and without being woken."""

    def __init__(self) -> None:
        self.words = aligned((BOX.itemsize // 8,), np.int64)
        self.words.fill(0)
        self.place = address(self.words)
        self.record = self.words.view(BOX)[0]
        self.capacity = -1
        """Bytes of scratch memory that the helper has ready; -1 before it first looks."""
        self.taken = threading.Lock()
        """Held by the caller whose work is in the box, and while the memory changes."""
        self.end = 0
        """What `done` will be when that is finished."""

    def serve(self) -> None:
        """Do what is posted, in the helper's thread, until for a while nothing is."""
        memory = _take(0)
        with self.taken:
            self.record["scratch"], self.capacity = memory.scratch, memory.nbytes
        try:
            native("waiting.serve", "float32")(self.place, PATIENCE)
        finally:
            _give_back(memory)

    def post(self, kernel: int, place: int, units: int, memory: _Memory) -> bool:
        """Ask the helper to join in a call; say whether it does. The caller holds `taken`."""
        if memory.nbytes > self.capacity:
            return False
        for name, value in (("kernel", kernel), ("place", place), ("queue", memory.queue),
                            ("units", units)):
            self.record[name] = value
        self.end = int(self.record["done"]) + 1
        native("waiting.post", "float32")(self.place)
        return bool(self.record["posted"])

    @property
    def finished(self) -> bool:
        """Whether nothing was posted, or it is done."""
        return not self.record["posted"] or int(self.record["done"]) == self.end

    def wait(self) -> None:
        """Wait a while for what was posted to be done."""
        look = native("waiting.until_done", "float32")
        look(self.place, self.end, PATIENCE)
        if not self.finished:
            time.sleep(0)           # the helper's CPU may be this one


_local = _Local()
_lock = threading.Lock()
_invitations: queue.SimpleQueue[_Invitation] = queue.SimpleQueue()
_helpers: list[threading.Thread] = []
_boxes: list[_Box] = []


def run(kernel: Callable[[int, int, int, int], None], place: int, units: int, scratch_bytes: int,
          helpers: int) -> None:
    """Call ``kernel(place, queue, units, scratch)`` here and in up to `helpers` other threads.

    At the address `queue` there is an int64 that starts at 0. A kernel takes the next unit of work
    by adding 1 to it, until there are none; `scratch` is memory for that thread alone. An exception
    is raised here once no thread is at work any more.
    """
    if units <= 0:
        return
    memory = _take(scratch_bytes)
    memory.next_unit.value = 0
    try:
        helpers = min(helpers, units - 1)
        if helpers <= 0 or _local.inside or (helpers := min(helpers, get_count() - 1)) <= 0:
            kernel(place, memory.queue, units, memory.scratch)
        else:
            _together(kernel, place, units, memory, helpers)
    finally:
        _give_back(memory)


def _together(kernel: Callable[[int, int, int, int], None], place: int, units: int,
              memory: _Memory, helpers: int) -> None:
    """Run `kernel` here and in `helpers` other threads."""
    def help_out() -> None:
        own = _take(memory.nbytes)
        try:
            kernel(place, memory.queue, units, own.scratch)
        except BaseException:
            memory.next_unit.value = units          # the others need not go on
            raise
        finally:
            _give_back(own)

    _hire(helpers)
    _local.inside = True
    invitations: list[_Invitation] = []
    posted: list[_Box] = []
    try:
        helpers -= _post(kernel, place, units, memory, helpers, posted)
        # helpers that are busy for long come too late for short calls, which must not pile up
        for _ in range(helpers if _invitations.qsize() < MANY_INVITATIONS else 0):
            invitations.append(_Invitation(help_out))
            _invitations.put(invitations[-1])
        # who has woken up in between looks into the box, not for invitations
        for _ in range(_post(kernel, place, units, memory, len(invitations), posted)):
            if invitations[-1].withdraw():
                invitations.pop()
        kernel(place, memory.queue, units, memory.scratch)
    except BaseException:
        memory.next_unit.value = units
        raise
    finally:
        try:
            _wait(posted, invitations)
        finally:
            _local.inside = False
    for invitation in invitations:
        if invitation.error is not None:
            raise invitation.error


def _post(kernel: Callable[[int, int, int, int], None], place: int, units: int, memory: _Memory,
          helpers: int, posted: list[_Box]) -> int:
    """Post the call to up to `helpers` who are awake; add their boxes to `posted`; count them."""
    machine_code, before = getattr(kernel, "address", 0), len(posted)
    for box in _boxes if machine_code and helpers else []:
        if len(posted) - before < helpers and box.taken.acquire(blocking=False):
            box.record["posted"] = 0
            posted.append(box)
            if not box.post(machine_code, place, units, memory):
                posted.pop().taken.release()
    return len(posted) - before


def _wait(posted: list[_Box], invitations: list[_Invitation]) -> None:
    """Wait for those who help; an interrupt must not leave them writing to memory that is gone."""
    interrupt = None
    for box in posted:
        while not box.finished:
            try:
                box.wait()
            except BaseException as error:
                interrupt = error
        box.taken.release()
    for invitation in invitations:
        if not invitation.withdraw():
            while not invitation.finished:
                try:
                    invitation.over.acquire()
                except BaseException as error:
                    interrupt = error
    if interrupt is not None:
        raise interrupt


def _take(nbytes: int) -> _Memory:
    """Return memory that nobody uses, this thread's own of last time if that is large enough."""
    spare = _local.spare
    if spare:
        memory = spare.pop()
        if memory.nbytes >= nbytes:
            return memory
    return _Memory(nbytes)


def _give_back(memory: _Memory) -> None:
    if memory.nbytes <= KEPT_BYTES and not _local.spare:
        _local.spare.append(memory)


def _hire(count: int) -> None:
    """Have `count` helpers at least; they stay."""
    if len(_helpers) < count:
        with _lock:
            while len(_helpers) < count:
                box = _Box()
                helper = threading.Thread(target=_serve, args=(_invitations, box), daemon=True,
                                          name=f"pyattn_{len(_helpers)}")
                helper.start()
                _boxes.append(box)
                _helpers.append(helper)


def _serve(invitations: queue.SimpleQueue[_Invitation], box: _Box) -> None:
    """Help whoever asks, until the process ends."""
    _local.inside = True
    while True:
        invitations.get().accept()
        if invitations.empty():
            box.serve()


def _after_fork() -> None:
    """Threads do not survive a fork, and what they held stays held."""
    global _lock, _invitations
    _lock, _invitations = threading.Lock(), queue.SimpleQueue()
    _helpers.clear()
    _boxes.clear()
    _local.inside = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
