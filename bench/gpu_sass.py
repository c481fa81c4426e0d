"""``python -m bench.gpu_sass [WORD ...]``: the machine code of CUDA kernels. No GPU is needed.

It compiles every configuration that launch code can choose (those whose name has all the words),
for every architecture that it is for, and prints registers, shared memory, what spills, and the
instructions that matter. It takes CuPy, NVRTC, and NVIDIA's cuobjdump and nvdisasm:
``pip install cupy-cuda13x 'nvidia-cuda-nvrtc==13.0.*' nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``.

A kernel is at fault if it has a stack, reads or writes local memory, lacks an instruction that it
was written for, or if the compiler says that it takes wgmma instructions one after another.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pyattn.kernels import disk
from pyattn.kernels.cuda import compile
from pyattn.kernels.cuda.device import Kernel

from pyattn.checks import BackendError

SHOWN = ("HMMA", "HGMMA", "DMMA", "LDSM", "LDGSTS", "UTMALDG", "LDL", "STL")
"""Instructions that tables count."""

SERIALISED = ("C7508", "C7510", "C7512", "C7514", "C7518", "C7520")
"""The compiler's remarks that it cannot run wgmma instructions side by side."""

JOBS = 2

RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)"
                         r".*/\* 0x([0-9a-f]{16}) \*/", re.MULTILINE)

INSTRUCTION_BYTES = 16
OPERATION = 0xFFF
"""The bits of an instruction that say what it does; the others say to what."""

_names = collections.defaultdict(dict)
"""By architecture: the names of operations, as far as the disassembler was asked."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A configuration on one architecture, and what its machine code must have."""

    kernel: object
    architecture: str
    expected: tuple[str, ...]

    def __str__(self):
        macros = " ".join(f"{name}={value}" for name, value in self.kernel.macros)
        return f"{self.kernel.name} {self.architecture} {macros}".strip()


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the machine code of one kernel says."""

    registers: int
    stack: int
    shared: int
    local: int
    instructions: dict[str, int]
    log: str

    def faults(self, expected=()):
        """What is wrong with it, in words."""
        found = []
        if self.stack or self.local:
            found.append(f"a stack of {self.stack} bytes, {self.local} bytes of local memory")
        found += [f"{self.instructions[name]} {name}" for name in ("LDL", "STL")
                  if self.instructions.get(name)]
        found += [f"no {name}" for name in expected if not self.instructions.get(name)]
        found += [f"the compiler's remark {code}" for code in SERIALISED if code in self.log]
        return found


@functools.cache
def cuobjdump():
    """The path of the tool, with its sibling nvdisasm in reach; None where it is not installed."""
    places = [Path(path) / "bin" for package in ("nvidia.cu13", "nvidia.cuda_cuobjdump")
              if importlib.util.find_spec("nvidia") and (found := importlib.util.find_spec(package))
              for path in found.submodule_search_locations or ()]
    known = shutil.which("cuobjdump", path=os.pathsep.join(
        [*map(str, places), os.environ.get("PATH", "")]))
    return Path(known) if known else None


def lacking():
    """What is missing to compile and to read, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        compile.nvrtc_version()
    except BackendError as error:
        return str(error)
    return None if cuobjdump() else "cuobjdump is not installed: pip install nvidia-cuda-cuobjdump"


def dumped(code, *options):
    tool = cuobjdump()
    env = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        done = subprocess.run([tool, *options, path], capture_output=True, text=True, env=env,
                              check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(options)}: {done.stderr or done.stdout}")
    return done.stdout + done.stderr


def operations(code):
    """The operations of a cubin, an ELF file: an array of what stands in its sections of code."""
    sections, = struct.unpack_from("<Q", code, 40)
    size, count, named = struct.unpack_from("<3H", code, 58)
    headers = [struct.unpack_from("<2I4Q2I2Q", code, sections + i * size) for i in range(count)]
    names = headers[named][4]
    return np.concatenate([np.zeros(0, np.uint64)] + [
        np.frombuffer(code, "<u8", header[5] // 8, header[4])[::INSTRUCTION_BYTES // 8]
        for header in headers if code.startswith(b".text.", names + header[0])]) & OPERATION


def instructions(code, architecture):
    """How often each instruction occurs.

    The disassembler takes a large part of a second for a kernel; it is asked where operations are
    met that it has not named before.
    """
    names, met = _names[architecture], operations(code)
    if not names.keys() >= set(met.tolist()):
        told = [(name, int(word, 16) & OPERATION)
                for name, word in INSTRUCTION.findall(dumped(code, "-sass"))]
        if [operation for _, operation in told] != met.tolist():
            raise RuntimeError("the disassembler finds other instructions than are in the code")
        for name, operation in told:
            if names.setdefault(operation, name) != name:
                raise RuntimeError(f"{name} and {names[operation]} are one operation")
    return dict(collections.Counter(names[operation] for operation in met.tolist()))


def read(source, name, macros, architecture):
    """Compile a text and read its machine code; readings are kept, by all that they depend on."""
    options = compile.options_for(macros, architecture)
    parts = (source, repr(options), repr(compile.nvrtc_version()), repr(cuobjdump()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = disk.cache_folder()
    path = folder / "sass" / key if folder else None
    stored = disk.read(path) if path else None
    if stored is not None:
        return Reading(**json.loads(stored))
    code, log = compile.compiled(source, name, options)
    resources = RESOURCES.search(dumped(code, "-res-usage"))
    counted = instructions(code, architecture)
    if resources is None or not counted:
        raise RuntimeError(f"{name}: cuobjdump says nothing that can be read")
    reading = Reading(*map(int, resources.groups()), counted, log)
    if path:
        disk.write(path, json.dumps(dataclasses.asdict(reading)).encode())
    return reading


def usual(kernel):
    """The architectures of a kernel that names none."""
    return ("sm_90a",) if kernel.architecture_specific else ("sm_80", "sm_90")


def subjects():
    """Every configuration that a module of the backend has, on its architectures.

    ``configurations()`` of a module gives kernels, or (kernel, architectures, instructions that
    its machine code must have).
    """
    package = importlib.import_module("pyattn.kernels.cuda")
    found = {}
    for information in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{information.name}")
        if hasattr(module, "configurations"):
            for given in module.configurations():
                kernel, architectures, expected = (
                    (given, usual(given), ()) if isinstance(given, Kernel) else given)
                expected = (expected,) if isinstance(expected, str) else tuple(expected or ())
                for architecture in architectures:
                    subject = Subject(kernel, architecture, expected)
                    found[str(subject)] = subject
    return found


def readings(chosen, jobs=JOBS):
    """(subject, its reading) of each, as they come; what cannot be compiled has an error instead.

    Each process compiles some: NVRTC has a lock.
    """
    # a fork would take along what threads of other libraries hold
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        started = {}
        for subject in chosen:
            kernel = subject.kernel
            started[pool.submit(read, compile.text(kernel.file), kernel.file, kernel.macros,
                                subject.architecture)] = subject
        for done in concurrent.futures.as_completed(started):
            yield started[done], done.exception() or done.result()


def main(words):
    reason = lacking()
    if reason:
        sys.exit(f"cannot compile and read kernels: {reason}")
    started = time.perf_counter()
    chosen = [subject for name, subject in subjects().items()
              if all(word in name for word in words)]
    rows, wrong = [], 0
    for subject, reading in readings(chosen):
        name = str(subject)
        if isinstance(reading, Exception):
            rows.append((name, "", "", "", str(reading).strip().splitlines()[-1]))
            wrong += 1
            continue
        faults = reading.faults(subject.expected)
        wrong += bool(faults)
        counted = " ".join(f"{reading.instructions[known]} {known}" for known in SHOWN
                           if reading.instructions.get(known))
        rows.append((name, reading.registers, reading.shared,
                     f"{counted} of {sum(reading.instructions.values())}", "; ".join(faults)))
    print("| kernel | registers | static shared memory | instructions | faults |")
    print("|---|---|---|---|---|")
    for row in sorted(rows):
        print("| " + " | ".join(map(str, row)) + " |")
    print(f"\n{len(rows)} compiled and read in {time.perf_counter() - started:.0f} s by NVRTC "
          f"{'.'.join(map(str, compile.nvrtc_version()))}; {wrong} at fault")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
