"""From a kernel and what it calls to object code that needs neither Numba nor Python.

Left to itself, Numba optimises every function together with all that it calls and makes machine
code of each, so what a kernel calls three levels down is compiled four times. Here Numba only
translates functions to LLVM's language; they are linked, optimised and compiled once, together.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.codegen import CPUCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from .. import host
from ..compile import ENTRY

MAY_RAISE = "pyattn_kernel_may_raise"
"""Called where a kernel fails; nobody defines it, so a kernel that can fail is refused."""

C_FUNCTIONS = frozenset(
    ["memcpy", "memmove", "memset", "bzero", "__chkstk", "_fltused", "_GLOBAL_OFFSET_TABLE_",
     *(name + suffix for suffix in ("", "f") for name in
       ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "sin", "cos", "tanh",
        "floor", "ceil", "trunc", "rint", "round", "fmod", "fma", "ldexp"))])
"""What every process that runs Python has, from the C library."""


def object_code(kernel: Any, unit: str, operand: str) -> tuple[int, bytes]:
    """Compile `kernel` for its two tags' dtypes; return how many integers it takes, and the code.

    The code has one function, ENTRY, which takes the integers and returns nothing.
    """
    tags = [getattr(types, name) for name in (unit, operand)]
    count = kernel.py_func.__code__.co_argcount - len(tags)
    signature = (types.int64,) * count + tuple(tags)
    with _translating():
        kernel.compile(signature)
        result = kernel.overloads[signature]
        module = llvm.parse_assembly(str(_entry(result.fndesc, count)))
        for library in _all_libraries(result.library, []):
            module.link_in(_module_of(library), preserve=True)
    for function in [*module.functions, *module.global_variables]:
        if not function.is_declaration and function.name != ENTRY:
            function.linkage = "internal"
    machine = host.target_machine()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.slp_vectorization = False
    # micro-kernels are unrolled as they should be; more only takes longer, to compile and to run
    tuning.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    code = machine.emit_object(module)
    _refuse_foreign_symbols(kernel.py_func.__name__, module, code)
    return count, code


class _Library(CPUCodeLibrary):
    """One function in LLVM's language, left as it is."""

    _with_callees = False

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def _get_module_for_linking(self) -> Any:
        """Return it with all that it calls, for functions that Numba compiles in its own way."""
        if not self._with_callees:
            self._with_callees = True
            for library in self._linking_libraries:
                self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        return super()._get_module_for_linking()


class _Codegen(JITCPUCodegen):
    """What Numba asks for libraries."""

    def create_library(self, name: str, **options: Any) -> Any:
        return _Library(self, name, **options)

    def set_env(self, env_name: str, env: Any) -> None:
        """Nothing: only functions that return to Python have an environment."""

    def _get_host_cpu_name(self) -> str:
        return host.target().cpu

    def _get_host_cpu_features(self) -> str:
        return host.target().features


@functools.cache
def _codegen() -> _Codegen:
    return _Codegen("pyattn")


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    """Have Numba, in this thread, stop at LLVM's language."""
    context = cpu_target.target_context
    with global_compiler_lock:
        usual, context._internal_codegen = context._internal_codegen, _codegen()
        try:
            yield
        finally:
            context._internal_codegen = usual


def _entry(function: Any, count: int) -> ir.Module:
    """Make ENTRY, which calls the compiled `function` with its tags."""
    convention = cpu_target.target_context.call_conv
    module = ir.Module(ENTRY)
    module.triple = host.target().triple
    integers = [ir.IntType(64)] * count
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), integers), ENTRY)
    build = ir.IRBuilder(entry.append_basic_block())
    kind = convention.get_function_type(function.restype, function.argtypes)
    callee = ir.Function(module, kind, function.llvm_func_name)
    tags = [ir.Constant(argument.type, 1) for argument in callee.args[-2:]]
    status, _ = convention.call_function(build, callee, function.restype, function.argtypes,
                                         [*entry.args, *tags])
    with build.if_then(status.is_error, likely=False):
        build.call(ir.Function(module, ir.FunctionType(ir.VoidType(), []), MAY_RAISE), [])
    build.ret_void()
    return module


def _all_libraries(library: Any, found: list[Any]) -> list[Any]:
    if library not in found:
        found.append(library)
        for callee in library._linking_libraries:
            _all_libraries(callee, found)
    return found


def _module_of(library: Any) -> Any:
    """Return a function's module, alone if this module had it translated."""
    alone = isinstance(library, _Library)
    return library._final_module if alone else library._get_module_for_linking()


def _refuse_foreign_symbols(kernel: str, module: Any, code: bytes) -> None:
    """LLVM ends the process when code to be loaded needs what it cannot find."""
    names = {function.name for function in module.functions
             if function.is_declaration and not function.name.startswith("llvm.")}
    names = (names | _undefined(code)) - C_FUNCTIONS
    foreign = sorted(names - {MAY_RAISE})
    if foreign:
        raise RuntimeError(f"kernel {kernel} needs {', '.join(foreign)}; kernels may call nothing "
                           "but the C library's functions on numbers and memory")
    if MAY_RAISE in names:
        raise RuntimeError(f"kernel {kernel} can raise an exception; kernels must not")


def _undefined(code: bytes) -> set[str]:
    """List the symbols that ELF object code needs; LLVM adds some while it makes the code."""
    sections = {section.name(): section.data()
                for section in llvm.ObjectFileRef.from_data(code).sections()}
    if not {b".symtab", b".strtab"} <= sections.keys():
        return set()
    strings = sections[b".strtab"]
    return {strings[name:strings.index(b"\0", name)].decode()
            for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", sections[b".symtab"])
            if name and section == 0}
