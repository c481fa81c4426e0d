"""The numba_cuda kernels on NumPy arrays, with no GPU: a process of its own runs this file.

Numba's simulator must be asked for before Numba is imported, so `test_numba_cuda` starts pytest
anew on this file. The simulator itself runs a few cases. It takes a second or more for each, and a
missing barrier changes nothing there; so the others run in `Block`, which lets one thread of a
block run at a time, in any order, and looks at what happens between barriers.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import test_attention
import test_gate_forms
from numba import config
from table import CASES, EMPTY, Case, Shape
from test_attention import BY_NAME, MASKED, judge, run

import pyattn
from pyattn import dispatch, masks

if not config.ENABLE_CUDASIM:
    pytest.skip("test_numba_cuda.py runs this file in a process of its own",
                allow_module_level=True)

if hasattr(os, "sched_setaffinity"):
    # threads hand over to one another all the time, which takes longer from core to core
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

from numba.cuda.simulator import kernel as simulator
from pyattn.kernels.numba_cuda import backward, device, forward, launch, terms, tiles, tiling
from pyattn.kernels.numba_cuda.compile import cuda

device_of = device.of

SMALL = Shape((), 2, 1, 11, 18, 5, 3)
BATCHED = Shape((2,), 4, 2, 7, 10, 3, 5)
ACROSS_TILES = Shape((), 1, 1, 70, 70, 2, 2)


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

    skipped = None
    """File and line of a barrier at which no one waits."""

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
        if (frame.f_code.co_filename, frame.f_lineno) == self.skipped:
            return
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
    """A tiling that Python can run; a tile of the mask has eight of its rows and columns."""
    return tiling.Tiling(8, 8, 4, 2, 4, 8, 4, dtype)


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


def both(drawn, **extra):
    """The same case by numba_cuda and by array_api."""
    return run(drawn, "numba_cuda", **extra), run(drawn, "array_api", **extra)


def assert_same_bits(x, y):
    for a, b in zip((*x[:2], *x[4]), (*y[:2], *y[4]), strict=True):
        np.testing.assert_array_equal(a, b)


# against float64


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32(case):
    drawn = case.make(SMALL, np.float32)
    judge(drawn, *run(drawn, "numba_cuda"))


@pytest.mark.parametrize("name", ["dense", "mask_heads", "segments_causal", "bias_pairs_float64",
                                  "softcap", "everything"])
@pytest.mark.parametrize("dtype", [np.float64, np.float16], ids=lambda d: d.__name__)
def test_other_dtypes(name, dtype):
    drawn = BY_NAME[name].make(BATCHED, dtype)
    judge(drawn, *run(drawn, "numba_cuda"))


@pytest.mark.parametrize("name", ["dense", "causal", "bias_keys", "bias_heads", "gate_keys",
                                  "sinks", "alibi"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_axes(name, shape):
    drawn = BY_NAME[name].make(shape, np.float32)
    judge(drawn, *run(drawn, "numba_cuda"))


@pytest.mark.parametrize("width", [7, 9, 20])
def test_wide_outputs_are_divided_among_blocks(width):
    for d, e in ((width, 5), (5, width)):
        drawn = BY_NAME["everything"].make(Shape((), 2, 1, 5, 9, d, e), np.float32)
        judge(drawn, *run(drawn, "numba_cuda"))


@pytest.mark.parametrize("name", ["window", "causal_top_left"])
def test_several_tiles_of_the_mask(name):
    drawn = BY_NAME[name].make(ACROSS_TILES, np.float32)
    judge(drawn, *run(drawn, "numba_cuda"))


def test_random_blocks():
    """Runs of several tiles, full and partial, and others for each head."""
    n = 130
    tiles = np.array([[[1, 1, 0], [0, 2, 2], [0, 1, 2]], [[0, 0, 2], [2, 0, 1], [0, 0, 0]]])
    tiles = np.kron(tiles, np.ones((64, 64), int))[:, :n, :n]
    seen = (tiles == 1) | ((tiles == 2) & (np.random.default_rng(0).random((n, n)) < 0.5))
    drawn = Case("blocks", lambda r, s: {"mask": seen}).make(Shape((), 2, 1, n, n, 1, 2),
                                                             np.float32)
    judge(drawn, *run(drawn, "numba_cuda"))


GATES = [name for name in test_gate_forms.PARTS if "70" not in name]


@pytest.mark.parametrize("name", GATES)
def test_forms_of_gates(name):
    test_gate_forms.judge(name, Shape((2,), 2, 1, 9, 37, 2, 3), np.float64, "numba_cuda",
                          mask=masks.causal(), allowed=np.tri(9, 37, 28, dtype=bool))


@pytest.mark.parametrize("name", ["gate[blocks of 70]", "table[heads]"])
def test_forms_of_gates_over_several_tiles(name):
    test_gate_forms.judge(name, Shape((), 1, 1, 70, 75, 1, 2), np.float64, "numba_cuda")


def test_dropout_draws_what_others_draw():
    for name, shape in (("lengths_causal", BATCHED), ("segments_causal", SMALL)):
        drawn = BY_NAME[name].make(shape, np.float64)
        extra = {"dropout": 0.4, "decisions": {"dropout_seed": 2**64 - 5}}
        mine, theirs = both(drawn, **extra)
        for a, b in zip((*mine[:2], *mine[4]), (*theirs[:2], *theirs[4]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lengths_window", "everything"])
def test_what_one_backend_saved_is_anothers_backward(name):
    drawn = BY_NAME[name].make(BATCHED, np.float32)
    rng = np.random.default_rng(7)
    for there, back in (("cpu", "numba_cuda"), ("numba_cuda", "cpu")):
        with pyattn.use_backend(there):
            (out, lse), saved = pyattn.attention.forward(**drawn.arrays, **drawn.options,
                                                         return_lse=True)
        dout = rng.standard_normal(out.shape).astype("f")
        with pyattn.use_backend(back):
            judge(drawn, out, lse, dout, None, saved.backward(dout))


# numbers that must not matter, and those that must


@pytest.mark.parametrize("case", MASKED, ids=lambda c: c.name)
def test_what_is_masked_is_never_read(case):
    shape = Shape((), 2, 1, 11, 18, 2, 2)
    test_attention.test_what_is_masked_is_never_read(case, shape, "numba_cuda")


@pytest.mark.parametrize("name", "qkv")
def test_nan_reaches_those_who_see_it_and_no_one_else(name):
    drawn = BY_NAME["causal_window"].make(Shape((), 1, 1, 36, 36, 2, 2), np.float32)
    for token, value in ((0, np.nan), (17, np.inf), (35, -np.inf)):
        drawn.arrays[name] = drawn.arrays[name].copy()
        drawn.arrays[name][..., token, :] = value
        out, *_, grads = run(drawn, "numba_cuda")
        dense = dataclasses.replace(drawn.dense, **drawn.arrays)
        want, _ = oracle.forward(dense, oracle.exact("f4"))
        np.testing.assert_array_equal(np.isfinite(out), np.isfinite(want))
        far = np.abs(np.arange(36) - token) > 3
        assert all(np.isfinite(gradient[..., far, :]).all() for gradient in grads)
        drawn = BY_NAME["causal_window"].make(Shape((), 1, 1, 36, 36, 2, 2), np.float32)


def test_views_of_any_strides():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((3, 1, 20, 2, 12)).astype("f")
    base.flags.writeable = False
    views = [np.swapaxes(x, 1, 2)[..., ::-3] for x in base]
    results = []
    with pyattn.use_backend("numba_cuda"):
        for q, k, v in (views, [x.copy() for x in views]):
            out, saved = pyattn.attention.forward(q, k, v, causal=True)
            results.append((out, *saved.backward(np.broadcast_to(np.float32(1), out.shape))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


# what a GPU would not forgive


EVERY_KERNEL = [
    lambda: BY_NAME["everything"].make(Shape((), 2, 1, 10, 18, 2, 2), np.float32),
    lambda: BY_NAME["segments_alibi"].make(Shape((), 1, 1, 10, 18, 2, 2), np.float32),
    lambda: BY_NAME["gate_keys"].make(Shape((), 2, 1, 10, 18, 2, 2), np.float32),
    lambda: BY_NAME["bias_heads"].make(Shape((2,), 2, 1, 10, 18, 2, 2), np.float32),
]


@pytest.mark.parametrize("make", EVERY_KERNEL)
def test_no_races_and_no_order_that_matters(make, machine):
    """Other orders of blocks and threads give the same bits; no two threads meet in between."""
    drawn = make()
    first = run(drawn, "numba_cuda")
    machine.seed, machine.checked = 1, True
    again = run(drawn, "numba_cuda")
    judge(drawn, *again)
    assert_same_bits(first, again)


def run_every_kernel():
    for make in EVERY_KERNEL:
        run(make(), "numba_cuda")
    test_gate_forms.judge("gate[blocks of 3]", Shape((), 1, 1, 17, 17, 2, 2), np.float64,
                          "numba_cuda")


def test_every_kernel_is_run(machine):
    run_every_kernel()
    source = "".join(inspect.getsource(module) for module in (forward, backward, terms))
    kernels = re.findall(r"@kernel\n +def (\w+)|@kernel\ndef (\w+)", source)
    assert set(machine.launched) == {inner or outer for inner, outer in kernels}


def barriers():
    """All barriers in the kernels' source, by file and line; a vote cannot be had without one."""
    found = []
    for module in (tiles, forward, backward, terms):
        lines, first = inspect.getsourcelines(module)
        found += [(module.__file__, first + at + (first == 0)) for at, line in enumerate(lines)
                  if "cuda.syncthreads()" in line]
    return found


def named(barrier):
    return f"{Path(barrier[0]).stem}:{barrier[1]}"


@pytest.mark.parametrize("barrier", barriers(), ids=named)
def test_a_barrier_left_out_is_noticed(barrier, machine, monkeypatch):
    monkeypatch.setattr(Block, "skipped", barrier)
    machine.checked = True
    with pytest.raises(BlockError, match=r"thread \d+ (reads|writes)"):
        run_every_kernel()


def test_threads_that_wait_at_different_barriers_are_noticed(machine):
    def divergent(wanted):
        if cuda.threadIdx.x < wanted:
            cuda.syncthreads()

    def apart(wanted):
        if cuda.threadIdx.x < wanted:
            cuda.syncthreads()
        else:
            cuda.syncthreads()

    for kernel in (divergent, apart):
        machine.launch(SimpleNamespace(fn=kernel), 1, 4, 4 if kernel is divergent else 0)
        with pytest.raises(BlockError, match="different barriers"):
            machine.launch(SimpleNamespace(fn=kernel), 1, 4, 2)


# other machines


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_tiles_of_the_size_they_have_on_a_gpu(dtype, monkeypatch):
    monkeypatch.setattr(launch, "forward_tiling", tiling.forward_tiling)
    monkeypatch.setattr(launch, "backward_tiling", tiling.backward_tiling)
    drawn = BY_NAME["causal_window"].make(Shape((), 1, 1, 5, 70, 3, 3), dtype)
    judge(drawn, *run(drawn, "numba_cuda"))


def test_in_numbas_own_simulator(monkeypatch):
    monkeypatch.setattr(device, "of", device_of)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        drawn = BY_NAME["bias_masks"].make(Shape((), 1, 1, 9, 17, 3, 3), np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(drawn, "numba_cuda")
        judge(drawn, *result)
    finally:
        sys.setswitchinterval(interval)
