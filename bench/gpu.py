"""``python -m bench.gpu``: everything that a machine with a GPU is asked, in one go.

Needs CuPy, this checkout, and what pyattn itself depends on. In this order, and each by itself with
``--parts``:

machine    what GPU, driver and compiler; what a copy and a matrix product reach; all kernels are
           compiled, by several processes
correct    the backends cuda and numba_cuda beside float64 on the host, as `pyattn check` does it
sanitize   compute-sanitizer's memcheck and racecheck on small shapes, if it is installed
tune       how kernels best divide their work: the table that `pyattn warmup --gpu` would keep
times      forward and backward, by that table if it was measured, and by events; between them the
           cache is overwritten; TFLOP/s, beside torch (flash, memory-efficient and cuDNN
           attention), FlexAttention, Triton's tutorial kernel (``--triton-tutorial
           06-fused-attention.py``) and plain CuPy, where installed; sparse masks by the TFLOP/s on
           the tiles that they visit
portable   the backend array_api on CuPy arrays beside the host

It stops starting new work after ``--minutes``, and writes one file, results-gpu-<name>.md, beside
this one unless told another place. ``--emulated`` runs the script itself without a GPU: the same
parts on shapes of a few tokens, NumPy arrays, and kernels in the emulator of tests/.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pyattn
from pyattn import dispatch, masks
from pyattn.cli import tune_gpu
from pyattn.testing import on_gpu
from pyattn.testing.compare import plain_dtype
from pyattn.testing.report import OK, SKIPPED, text_failure

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("machine", "correct", "sanitize", "tune", "times", "portable")

CORRECT_SHARE = 0.4
"""What part of the time correctness may take, so that there are times too."""
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 100

FLUSHED_BYTES = 2**28
"""Written between two timings: several times what the second-level cache holds."""

SECONDS_A_ROW = 0.3
FEWEST, MOST = 5, 50
"""Timings of a row."""

BACKWARD_PRODUCTS = 5
"""Products of two tokens' vectors that a backward has to do; a forward has 2."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape and mask; `heads` share `groups` heads of keys."""

    name: str
    dtype: str
    n: int
    d: int
    heads: int = 16
    groups: int = 16
    batch: int = 1
    mask: Any = None
    causal: bool = False

    @property
    def pairs(self) -> int:
        """Pairs of tokens that are counted: half of all if causal, and whole tiles of a mask."""
        if self.mask is None:
            each = self.n * self.n // (2 if self.causal else 1)
        else:
            tiles = self.mask.compile(self.n, self.n).tiles
            each = min((tiles.full + tiles.partial) * 64 * 64, self.n * self.n)
        return self.batch * self.heads * each

    def flops(self, backward: bool) -> float:
        return 2.0 * self.pairs * self.d * (BACKWARD_PRODUCTS if backward else 2)

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self.batch, heads, self.n, self.d)
                for heads in (self.heads, self.groups, self.groups)]

    @property
    def options(self) -> dict[str, Any]:
        if self.mask is not None:
            return {"mask": self.mask}
        return {"causal": True} if self.causal else {}


def rows(tokens: int, short: int) -> list[Row]:
    """What is timed: long sequences of `tokens`, and some of `short`."""
    batch = max(1, tokens // short)
    found = []
    for d, heads in ((128, 16), (64, 32)):
        for causal in (False, True):
            kind = "causal" if causal else "dense"
            found += [Row(f"{kind} D{d} N{tokens}", "bfloat16", tokens, d, heads, heads, 1, None,
                          causal),
                      Row(f"{kind} D{d} N{short}", "bfloat16", short, d, heads, heads, batch, None,
                          causal)]
    found += [
        Row(f"causal D128 N{tokens}, 4 heads share keys", "bfloat16", tokens, 128, 16, 4, 1, None,
            True),
        Row(f"dense D128 N{tokens} float16", "float16", tokens, 128),
        Row(f"causal D256 N{tokens}", "bfloat16", tokens, 256, 8, 8, 1, None, True),
        Row(f"dense D128 N{short} float32", "float32", short, 128),
        Row(f"dense D64 N{short} float64", "float64", short, 64, 8, 8),
    ]
    long = 2 * tokens
    window = masks.window(long // 32, 0)
    for name, mask in (
            (f"window of {long // 32} before, N{long}", window),
            (f"window and 64 global tokens, N{long}", window | masks.global_tokens(range(64))),
            (f"blocks of 64, each in 16 chosen, N{long}", chosen_blocks(long))):
        found.append(Row(name, "bfloat16", long, 128, mask=mask))
    return found


def chosen_blocks(n: int) -> Any:
    """Each block of 64 queries sees its own block, and some that were drawn."""
    size = -(-n // 64)
    rng = np.random.default_rng(0)
    table = np.eye(size, dtype=bool)
    for row in range(size):
        table[row, rng.permutation(size)[:15]] = True
    return masks.blocks(table, 64)


class Gpu:
    """The current GPU, and CuPy's arrays."""

    library = "cupy"

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.flushed = cupy.empty(FLUSHED_BYTES, np.uint8)
        number = cupy.cuda.runtime.getDevice()
        self.properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.name = self.properties["name"].decode()
        self.rows = rows(8192, 2048)

    def describe(self) -> list[str]:
        from pyattn.kernels.cuda import compile

        cupy = self.cupy
        major, minor = self.properties["major"], self.properties["minor"]
        copied, product = self.ceilings()
        return [
            f"GPU: {self.name}, compute capability {major}.{minor}, "
            f"{self.properties['multiProcessorCount']} multiprocessors",
            f"CUDA driver {cupy.cuda.runtime.driverGetVersion()}, "
            f"CuPy {cupy.__version__}, NVRTC {'.'.join(map(str, compile.nvrtc_version()))}, "
            f"Python {platform.python_version()}, pyattn {pyattn.__version__}",
            f"device-to-device copy: {copied:.2f} TB/s, read and written",
            f"float16 matrix product of 8192: {product:.0f} TFLOP/s",
            compiled((major, minor)),
        ]

    def ceilings(self) -> tuple[float, float]:
        """TB/s of a copy, TFLOP/s of a matrix product."""
        cupy = self.cupy
        source = cupy.ones(2**31, np.uint8)
        target = cupy.empty_like(source)
        a = cupy.asarray(np.random.default_rng(0).standard_normal((8192, 8192)).astype(np.float16))
        copy = statistics.median(self.timed(lambda: cupy.copyto(target, source)))
        product = statistics.median(self.timed(lambda: a @ a))
        return 2 * source.nbytes / copy / 1e12, 2 * 8192.0**3 / product / 1e12

    def asarray(self, x: np.ndarray) -> Any:
        return self.cupy.asarray(x)

    def timed(self, call: Callable[[], Any]) -> list[float]:
        """Seconds of several calls, the device's own; the first, which may compile, is left out."""
        cupy = self.cupy
        for _ in range(2):
            call()
        cupy.cuda.Device().synchronize()
        found: list[float] = []
        end = time.perf_counter() + SECONDS_A_ROW
        while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() < end):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            # the host runs ahead while this is written, so that launches wait for nothing
            self.flushed.fill(len(found))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            found.append(cupy.cuda.get_elapsed_time(start, stop) / 1e3)
        return found

    def tasks(self, backends: tuple[str, ...]) -> list[Any]:
        return [task for task in on_gpu.tasks() if task.backend in backends]

    def sanitized(self) -> list[str]:
        """What compute-sanitizer says of the small shapes, tool by tool."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return ["compute-sanitizer is not installed"]
        told = []
        for name in SANITIZERS:
            try:
                done = subprocess.run(
                    [tool, "--tool", name, sys.executable, "-m", "bench.gpu", "--small"], text=True,
                    capture_output=True, check=False, timeout=SANITIZER_SECONDS, cwd=ROOT)
            except subprocess.TimeoutExpired:
                told.append(f"{name}: not done in {SANITIZER_SECONDS} seconds")
                continue
            summary = re.findall(r"=+ (.*SUMMARY.*|.*Device not supported.*)", done.stdout)
            told.append(f"{name}: {'; '.join(summary) or f'exit status {done.returncode}'}")
            if done.returncode:
                told += (done.stdout + done.stderr).splitlines()[:40]
        return told

    def small(self) -> None:
        """Calls of every kind of kernel, for a sanitizer: each array is allocated by itself."""
        self.cupy.cuda.set_allocator(None)
        _small(self)
        self.cupy.cuda.Device().synchronize()

    def tuned(self) -> tune_gpu.Measured:
        return tune_gpu.measure(self.asarray)

    def rivals(self, tutorial: Path | None) -> dict[str, Rival]:
        found: dict[str, Rival] = {"CuPy": plain_cupy}
        if importlib.util.find_spec("torch") is not None:
            import torch

            if torch.cuda.is_available():
                found |= {f"torch {name}": functools.partial(torch_attention, backend)
                          for name, backend in (("flash", "FLASH_ATTENTION"),
                                                ("efficient", "EFFICIENT_ATTENTION"),
                                                ("cuDNN", "CUDNN_ATTENTION"))}
                found["FlexAttention"] = flex_attention
        if tutorial is not None:
            found["Triton tutorial"] = functools.partial(triton_tutorial, tutorial)
        return found


def compiled(capability: tuple[int, int]) -> str:
    """Compile every kernel for this GPU, in processes of their own, into the cache."""
    from pyattn.kernels.cuda import compile

    from . import gpu_sass

    wanted = {(kernel.file, kernel.macros,
               compile.architecture(capability, specific=kernel.architecture_specific))
              for kernel in (subject.kernel for subject in gpu_sass.subjects().values())
              if capability == (9, 0) or not kernel.architecture_specific}
    start = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(
            os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile.cubin, *one) for one in wanted]:
            done.result()
    return f"{len(wanted)} kernels compiled, or found, in {time.perf_counter() - start:.0f} s"


class Emulated:
    """No GPU: kernels in the emulator of tests/, on NumPy arrays, by the host's clock."""

    library = "numpy"
    name = "emulator"

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        device = importlib.import_module("pyattn.kernels.cuda.device")
        emulator = importlib.import_module("emulator.device").EmulatedDevice()
        device.register("numpy", lambda array: emulator)
        dispatch.PREFERENCE["numpy"] = ("cuda", "array_api")
        self.rows = [
            dataclasses.replace(row, n=min(row.n, 130), heads=2, groups=2 if row.groups > 4 else 1,
                                batch=1, mask=None if row.mask is None else masks.window(32, 0))
            for row in rows(256, 128) if row.d == 64 or row.mask is not None]

    def describe(self) -> list[str]:
        return ["no GPU: a rehearsal of this script in the emulator, whose times say nothing"]

    def asarray(self, x: np.ndarray) -> np.ndarray:
        return x

    def timed(self, call: Callable[[], Any]) -> list[float]:
        start = time.perf_counter()
        call()
        return [time.perf_counter() - start]

    def tasks(self, backends: tuple[str, ...]) -> list[Any]:
        return [task for backend in backends if backend != "numba_cuda"
                for task in on_gpu.tasks_of(backend, "numpy", np.asarray)
                if task.function in ("sliding_window_attention", "layers.multi_head")]

    def sanitized(self) -> list[str]:
        self.small()
        return ["the emulator's race detector: nothing found"]

    def small(self) -> None:
        _small(self)

    def tuned(self) -> tune_gpu.Measured:
        return tune_gpu.measure(self.asarray, tokens=64, only=lambda name: name == "keys half 64")

    def rivals(self, tutorial: Path | None) -> dict[str, Rival]:
        return {}


Rival = Callable[[Row, bool, Any], Callable[[], Any]]
"""From a row, whether its backward is wanted too, and the machine, to what is timed."""


class Unsupported(Exception):
    """A rival does not do a row."""


def drawn(row: Row, machine: Any) -> list[Any]:
    """q, k, v and the output's gradient."""
    rng = np.random.default_rng(0)
    dtype = plain_dtype(row.dtype)
    return [machine.asarray(rng.standard_normal(shape, dtype=np.float32).astype(dtype))
            for shape in (*row.shapes(), row.shapes()[0])]


def ours(backend: str, row: Row, backward: bool, machine: Any) -> Callable[[], Any]:
    """Our call; of a backward the forward is not timed."""
    q, k, v, dout = drawn(row, machine)
    options = row.options

    def forced(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with dispatch.use_backend(backend):
                return call()
        return run

    if not backward:
        return forced(lambda: pyattn.attention(q, k, v, **options))
    with dispatch.use_backend(backend):
        _, saved = pyattn.attention.forward(q, k, v, **options)
    return forced(lambda: saved.backward(dout))


def plain_cupy(row: Row, backward: bool, machine: Any) -> Callable[[], Any]:
    """Scores, softmax and product as a user of CuPy would write them."""
    if backward or row.mask is not None or row.groups != row.heads:
        raise Unsupported("only dense and causal forwards are written out")
    if row.dtype == "bfloat16" or row.batch * row.heads * row.n**2 > 2**31:
        raise Unsupported("not in bfloat16, and not with more than 2**31 scores")
    cupy = machine.cupy
    q, k, v, _ = drawn(row, machine)
    hidden = cupy.triu(cupy.ones((row.n, row.n), bool), 1)

    def call() -> Any:
        scores = q @ k.swapaxes(-1, -2) * np.dtype(q.dtype).type(row.d**-0.5)
        if row.causal:
            scores = cupy.where(hidden, -np.inf, scores)
        weights = cupy.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    return call


def torch_inputs(row: Row, backward: bool) -> list[Any]:
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, row.dtype)
    made = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
            for shape in (*row.shapes(), row.shapes()[0])]
    for x in made[:3]:
        x.requires_grad_(backward)
    return made


def torch_pass(attend: Callable[[], Any], inputs: list[Any], backward: bool) -> Callable[[], Any]:
    import torch

    if not backward:
        return attend
    out = attend()
    return lambda: torch.autograd.grad(out, inputs[:3], inputs[3], retain_graph=True)


def torch_attention(backend: str, row: Row, backward: bool, machine: Any) -> Callable[[], Any]:
    """One of the kernels behind torch's scaled_dot_product_attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if row.mask is not None:
        raise Unsupported("no sparse masks")
    inputs = torch_inputs(row, backward)

    def attend() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                *inputs[:3], is_causal=row.causal, enable_gqa=row.groups != row.heads)

    return torch_pass(attend, inputs, backward)


@functools.cache
def compiled_flex() -> Any:
    import torch
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=False)


def flex_attention(row: Row, backward: bool, machine: Any) -> Callable[[], Any]:
    """The compiled FlexAttention with its own block mask, of one long row and of sparse ones."""
    import torch
    from torch.nn.attention import flex_attention as flex

    if row.mask is None and not (row.causal and row.d == 128 and row.batch == 1):
        raise Unsupported("only the long causal row: compiling takes half a minute")
    inputs = torch_inputs(row, backward)
    if row.mask is None:
        def allowed(b: Any, h: Any, i: Any, j: Any) -> Any:
            return j <= i
    else:
        table = torch.from_numpy(row.mask.dense(row.n, row.n).reshape(row.n, row.n)).cuda()

        def allowed(b: Any, h: Any, i: Any, j: Any) -> Any:
            return table[i, j]

    block_mask = flex.create_block_mask(allowed, None, None, row.n, row.n, device="cuda")
    call = compiled_flex()
    return torch_pass(lambda: call(*inputs[:3], block_mask=block_mask,
                                   enable_gqa=row.groups != row.heads), inputs, backward)


def triton_tutorial(path: Path, row: Row, backward: bool, machine: Any) -> Callable[[], Any]:
    """``attention(q, k, v, causal, scale)`` of Triton's tutorial 06, from a file."""
    if row.mask is not None or row.groups != row.heads or row.dtype not in ("float16", "bfloat16"):
        raise Unsupported("dense and causal, 16 bits")
    specification = importlib.util.spec_from_file_location("triton_tutorial", path)
    if specification is None or specification.loader is None:
        raise Unsupported(f"{path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    inputs = torch_inputs(row, backward)
    return torch_pass(lambda: module.attention(*inputs[:3], row.causal, row.d**-0.5), inputs,
                      backward)


SMALL = (
    ("dense", {}), ("causal", {"causal": True}), ("window", {"window": 20}),
    ("softcap", {"softcap": 2.0}), ("dropout", {"dropout": 0.2, "rng": 0}),
    ("lengths", {"kv_lengths": (50,), "causal": True}))


def _small(machine: Any) -> None:
    """A forward and a backward of small shapes, on every backend, in each dtype and width."""
    for backend in dispatch.PREFERENCE[machine.library]:
        for dtype, d in (("bfloat16", 64), ("bfloat16", 128), ("float16", 40), ("float32", 64),
                         ("float64", 32)):
            row = Row("small", dtype, 130, d, 2, 1)
            if backend == "array_api" or (machine.library == "numpy" and d > 64):
                continue
            for _, options in SMALL if d == 64 else SMALL[:2]:
                q, k, v, dout = drawn(row, machine)
                with dispatch.use_backend(backend), contextlib.suppress(pyattn.BackendError):
                    _, saved = pyattn.attention.forward(q, k, v, **options)
                    saved.backward(dout)


@dataclasses.dataclass
class Results:
    """Lines of the file, which are printed as they come; and whether all went well."""

    end: float
    lines: list[str] = dataclasses.field(default_factory=list)
    wrong: int = 0
    choices: dict[str, Any] | None = None
    """How kernels divide their work, if that was measured."""

    def add(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            self.lines.append(line)

    def out_of_time(self) -> bool:
        return time.perf_counter() > self.end


def machine_part(machine: Any, results: Results, args: Any) -> None:
    results.add("", "## Machine", "", *(f"- {line}" for line in machine.describe()))


def correct_part(machine: Any, results: Results, args: Any) -> None:
    end = time.perf_counter() + CORRECT_SHARE * 60 * args.minutes
    results.add("", "## Correctness", "")
    judged(machine.tasks(dispatch.ON_GPU), results, end)


def portable_part(machine: Any, results: Results, args: Any) -> None:
    results.add("", "## Correctness of array operations", "")
    judged(machine.tasks(("array_api",)), results, results.end)


def judged(tasks: list[Any], results: Results, end: float) -> None:
    results.add("| function | backend | passed | failed | skipped |", "|---|---|---|---|---|")
    failures, reasons, late = [], {}, 0
    for task in tasks:
        if time.perf_counter() > end:
            late += 1
            continue
        found = task.results()
        count = {status: sum(r.status == status for r in found) for status in (OK, SKIPPED)}
        bad = [r for r in found if r.status not in (OK, SKIPPED)]
        failures += bad
        reasons |= {r.message: None for r in found if r.status == SKIPPED}
        results.add(f"| {task.function} | {task.backend} | {count[OK]} | {len(bad)} | "
                    f"{count[SKIPPED]} |")
    results.wrong += len(failures)
    results.add("")
    for reason in list(reasons)[:20]:
        results.add(f"- skipped: {reason}")
    for result in failures[:20]:
        results.add("", "```", *text_failure(result), "```")
    results.add("", f"{len(failures)} failed" if failures else "all right")
    if late:
        results.add("", f"not reached in time: {late} of {len(tasks)}")


def sanitize_part(machine: Any, results: Results, args: Any) -> None:
    results.add("", "## compute-sanitizer", "")
    try:
        results.add(*(f"- {line}" for line in machine.sanitized()))
    except Exception as error:      # what it finds must not end the run
        results.add(f"- {type(error).__name__}: {error}")
        results.wrong += 1


def tune_part(machine: Any, results: Results, args: Any) -> None:
    from pyattn.kernels.cuda import device, tuning

    results.add("", "## Tuning", "")
    try:
        found = machine.tuned()
    except Exception as error:      # what cannot be measured must not end the run
        results.add(f"- {type(error).__name__}: {error}")
        results.wrong += 1
        return
    results.choices = found.choices
    results.wrong += len(found.wrong)
    current = device.of(machine.asarray(np.zeros(1, np.float32)))
    results.add("```json", *tuning.text(current, found.choices, found.seconds).splitlines(), "```",
                *(f"- wrong: {line}" for line in found.wrong))


def times_part(machine: Any, results: Results, args: Any) -> None:
    from pyattn.kernels.cuda import tuning

    with contextlib.nullcontext() if results.choices is None else tuning.trial(results.choices):
        timed_rows(machine, results, args)


def timed_rows(machine: Any, results: Results, args: Any) -> None:
    results.add("", "## Times", "",
                "TFLOP/s at the median (median and quartiles in milliseconds). A forward counts "
                "4 D operations for each pair, a backward 10 D; causal counts half of all pairs, "
                "a mask whole tiles of 64 x 64.", "")
    contestants: dict[str, Rival] = {
        f"pyattn {backend}": functools.partial(ours, backend)
        for backend in dispatch.PREFERENCE[machine.library] if backend != "array_api"}
    contestants |= machine.rivals(args.triton_tutorial)
    results.add(f"| pass | row | {' | '.join(contestants)} |",
                "|---|---|" + "---|" * len(contestants))
    notes: dict[str, None] = {}
    best = dict.fromkeys(((name, way) for name in contestants for way in (False, True)), 0.0)
    for row in machine.rows:
        for backward in (False, True):
            cells = []
            for name, rival in contestants.items():
                cell, rate = timed_cell(machine, results, row, backward, name, rival, notes)
                dense = best[name, backward]
                if row.mask is None:
                    best[name, backward] = max(dense, rate)
                elif rate and dense:
                    cell += f", {rate / dense:.0%} of its best dense"
                cells.append(cell)
            results.add(f"| {'backward' if backward else 'forward'} | {row.name} | "
                        f"{' | '.join(cells)} |")
    results.add("", *(f"- {note}" for note in notes))


def timed_cell(machine: Any, results: Results, row: Row, backward: bool, name: str, rival: Rival,
               notes: dict[str, None]) -> tuple[str, float]:
    """What stands in the table, and TFLOP/s; 0 where there are none."""
    if results.out_of_time():
        notes["out of time: not reached"] = None
        return "out of time", 0.0
    try:
        found = machine.timed(rival(row, backward, machine))
    except (Unsupported, pyattn.BackendError, NotImplementedError) as error:
        notes[f"{name}: {error}"] = None
        return "", 0.0
    except Exception as error:      # a rival that breaks must not end the run
        told = next(iter(str(error).splitlines()), "")
        notes[f"{name}, {row.name}: {type(error).__name__}: {told}"] = None
        results.wrong += name.startswith("pyattn")
        return "error", 0.0
    low, median, high = (np.quantile(found, part) for part in (0.25, 0.5, 0.75))
    rate = row.flops(backward) / median / 1e12
    return (f"{rate:.3g} ({1e3 * median:.3g}, {1e3 * low:.3g} to {1e3 * high:.3g})", float(rate))


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu",
                                     description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=6.0, help="default: %(default)s")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--triton-tutorial", type=Path, metavar="FILE")
    parser.add_argument("--emulated", action="store_true", help="without a GPU, in the emulator")
    parser.add_argument("--small", action="store_true", help="only what a sanitizer watches")
    args = parser.parse_args(given)
    reason = None if args.emulated else on_gpu.unavailable()
    if reason is not None:
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 2
    machine = Emulated() if args.emulated else Gpu()
    if args.small:
        machine.small()
        return 0
    start = time.perf_counter()
    results = Results(start + 60 * args.minutes)
    results.add(f"# pyattn on {machine.name}, {time.strftime('%Y-%m-%d')}", "",
                f"Made by `python -m bench.gpu {' '.join(given)}`.".replace(" `.", "`."))
    for part in args.parts:
        if results.out_of_time():
            results.add("", f"## {part}: not reached in {args.minutes:g} minutes")
            continue
        {"machine": machine_part, "correct": correct_part, "sanitize": sanitize_part,
         "tune": tune_part, "times": times_part,
         "portable": portable_part}[part](machine, results, args)
    results.add("", f"{time.perf_counter() - start:.0f} s in all.")
    word = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    path = args.output or Path(__file__).with_name(f"results-gpu-{word}.md")
    path.write_text("\n".join(results.lines) + "\n")
    print(f"written: {path}")
    return 1 if results.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
