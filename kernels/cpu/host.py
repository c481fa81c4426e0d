"""The CPU that kernels are compiled for, as LLVM knows it. Nothing here imports Numba.

NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose another one, as they do for Numba itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from typing import Any, NamedTuple

import llvmlite.binding as llvm


class Target(NamedTuple):
    """What LLVM has to be told: "x86_64-unknown-linux-gnu", "znver5", "+avx2,-amx-tile,..."."""

    triple: str
    cpu: str
    features: str


@functools.cache
def target() -> Target:
    """Return the CPU that kernels are compiled for."""
    cpu = os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if (cpu or "").lower() == "generic" else _host_features()
    return Target(llvm.get_process_triple(), cpu or llvm.get_host_cpu_name(), features)


def _host_features() -> str:
    try:
        return llvm.get_host_cpu_features().flatten()
    except RuntimeError:
        return ""


@functools.cache
def _has(feature: str) -> bool:
    return f"+{feature}" in target().features.split(",")


def vector_bytes() -> int:
    """Return the width of a vector."""
    return 64 if _has("avx512f") else 32 if _has("avx2") else 16


def registers(nbytes: int) -> int:
    """Return how many vector registers there are of that width."""
    return 32 if nbytes == 64 or target().triple.startswith(("aarch64", "arm64")) else 16


def dot_product() -> str | None:
    """Return how bfloat16 is multiplied: "amx", "avx512bf16", or None where nothing does that."""
    if _has("amx-bf16") and _has("amx-tile") and grant_tiles():
        return "amx"
    return "avx512bf16" if _has("avx512bf16") else None


ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


@functools.cache
def grant_tiles() -> bool:
    """Ask Linux to let this process, and all its threads to come, use AMX tiles."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    request = (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return ctypes.CDLL(None).syscall(*map(ctypes.c_long, request)) == 0


def target_machine() -> Any:
    """Make LLVM's compiler for the CPU, set up for code that is loaded into this process."""
    _start_llvm()
    triple, cpu, features = target()
    # on x86 code is loaded where it stays; it needs no detour to find its data
    reloc = "static" if triple.startswith(("x86", "i686")) else "default"
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True)


@functools.cache
def _start_llvm() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
