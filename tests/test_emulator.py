"""The emulator itself: primitives do what the hardware's do, and planted bugs are found.

Bugs are planted in probes/planted.cu. Each one has to be found where `wrong` is set, and must not
be where it is not, in any order of threads.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import build
from emulator.device import EmulatedDevice, EmulatorError
from pyattn.kernels.cuda.compile import text
from pyattn.kernels.cuda.device import Kernel

HERE = Path(__file__).parent
PROBES = HERE / "emulator" / "probes"
SOURCES = HERE.parent / "kernels" / "cuda"
SEEDS = (0, 1, 2, 3)

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="a C++ compiler is needed")


def names_of(enum, file):
    """The values of an enumeration in a source."""
    body = re.search(rf"enum {enum} {{(.*?)}}", (PROBES / file).read_text(), re.DOTALL)[1]
    return {name: value for value, name in enumerate(re.findall(r"\w+", body))}


# ---- primitives

PROBE = names_of("Probe", "primitives.cu")
PROBE_ARGUMENTS = np.dtype([("probe", "i4"), ("parameter", "i4"), ("in", "u8"), ("second", "u8"),
                            ("out", "u8")], align=True)


def probe(name, out, given, second=None, *, parameter=0, threads=32, shared=0, seed=0):
    """Run one probe; `out` is written to."""
    device = EmulatedDevice(folders=[PROBES])
    device.seed = seed
    arguments = np.zeros((), PROBE_ARGUMENTS)
    arguments["probe"], arguments["parameter"] = PROBE[name], parameter
    for field, array in (("in", given), ("second", second), ("out", out)):
        arguments[field] = 0 if array is None else device.address(array)
    device.launch(Kernel("primitives.cu", "primitives", (), threads), 1, arguments, shared)
    return device.statistics


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), [("MMA_F16", np.float16),
                                             ("MMA_BF16", ml_dtypes.bfloat16)])
def test_mma_of_16_bits(rng, name, dtype):
    a, b = (rng.integers(-8, 9, shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    c = rng.integers(-99, 99, (16, 8)).astype(np.float32)
    out = c.copy()
    counts = probe(name, out, a, b)
    np.testing.assert_array_equal(out, c + a.astype(np.float64) @ b.astype(np.float64))
    assert counts["mma"] == 1


@needs_compiler
def test_mma_of_16_bits_rounds_once(rng):
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    out = np.zeros((16, 8), np.float32)
    probe("MMA_F16", out, a, b)
    np.testing.assert_allclose(out, a.astype(np.float64) @ b.astype(np.float64), atol=4e-6)


@needs_compiler
def test_mma_tf32_does_not_look_at_low_bits(rng):
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    noisy = [(x.view(np.uint32) | rng.integers(0, 2**13, x.shape, dtype=np.uint32)) for x in (a, b)]
    c = rng.integers(-99, 99, (16, 8)).astype(np.float32)
    out = c.copy()
    probe("MMA_TF32", out, *noisy)
    np.testing.assert_array_equal(out, c + a.astype(np.float64) @ b.astype(np.float64))


@needs_compiler
def test_mma_f64(rng):
    a, b, c = (rng.standard_normal(shape) for shape in ((8, 4), (4, 8), (8, 8)))
    out = c.copy()
    probe("MMA_F64", out, a, b)
    np.testing.assert_allclose(out, c + a @ b, rtol=0, atol=1e-14)


@needs_compiler
def test_nan_and_infinity_in_mma():
    a, b = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16)
    a[3, 2], b[2, 5], b[2, 6] = np.inf, 1, 0
    a[4, 2] = np.nan
    out = np.zeros((16, 8), np.float32)
    probe("MMA_F16", out, a, b)
    with np.errstate(invalid="ignore"):
        wanted = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_array_equal(out, wanted)


@needs_compiler
@pytest.mark.parametrize("seed", SEEDS)
def test_tiles_by_copies_swizzle_and_ldmatrix(rng, seed):
    a, b = (rng.integers(-8, 9, shape).astype(np.float16) for shape in ((32, 64), (64, 16)))
    out = np.zeros((32, 16), np.float32)
    counts = probe("MATRICES_F16", out, a, b, threads=64, shared=96 * 128, seed=seed)
    np.testing.assert_array_equal(out, a.astype(np.float64) @ b.astype(np.float64))
    assert (counts["mma"], counts["matrix_loads"], counts["matrix_conflicts"]) == (16, 16, 0)
    assert (counts["copies"], counts["barriers"]) == (768, 1)


@needs_compiler
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(rng, transposed):
    rows = rng.integers(0, 2**16, (32, 8)).astype(np.uint16)
    out = np.zeros((32, 4), np.uint32)
    probe("LOAD_MATRIX_TRANSPOSED" if transposed else "LOAD_MATRIX", out, rows, shared=512)
    matrices = rows.reshape(4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    # eight rows of four pairs: lane 4 * row + pair
    wanted = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32).T
    np.testing.assert_array_equal(out, wanted)


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("parameter", [1, 2, 16, 31])
def test_shuffles(rng, dtype, parameter):
    given = rng.standard_normal(32).astype(dtype)
    out = np.zeros((4, 32), dtype)
    probe("SHUFFLES" if dtype == np.float32 else "SHUFFLES_F64", out, given, parameter=parameter)
    lanes = np.arange(32)
    down, up = lanes + parameter, lanes - parameter
    sources = [lanes ^ parameter, np.full(32, parameter), np.where(down < 32, down, lanes),
               np.where(up >= 0, up, lanes)]
    np.testing.assert_array_equal(out, given[np.array(sources)])


@needs_compiler
@pytest.mark.parametrize("count", [0, 5, 32])
def test_votes(count):
    given = np.where(np.arange(32) < count, 3, 0).astype(np.int32)
    out = np.zeros((3, 32), np.uint32)
    probe("VOTES", out, given)
    assert set(out[0]) == {2**count - 1}
    assert set(out[1]) == {int(count > 0)}
    assert set(out[2]) == {int(count == 32)}


@needs_compiler
@pytest.mark.parametrize("seed", SEEDS)
def test_votes_of_blocks(seed):
    given = np.zeros((4, 64), np.int32)
    given[1, 63] = given[2, 0] = given[2, 40] = -5
    out = np.full((4, 64), 7, np.int32)
    probe("BLOCK_VOTES", out, given, threads=64, seed=seed)
    np.testing.assert_array_equal(out, np.broadcast_to([[0], [1], [1], [0]], (4, 64)))


@needs_compiler
def test_copies(rng):
    given = rng.integers(1, 2**32, 224, dtype=np.uint32)
    out = np.zeros(224, np.uint32)
    probe("COPIES", out, given, shared=896)
    wanted = given.copy()
    for first, words in ((0, 1), (32, 2), (96, 4)):
        wanted[first:first + 32 * words].reshape(32, words)[2::3] = 0
    wanted[:32] = wanted[31::-1]
    np.testing.assert_array_equal(out, wanted)


@needs_compiler
def test_types_in_shared_memory(rng):
    given = rng.integers(0, 256, 512, dtype=np.uint8)
    out = np.zeros((9, 512), np.uint8)
    probe("SHARED_TYPES", out, given, shared=512)
    for passed, nbytes in zip(out, (2, 4, 4, 8, 8, 8, 8, 16, 16), strict=True):
        np.testing.assert_array_equal(passed[:32 * nbytes], given[:32 * nbytes])


EDGES = np.array([0, -0.0, 1, -1, 65504, 65519, 65520, 1e5, 6e-8, 3e-8, 2.9e-8, 1e-40, 3.3961776e38,
                  1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, np.inf, -np.inf, np.nan],
                 np.float32)


@needs_compiler
def test_formats(rng):
    given = np.concatenate([EDGES, rng.standard_normal(44).astype(np.float32)])
    out = np.zeros((5, given.size), np.uint32)
    probe("FORMATS", out, given, parameter=given.size)
    with np.errstate(over="ignore"):
        halves = given.astype(np.float16)
    finite = ~np.isnan(given)
    for packed, unpacked, rounded in ((out[0], out[2], halves),
                                      (out[1], out[3], given.astype(ml_dtypes.bfloat16))):
        bits = rounded.view(np.uint16).astype(np.uint32)
        bits[~finite] = 0x7FFF
        np.testing.assert_array_equal(packed, bits | np.roll(bits, -1) << 16)
        np.testing.assert_array_equal(unpacked.view(np.float32)[finite],
                                      rounded.astype(np.float32)[finite])
        assert np.isnan(unpacked.view(np.float32)[~finite]).all()
    tf32 = out[4].view(np.float32)
    assert not (out[4][finite] & 0x1FFF).any()
    assert np.isnan(tf32[~finite]).all()
    normal = finite & (abs(given) >= 2.0**-126) & np.isfinite(tf32)
    np.testing.assert_allclose(tf32[normal], given[normal], rtol=2.0**-11)
    ties = np.array([1 + 2**-11, -1 - 3 * 2**-11], np.float32)
    out = np.zeros((5, 2), np.uint32)
    probe("FORMATS", out, ties, parameter=2)
    np.testing.assert_array_equal(out[4].view(np.float32), [1 + 2**-10, -1 - 2**-9])


@needs_compiler
def test_approximations(rng):
    given = np.concatenate([[0, 1e-40, -1e-40, np.inf, -np.inf, 3e38, -140, 2, 1],
                            rng.uniform(0.01, 20, 55)]).astype(np.float32)
    out = np.zeros((3, given.size), np.float32)
    probe("APPROXIMATIONS", out, given, parameter=given.size)
    flushed = np.where(abs(given) < 2.0**-126, np.copysign(0, given), given).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = np.stack([np.exp2(flushed), np.log2(flushed), 1 / flushed])
        wanted = wanted.astype(np.float32)
    wanted[abs(wanted) < 2.0**-126] *= 0
    np.testing.assert_allclose(out, wanted, rtol=3e-7)


@needs_compiler
def test_integers(rng):
    x, y = (rng.integers(0, 2**64, 32, dtype=np.uint64) for _ in range(2))
    x[:3] = 0, 1, 2**63
    out = np.zeros((9, 32), np.uint64)
    probe("INTEGERS", out, x, y)
    mask = 2**32 - 1
    for i, (p, q) in enumerate(zip(map(int, x), map(int, y), strict=True)):
        low = p & mask
        wanted = [low.bit_count(), p.bit_count(), (low & -low).bit_length(), (p & -p).bit_length(),
                  low * (q & mask) >> 32, 32 - low.bit_length(), int(f"{low:032b}"[::-1], 2),
                  min(p, q), max(p, q)]
        assert [int(value) for value in out[:, i]] == wanted


@needs_compiler
@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers(seed):
    out = np.zeros((4, 64), np.uint32)
    probe("NAMED_BARRIERS", out, None, threads=128, shared=256, seed=seed)
    np.testing.assert_array_equal(out, np.arange(4)[:, None] * 100 + np.arange(63, -1, -1))


# ---- planted bugs

BUG = names_of("Bug", "planted.cu")
PLANTED_ARGUMENTS = np.dtype([("bug", "i4"), ("wrong", "i4"), ("in", "u8"), ("out", "u8")],
                             align=True)
PLANTED = Kernel("planted.cu", "planted", (), 128)
SHARED = 20480

# what the report says
FOUND = {
    "MISSING_BARRIER": r"race: thread \d+ (reads|writes) shared bytes .*probes/planted.cu:\d+",
    "WRITE_AFTER_READ": r"race: thread \d+ .*, with nothing that orders the two",
    "MISSING_SYNCWARP": r"race: thread \d+ .*, with nothing that orders the two",
    "HALVES": r"race: thread \d+ writes shared bytes \d+ to \d+ .*, which thread \d+ wrote",
    "WEAK_WAIT": r"race: thread \d+ reads .*a copy of thread \d+ is still under way",
    "NO_WAIT": r"race: thread (\d+) reads .*a copy of thread \1 is still under way",
    "COPY_INTO_READ": r"race: thread \d+ (copies to|reads) .*, with nothing that orders the two",
    "NO_SWIZZLE": r"112 bank conflicts \(matrix_conflicts\), 0 are allowed",
    "STRIDED_ACCESS": r"56 bank conflicts \(access_conflicts\), 0 are allowed",
    "ARRIVAL_COUNT": r"deadlock: threads 0-63 wait at barrier 1 \(.*cu:\d+, 64 of 96 have come\)",
    "TOO_MANY_COME": r"deadlock: threads [-\d]+ wait at barrier 2 \(.*cu:\d+, 32 of 64 have come\)",
    "HALF_A_WARP": r"deadlock: threads 0-15 wait at barrier_sync \(.*cu:\d+, 16 of 32 have come\)",
    "CONSUMER_DOES_NOT_WAIT": r"race: thread \d+ ",
    "DIVERGENT_BARRIER": r"divergent barrier: ",
    "BARRIERS_OF_BRANCHES": r"divergent barrier: __syncthreads, while \d+ threads wait at that of",
    "DIFFERENT_COLLECTIVES": r"divergent collective: __shfl\w+, while thread \d+ waits at __shfl",
    "COLLECTIVE_OF_SOME": r"deadlock: threads 0-4, 6-31 wait at __shfl_xor_sync .*31 of 32 have",
    "SHARED_OUT_OF_BOUNDS": r"out of bounds: 4 bytes at shared base \+ 20480, .*thread 127",
    "SHARED_MISALIGNED": r"misaligned: shared address base \+ \d+ is no multiple of 16",
    "GLOBAL_OUT_OF_BOUNDS": r"out of bounds: global memory 0 bytes past the end of array 'in' "
                            r"\(thread 127 planted.cu:\d+",
    "GLOBAL_BEFORE_START": r"out of bounds: ",
    "COPY_OUT_OF_BOUNDS": r"out of bounds: a copy of 16 bytes of global memory that no array has",
    "COPY_MISALIGNED": r"misaligned: the global address of a copy is no multiple of 16",
    "READ_ONLY": r"read-only: a write to array 'in' \(thread \d+ planted.cu:\d+",
    "UNINITIALISED": r"uninitialised: thread \d+ reads shared bytes \d+ to \d+",
    "LIVELOCK": r"livelock: \d+ accesses to shared memory .*thread 0, .*planted.cu:\d+",
    "RUNAWAY": r"livelock: thread \d+ runs and runs .* planted.cu:\d+",
}

# what is not found by default, or has to be taken away lest another judge finds it first
SETTINGS = {
    "MISSING_BARRIER": {"uninitialised": True},
    "MISSING_SYNCWARP": {"uninitialised": True},
    "CONSUMER_DOES_NOT_WAIT": {"uninitialised": True},
    "STRIDED_ACCESS": {"access_conflicts": 0},
    "GLOBAL_BEFORE_START": {"guard": "start"},
    "LIVELOCK": {"races": False, "step_limit": 1_000_000},
    "RUNAWAY": {"time_limit": 1},
}


def planted(name, wrong, *, seed=0, blocks=1, **settings):
    """What a kernel of planted.cu writes."""
    device = EmulatedDevice(folders=[PROBES])
    device.seed = seed
    for key, value in (SETTINGS.get(name, {}) | settings).items():
        setattr(device, key, value)
    given = np.arange(512, dtype=np.float32)
    given.flags.writeable = False
    out = np.zeros(128, np.float32)
    arguments = np.zeros((), PLANTED_ARGUMENTS)
    arguments["bug"], arguments["wrong"] = BUG[name], wrong
    arguments["in"], arguments["out"] = device.address(given), device.address(out)
    device.launch(PLANTED, blocks, arguments, SHARED)
    return out


def test_each_bug_has_a_report():
    assert set(FOUND) == set(BUG) - {"BLOCK_ORDER"}


@needs_compiler
@pytest.mark.parametrize("name", FOUND)
def test_planted_bug_is_found(name):
    for seed in SEEDS if name != "RUNAWAY" else (0,):
        with pytest.raises(EmulatorError, match=FOUND[name]) as caught:
            planted(name, True, seed=seed)
        assert str(caught.value).startswith("planted")


@needs_compiler
@pytest.mark.parametrize("name", FOUND)
def test_without_the_bug_nothing_is_found(name):
    outs = [planted(name, False, seed=seed) for seed in SEEDS]
    for out in outs:
        np.testing.assert_array_equal(out, outs[0])
    assert np.isfinite(outs[0]).all()


@needs_compiler
def test_what_tests_would_see_without_the_detector():
    """Poison shows some bugs in numbers as well: a copy that has not come, memory unwritten."""
    quiet = {"races": False, "uninitialised": True}
    assert np.isnan(planted("WEAK_WAIT", True, **quiet)).all()
    assert np.isnan(planted("UNINITIALISED", True, **quiet)).all()
    # and others not: that is what the detector is for
    np.testing.assert_array_equal(planted("WRITE_AFTER_READ", True, **quiet),
                                  planted("WRITE_AFTER_READ", False))


@needs_compiler
def test_dependence_on_the_order_of_blocks():
    wrong = {tuple(planted("BLOCK_ORDER", True, seed=seed, blocks=5)) for seed in SEEDS}
    right = {tuple(planted("BLOCK_ORDER", False, seed=seed, blocks=5)) for seed in SEEDS}
    assert len(wrong) > 1
    assert len(right) == 1


@needs_compiler
def test_a_write_just_before_an_array_is_seen_in_its_padding():
    """The page before is forbidden only where the array is at the start of its own."""
    with pytest.raises(EmulatorError, match="a write beside array 'out'"):
        planted("GLOBAL_BEFORE_START", True, guard="end")


def test_arguments_of_another_size():
    if build.compiler() is None:
        pytest.skip("a C++ compiler is needed")
    device = EmulatedDevice(folders=[PROBES])
    with pytest.raises(EmulatorError, match="takes arguments of 24 bytes, the launch gives 16"):
        device.launch(PLANTED, 1, np.zeros(2, np.int64).view("V16"), SHARED)


@needs_compiler
def test_an_address_that_nobody_gave():
    device = EmulatedDevice(folders=[PROBES])
    arguments = np.zeros((), PLANTED_ARGUMENTS)
    arguments["out"] = np.zeros(128).ctypes.data
    with pytest.raises(EmulatorError, match="at byte 16 of the arguments is not of an array"):
        device.launch(PLANTED, 1, arguments, SHARED)


@needs_compiler
def test_more_shared_memory_than_there_is():
    device = EmulatedDevice(folders=[PROBES])
    with pytest.raises(EmulatorError, match="a block may have 232448"):
        device.launch(PLANTED, 1, np.zeros((), PLANTED_ARGUMENTS), 2**18)


KERNEL = """#include "primitives.cuh"
struct Arguments { float* out; };
extern "C" __global__ void own(const __grid_constant__ Arguments arguments) {
    %s
}
"""


def run_own(folder, body, **options):
    (folder / "own.cu").write_text(KERNEL % body)
    device = EmulatedDevice(folders=[folder], **options)
    out = np.zeros(32, np.float32)
    arguments = np.zeros((), np.dtype([("out", "u8")]))
    arguments["out"] = device.address(out)
    device.launch(Kernel("own.cu", "own", (), 32), 1, arguments, 0)
    return out


@needs_compiler
def test_stack_overflow(tmp_path):
    with pytest.raises(EmulatorError, match=r"stack overflow \(thread 0"):
        run_own(tmp_path, "volatile float large[1 << 17]; large[threadIdx.x] = 1;"
                          "arguments.out[threadIdx.x] = large[threadIdx.x];")


@needs_compiler
def test_a_source_that_does_not_compile(tmp_path):
    with pytest.raises(RuntimeError, match=r"own\.cu:4:.*error"):
        run_own(tmp_path, "no_such_function();")


@needs_compiler
@pytest.mark.slow
def test_fibers_of_the_c_library(tmp_path):
    """For machines other than x86-64: slower, to the same end."""
    body = ("arguments.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, float(threadIdx.x), 3);"
            "__syncthreads(); if (threadIdx.x == 7) { barrier_sync(1, 32); }")
    with pytest.raises(EmulatorError, match="deadlock: threads 7 wait at barrier_sync"):
        run_own(tmp_path, body, flags=["-DEMULATOR_UCONTEXT"])
    out = run_own(tmp_path, body.split("if")[0], flags=["-DEMULATOR_UCONTEXT"])
    np.testing.assert_array_equal(out, np.arange(32) ^ 3)


SANITIZED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from test_emulator import run_own, build
run_own(Path({folder!r}), "arguments.out[threadIdx.x + {beyond}] = 1;", flags=build.SANITIZE)
print("done")
"""


@needs_compiler
def test_address_sanitizer(tmp_path):
    """It knows the lines of what touches memory next to an array, in a build of its own."""
    library = subprocess.run([build.compiler(), "-print-file-name=libasan.so"], check=True,
                             capture_output=True, text=True).stdout.strip()
    if not Path(library).is_file():
        pytest.skip("the compiler has no address sanitizer")

    def run(beyond):
        code = SANITIZED.format(tests=str(HERE), root=str(HERE.parent), folder=str(tmp_path),
                                beyond=beyond)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              check=False, env={"LD_PRELOAD": library, "PATH": "/usr/bin:/bin",
                                                "HOME": str(Path.home()),
                                                "ASAN_OPTIONS": "detect_leaks=0"})

    assert run(0).stdout == "done\n"
    assert "own.cu:4" in run(1).stderr


# ---- the sources

SOURCE_FILES = [path.name for path in sorted(SOURCES.glob("*.cu*"))]
PRIMITIVES = {"primitives.cuh", "hopper.cuh"}
FOR_PRIMITIVES_ONLY = {
    r"\basm\b": "PTX",
    r"__shared__": "shared memory that the emulator does not see",
    r"__cvta": "pointers to shared memory",
}
FORBIDDEN = {
    r"#\s*include\s*<": "a header of CUDA or of the C library",
    r"\batomic\w*\s*\(|\bred\.|\batom\.": "atomic operations: results depend on their order",
    r"__CUDACC__|__CUDA_ARCH__|EMULATOR|emulator::": "text that is not the same for all compilers",
    r"\bprintf\s*\(|\bassert\s*\(|\bmalloc\s*\(|\bnew\s": "what a kernel should not need",
}


def offences(source, file):
    """What a source has and may not have, as (line, what)."""
    rules = FORBIDDEN if file in PRIMITIVES else FORBIDDEN | FOR_PRIMITIVES_ONLY
    return [(number, what) for number, line in enumerate(source.splitlines(), start=1)
            for rule, what in rules.items() if re.search(rule, line.partition("//")[0])]


@pytest.mark.parametrize("file", SOURCE_FILES)
def test_sources_keep_to_the_primitives(file):
    assert offences((SOURCES / file).read_text(), file) == []


@pytest.mark.parametrize("line", [
    'asm volatile("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));', "__shared__ float tile[64];",
    "#include <cuda_fp16.h>", "atomicAdd(out, x);", "#ifdef __CUDACC__", "assert(n > 0);"])
def test_the_rules_are_rules(line):
    assert len(offences(f"// asm\n{line}\n", "tile.cuh")) == 1


def test_headers_are_put_in_once(tmp_path):
    (tmp_path / "kernel.cu").write_text('#include "one.cuh"\n#include "two.cuh"\nkernel\n')
    (tmp_path / "one.cuh").write_text('#pragma once\n#include "two.cuh"\none\n')
    (tmp_path / "two.cuh").write_text("#pragma once\n#include <cmath>\ntwo\n")
    folder = tmp_path.name
    assert text("kernel.cu", [tmp_path]).splitlines() == [
        f'#line 1 "{folder}/kernel.cu"', f'#line 1 "{folder}/one.cuh"', "",
        f'#line 1 "{folder}/two.cuh"', "", "#include <cmath>", "two",
        f'#line 3 "{folder}/one.cuh"', "one", f'#line 2 "{folder}/kernel.cu"', "", "kernel"]


def test_an_include_that_is_nowhere(tmp_path):
    (tmp_path / "kernel.cu").write_text('\n#include "none.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"none\.cuh, which .*kernel\.cu:2 includes, is in"):
        text("kernel.cu", [tmp_path])


@pytest.mark.parametrize("file", ["primitives.cu", "planted.cu"])
def test_probes_compile_for_a_gpu(file):
    """The same text, with the primitives' PTX."""
    pytest.importorskip("cupy", reason="CuPy brings the binding of NVRTC")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:     # of a private type
        pytest.skip(f"NVRTC is not installed: {error}")
    program = nvrtc.createProgram(text(file, [PROBES]), file, (), ())
    try:
        nvrtc.compileProgram(program, ("-std=c++17", "-arch=sm_80", "-ftz=true",
                                       "--device-as-default-execution-space"))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert len(nvrtc.getCUBIN(program)) > 1000
