"""CUDA kernels compiled without a GPU, and their machine code read.

The default run has what takes moments: the compiler's front end, the cache, and the judge itself
on small kernels that are made for it. With ``-m gate`` every configuration that launch code can
choose is compiled for every architecture it is for, by two processes (``python -m bench.gpu_sass``
prints what this reads): it must have no stack, no spills, and the instructions it was written for.
Both take CuPy, NVRTC and cuobjdump, and are skipped with the reason where these are not installed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from pyattn.kernels import disk
from pyattn.kernels.cuda import compile
from pyattn.kernels.cuda.device import Kernel

from bench import gpu_sass
from pyattn.checks import BackendError

ROOT = Path(__file__).resolve().parents[1]

needs_compiler = pytest.mark.skipif(gpu_sass.lacking() is not None, reason=str(gpu_sass.lacking()))

GOOD = '''
extern "C" __global__ void multiply(float* out, const unsigned* a, const unsigned* b) {
    float c[4] = {};
    for (int i = 0; i < ROUNDS; i++)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},"
                     "{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[4 * i]), "r"(a[4 * i + 1]), "r"(a[4 * i + 2]), "r"(a[4 * i + 3]),
                       "r"(b[2 * i]), "r"(b[2 * i + 1]));
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = c[i];
}
'''
PLAIN = '''
extern "C" __global__ void multiply(float* out, const float* a, const float* b) {
    out[threadIdx.x] = a[threadIdx.x] * b[threadIdx.x];
}
'''
SPILLING = '''
extern "C" __global__ void __launch_bounds__(1024) multiply(float* out, const float* a) {
    float held[256];
    #pragma unroll
    for (int i = 0; i < 256; i++) held[i] = a[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 256; i++) out[i * 1024 + threadIdx.x] = held[i] * held[255 - i * 37 % 256];
}
'''
INDEXED = '''
extern "C" __global__ void multiply(float* out, const int* a) {
    float held[64];
    for (int i = 0; i < 64; i++) {
        held[i] = out[i];
        out[i] = 0.0f;
    }
    out[threadIdx.x] = held[a[threadIdx.x] & 63];
}
'''


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(disk.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of sources with one kernel, in place of the package's."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "multiply.cu").write_text(GOOD)
    monkeypatch.setattr(compile, "SOURCES", folder)
    return folder / "multiply.cu"


@pytest.fixture
def compilations(monkeypatch):
    """What was compiled, and not found on disk."""
    found, really = [], compile.compiled

    def counted(source, name, options):
        found.append((name, options))
        return really(source, name, options)

    monkeypatch.setattr(compile, "compiled", counted)
    return found


# cubins


@needs_compiler
def test_code_is_kept_by_all_that_it_depends_on(cache, source, compilations):
    first = compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80")
    assert first.startswith(b"\x7fELF")
    assert compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80") == first
    assert len(compilations) == 1
    compile.cubin("multiply.cu", (("ROUNDS", 3),), "sm_80")
    compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_90")
    source.write_text(GOOD + "// a comment")
    compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80")
    assert len(compilations) == 4
    assert len([file for file in cache.rglob("*") if file.is_file()]) == 4


@needs_compiler
def test_a_header_that_changes_is_noticed(cache, source, compilations):
    header = source.with_name("rounds.cuh")
    source.write_text('#include "rounds.cuh"\n' + GOOD)
    header.write_text("#define ROUNDS 1\n")
    first = compile.cubin("multiply.cu", (), "sm_80")
    header.write_text("#define ROUNDS 4\n")
    assert compile.cubin("multiply.cu", (), "sm_80") != first


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x00" * 200, None])
def test_a_damaged_entry_is_compiled_again(cache, source, compilations, damage):
    first = compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80")
    [file] = [file for file in cache.rglob("*") if file.is_file()]
    file.write_bytes(file.read_bytes()[:-7] if damage is None else damage)
    assert compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80") == first
    assert len(compilations) == 2
    assert compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80") == first
    assert len(compilations) == 2


@needs_compiler
def test_another_compiler_has_entries_of_its_own(cache, source, compilations, monkeypatch):
    compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80")
    monkeypatch.setattr(compile, "nvrtc_version", lambda: (99, 0))
    compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80")
    assert len(compilations) == 2


@needs_compiler
def test_without_a_place_to_write_code_is_compiled_each_time(source, monkeypatch, compilations):
    monkeypatch.setattr(compile, "cache_folder", lambda: None)
    for _ in range(2):
        compile.cubin("multiply.cu", (("ROUNDS", 2),), "sm_80")
    assert len(compilations) == 2


@needs_compiler
def test_several_processes_may_fill_the_cache(cache):
    """They all compile one kernel at once; each gets whole code, and one file stays."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
            "import pyattn; from pathlib import Path\n"
            "from pyattn.kernels.cuda import compile\n"
            f"compile.SOURCES = Path({str(cache.parent)!r})\n"
            "import hashlib\n"
            "print(hashlib.sha256(compile.cubin('one.cu', (), 'sm_80')).hexdigest())")
    (cache.parent / "one.cu").write_text(PLAIN)
    environment = {**os.environ, disk.CACHE_VARIABLE: str(cache)}

    def run(_):
        return subprocess.run([sys.executable, "-c", code], env=environment, check=True, text=True,
                              capture_output=True).stdout

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(run, range(3)))) == 1
    assert len([file for file in cache.rglob("*") if file.is_file()]) == 1


@needs_compiler
def test_errors_name_file_and_line(source):
    source.write_text('#include "part.cuh"\n' + PLAIN)
    source.with_name("part.cuh").write_text("\nint wrong = missing;\n")
    with pytest.raises(BackendError, match=r"cannot compile multiply\.cu .*sm_80(.|\n)*"
                                           r'part\.cuh\(2\): error: identifier "missing"'):
        compile.cubin("multiply.cu", (), "sm_80")


@needs_compiler
@pytest.mark.parametrize(("capability", "specific", "wanted"), [
    ((8, 0), False, "sm_80"), ((8, 6), False, "sm_86"), ((8, 5), False, "sm_80"),
    ((9, 0), False, "sm_90"), ((9, 0), True, "sm_90a")])
def test_the_architecture_of_a_gpu(capability, specific, wanted):
    assert compile.architecture(capability, specific=specific) == wanted


@needs_compiler
def test_a_gpu_that_the_compiler_does_not_know():
    with pytest.raises(BackendError, match=r"no GPU of compute capability 77\.3; install a newer"):
        compile.architecture((77, 3))


def test_macros_that_are_true_are_1():
    options = compile.options_for((("A", True), ("B", "float"), ("C", 3)), "sm_80")
    assert {"-DA=1", "-DB=float", "-DC=3", "-arch=sm_80"} <= set(options)


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    def absent():
        raise RuntimeError("libnvrtc.so.13 is nowhere")

    monkeypatch.setattr(compile, "_nvrtc", absent)
    compile.nvrtc_version.cache_clear()
    with pytest.raises(BackendError, match=r'libnvrtc\.so\.13.*pip install "pyattn\[cuda13\]'):
        compile.nvrtc_version()
    compile.nvrtc_version.cache_clear()


# the judge


@needs_compiler
@pytest.mark.parametrize(("text", "expected", "fault"), [
    (GOOD, ("HMMA",), None), (PLAIN, ("HMMA",), "no HMMA"), (PLAIN, ("FMUL",), None),
    (SPILLING, (), "LDL"), (SPILLING, (), "STL"), (INDEXED, (), "a stack of 256 bytes")])
def test_the_judge_sees_faults(cache, text, expected, fault):
    for architecture in ("sm_80", "sm_90"):
        reading = gpu_sass.read(text, "multiply.cu", (("ROUNDS", 2),), architecture)
        found = "; ".join(reading.faults(expected))
        assert fault in found if fault else found == ""


def test_the_judge_heeds_the_compilers_remarks():
    remark = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
    assert gpu_sass.Reading(1, 0, 0, 0, {}, remark).faults() == ["the compiler's remark C7510"]


@needs_compiler
def test_operations_have_the_names_that_the_disassembler_gave_them(monkeypatch):
    def code(text):
        options = compile.options_for((("ROUNDS", 2),), "sm_80")
        return compile.compiled(text, "multiply.cu", options)[0]

    monkeypatch.setattr(gpu_sass, "_names", collections.defaultdict(dict))
    asked, really = [], gpu_sass.dumped
    monkeypatch.setattr(gpu_sass, "dumped", lambda *given: asked.append(given) or really(*given))
    for text in (GOOD, SPILLING, GOOD):
        told = really(code(text), "-sass")
        found = gpu_sass.instructions(code(text), "sm_80")
        assert found == collections.Counter(re.findall(r"\*/ +(?:@\S+ +)?([A-Z]\w+)", told))
    assert len(asked) == 2      # that it knows all of the third, it knows from the first
    gpu_sass._names["sm_80"].clear()
    gpu_sass._names["sm_80"][int(gpu_sass.operations(code(GOOD))[-1])] = "ANOTHER"
    with pytest.raises(RuntimeError, match="ANOTHER are one operation"):
        gpu_sass.instructions(code(GOOD), "sm_80")


@needs_compiler
def test_readings_are_kept(cache, monkeypatch):
    first = gpu_sass.read(PLAIN, "multiply.cu", (), "sm_80")
    monkeypatch.setattr(gpu_sass, "dumped", None)
    assert gpu_sass.read(PLAIN, "multiply.cu", (), "sm_80") == first


@needs_compiler
def test_the_judge_tells_what_does_not_compile(cache, source):
    source.write_text("this is no C++")
    subject = gpu_sass.Subject(Kernel("multiply.cu", "multiply"), "sm_80", ())
    [(_, error)] = gpu_sass.readings([subject], jobs=1)
    assert isinstance(error, BackendError)


def test_configurations_are_found_in_modules(monkeypatch):
    plain, hopper = Kernel("a.cu", "a"), Kernel("b.cu", "b", architecture_specific=True)
    monkeypatch.setattr(gpu_sass.pkgutil, "iter_modules", lambda path: [
        types.SimpleNamespace(name="compile"), types.SimpleNamespace(name="made")])
    monkeypatch.setitem(sys.modules, "pyattn.kernels.cuda.made", types.SimpleNamespace(
        configurations=lambda: [plain, hopper, (plain, ("sm_86",), "HMMA")]))
    assert list(gpu_sass.subjects().values()) == [
        gpu_sass.Subject(plain, "sm_80", ()), gpu_sass.Subject(plain, "sm_90", ()),
        gpu_sass.Subject(hopper, "sm_90a", ()), gpu_sass.Subject(plain, "sm_86", ("HMMA",))]


# every configuration


@pytest.mark.gate
@needs_compiler
def test_every_configuration():
    found = gpu_sass.subjects()
    assert found, "no module has configurations()"
    wrong = {}
    for subject, reading in gpu_sass.readings(found.values()):
        faults = [str(reading)] if isinstance(reading, Exception) else reading.faults(
            subject.expected)
        if faults:
            wrong[str(subject)] = faults
    assert wrong == {}


@pytest.mark.gate
def test_every_source_with_a_kernel_is_in_some_configuration():
    files = {path.name for path in compile.SOURCES.glob("*.cu")}
    assert {subject.kernel.file for subject in gpu_sass.subjects().values()} == files
