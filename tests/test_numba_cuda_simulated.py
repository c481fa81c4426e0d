"""The numba_cuda kernels on NumPy arrays, with no GPU: a process of its own runs this file.

Numba's simulator must be asked for before Numba is imported, so `test_numba_cuda` starts pytest
anew on this file. The simulator itself runs a few cases. It takes a second or more for each, and a
missing barrier changes nothing there; so the others run in `Block`, which lets one thread of a
block run at a time, in any order, and looks at what happens between barriers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import test_attention
import test_gate_forms
from numba import config
from table import CASES, EMPTY, Drawn, Shape
from test_attention import BY_NAME, MASKED, judge, poisoned, run

import pyattn
from pyattn import dispatch, masks

if not config.ENABLE_CUDASIM:
    pytest.skip("test_numba_cuda.py runs this file in a process of its own",
                allow_module_level=True)

from numba.cuda.simulator import kernel as simulator

from pyattn.kernels.numba_cuda import compile, device, launch, terms, tiles
from pyattn.kernels.numba_cuda.tiling import Tiling

SMALL = Shape((), 2, 1, 19, 37, 8, 5)
BATCHED = Shape((2,), 4, 2, 9, 18, 5, 8)
ACROSS_TILES = Shape((1,), 2, 2, 70, 70, 4, 4)


class BlockError(AssertionError):
    """What a GPU would not forgive."""


class Shared:
    """Shared memory, NaN at first, in which what threads do between two barriers must not meet."""

    def __init__(self, block, array):
        self.block, self.array = block, array
        self.shape, self.dtype = array.shape, array.dtype
        self.marks = {}
        """By index: the interval between barriers, the thread (-1 for several), did it write."""

    def __getitem__(self, index):
        interval, thread, wrote = self.marks.get(index, (-1, 0, False))
        running = self.block.running
        if interval != self.block.interval:
            self.marks[index] = (self.block.interval, running, False)
        elif thread != running:
            if wrote:
                raise BlockError(f"thread {running} reads {index}, written by {thread}")
            self.marks[index] = (interval, -1, False)
        return self.array[index]

    def __setitem__(self, index, value):
        interval, thread, _ = self.marks.get(index, (-1, 0, False))
        running = self.block.running
        if interval == self.block.interval and thread != running:
            raise BlockError(f"thread {running} writes {index}, used by {thread}")
        self.marks[index] = (self.block.interval, running, True)
        self.array[index] = value


def closed_lock():
    lock = threading.Lock()
    lock.acquire()
    return lock


class Block:
    """Threads of a block, one at a time from barrier to barrier; what kernels see as `cuda`."""

    def __init__(self, place, grid, order, checked):
        self.blockIdx, self.gridDim = SimpleNamespace(x=place), SimpleNamespace(x=grid)
        self.blockDim = SimpleNamespace(x=len(order))
        self.shared = SimpleNamespace(array=self._shared_array)
        self.local = SimpleNamespace(array=lambda shape, dtype: np.full(shape, np.nan, dtype))
        self.order, self.checked = order, checked
        self.arrays, self.votes = {}, []
        self.places = {}
        """By thread: the lines, inmost first, of the barrier that it waits at; None at the end."""
        self.running, self.waiting, self.interval, self.error = -1, list(order), 0, None
        self.turns, self.done = [closed_lock() for _ in order], closed_lock()

    def run(self, function, arguments):
        for thread in self.order:
            threading.Thread(target=self._thread, args=(thread, function, arguments),
                             daemon=True).start()
        self._next()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    @property
    def threadIdx(self):
        return SimpleNamespace(x=self.running)

    def _shared_array(self, shape, dtype):
        line = sys._getframe(1).f_lineno
        if line not in self.arrays:
            nan = np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 255, dtype)
            self.arrays[line] = Shared(self, nan) if self.checked else nan
        return self.arrays[line]

    def _thread(self, thread, function, arguments):
        self.turns[thread].acquire()
        try:
            with np.errstate(all="ignore"):
                function(*arguments)
            self.places[thread] = None
        except Exception as error:
            self.error = self.error or error
        self._next()

    def _next(self):
        """Give the turn to the next thread; when all have arrived, begin a new interval."""
        if not self.waiting and self.error is None:
            places = set(self.places.values())
            if len(places) > 1:
                self.error = BlockError(f"threads wait at different barriers: {self.places}")
            elif places == {None}:
                self.done.release()
                return
            self.interval += 1
            self.waiting = list(self.order)
        if self.error is not None:
            self.done.release()
            return
        self.running = self.waiting.pop(0)
        self.turns[self.running].release()

    def syncthreads(self):
        thread, frame, place = self.running, sys._getframe(1), []
        while frame.f_code.co_name != "_thread":
            place.append(frame.f_lineno)
            frame = frame.f_back
        self.places[thread] = tuple(place)
        self._next()
        self.turns[thread].acquire()

    def syncthreads_and(self, vote):
        votes = self.votes
        votes.append(vote)
        self.syncthreads()
        if self.votes is votes:
            self.votes = []
        return int(all(votes))


class Machine(device.Simulator):
    """Runs kernels in blocks, in an order of blocks and threads of its own."""

    def __init__(self):
        self.seed, self.checked, self.launched = 0, False, []

    def launch(self, kernel, blocks, threads, *arguments):
        rng = np.random.default_rng(self.seed)
        self.launched.append(kernel.fn.__name__)
        order = (rng.permutation if self.seed else np.arange)
        for place in order(blocks).tolist():
            block = Block(place, blocks, order(threads).tolist(), self.checked)
            simulator._kernel_context = block
            try:
                block.run(kernel.fn, arguments)
            finally:
                simulator._kernel_context = None


def small(dtype, width):
    """A tiling that Python can run; a tile of the mask has four of its rows and columns."""
    return Tiling(16, 16, 4, 4, 8, 8, 8, dtype)


@pytest.fixture(autouse=True)
def numba_cuda_takes_numpy(monkeypatch):
    backends = ("cpu", "numba_cuda", "array_api")
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    monkeypatch.setitem(dispatch.PREFERENCE, "numpy", backends)
    monkeypatch.setattr(launch, "forward_tiling", small)
    monkeypatch.setattr(launch, "backward_tiling", small)
    monkeypatch.setattr(terms, "THREADS", 4)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(device, "of", lambda x: machine)
    return machine


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32(case):
    drawn = case.make(SMALL, np.float32)
    judge(drawn, *run(drawn, "numba_cuda"))
