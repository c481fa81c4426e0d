"""Arrays that any program wrote to a file, and their check. Files are not trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pyattn import arrays
from pyattn.checks import OptionError, require_integer, require_real

from .cases import Inputs
from .check import answers, judge
from .compare import plain_dtype
from .report import FAILED, OK, CaseResult, Report

INPUTS = ("q", "k", "v", "dout", "dlse", "bias", "gate", "mask", "keep", "sinks", "alibi_slopes")
RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias", "dgate", "dscale", "dsinks", "dalibi_slopes")
OPTIONS = ("causal", "window", "scale", "softcap", "q_lengths", "kv_lengths", "segments", "dropout",
           "layout", "dtype", "out_dtype", "grad_dtype")
MAX_BYTES = 2 ** 32
"""Most bytes that the arrays of one file may hold."""
MAX_SCORES = 2 ** 25
"""Most pairs of query and key of one head: the check is dense, in float64."""
MAX_HEADS, MAX_WIDTH, MAX_TOTAL = 2 ** 16, 2 ** 14, 2 ** 33
"""Most heads in all, widest head, most pairs in all."""
_MAX_TEXT = 2 ** 20
_TOKENS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")


class DumpError(ValueError):
    """A file that cannot be read as a dump, or that says something that makes no sense."""


@dataclasses.dataclass(frozen=True)
class Dump:
    """The arrays and options of a file."""

    arrays: dict[str, np.ndarray]
    options: dict[str, Any]


def write_dump(path: str | Path, **entries: Any) -> None:
    """Write arrays and options in the format that ``python -m pyattn check`` reads.

    Parameters
    ----------
    path : path
        Ends in ``.npz`` or ``.safetensors``.
    **entries
        Arrays (any library): q, k, v; out, lse; dout, dlse; dq, dk, dv and further gradients;
        bias, gate, mask, keep, sinks, alibi_slopes. Options: causal, window, scale, softcap,
        q_lengths, kv_lengths, segments, dropout, layout.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from pyattn import testing
    >>> q = k = v = np.eye(3)[None]
    >>> path = os.path.join(tempfile.mkdtemp(), "dump.npz")
    >>> testing.write_dump(path, q=q, k=k, v=v, out=v, causal=True)
    >>> testing.check_dump(path).passed
    False
    """
    path = Path(path)
    unknown = sorted(set(entries) - {*INPUTS, *RESULTS, *OPTIONS})
    if unknown:
        raise OptionError(f"a dump holds {', '.join((*INPUTS, *RESULTS, *OPTIONS))}; got "
                          f"{', '.join(unknown)}")
    held = {name: np.ascontiguousarray(arrays.to_host(x)) for name, x in entries.items()
            if x is not None and (name in INPUTS + RESULTS or (name == "scale" and np.ndim(x)))}
    options = {name: _plain_value(x) for name, x in entries.items()
               if name in OPTIONS and name not in held and x is not None}
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(held, path, metadata={"options": json.dumps(options)})
    elif path.suffix == ".npz":
        # NumPy would write bfloat16 as bytes without a meaning
        bits: dict[str, Any] = {
            name: x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
            for name, x in held.items()}
        if any(x.dtype == ml_dtypes.bfloat16 for x in held.values()):
            options["dtype"] = "bfloat16"
        np.savez(path, options=np.array(json.dumps(options)), **bits)
    else:
        raise OptionError(f"path must end in .npz or .safetensors; got {str(path)!r}")


def _plain_value(x: Any) -> Any:
    if hasattr(x, "tolist"):
        return x.tolist()
    if isinstance(x, tuple | list):
        return [_plain_value(item) for item in x]
    return x


def read_dump(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Dump:
    """Read a file of untrusted origin; nothing in it is executed or unpickled.

    Parameters
    ----------
    path : path
        A ``.npz`` or ``.safetensors`` file; which of the two is seen from its first bytes.
    max_bytes : int
        Refuse a file whose arrays claim to hold more.

    Raises
    ------
    DumpError
        It is neither, is damaged, holds objects or unknown names, or claims too much.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from pyattn import testing
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "dump.npz")
    ...     _ = path.write_bytes(b"not a zip file")
    ...     testing.read_dump(path)     # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pyattn.testing.dump.DumpError: ...
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic == b"PK\x03\x04":
                held = _read_npz(file, max_bytes)
            else:
                held = _read_safetensors(file, path, max_bytes)
    except DumpError:
        raise
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:      # damaged files make the readers fail in many ways
        raise DumpError(f"{path} is damaged: {_first_line(error)}") from error
    return _sorted_out(*held)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _read_npz(file: BinaryIO, max_bytes: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    found: dict[str, np.ndarray] = {}
    total = 0
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise DumpError(f"the file holds {_shown(name)} twice")
            if name not in {*INPUTS, *RESULTS, *OPTIONS, "options"}:
                raise _unknown(name)
            # the header alone first: it may claim any shape
            with archive.open(info) as member:
                shape, dtype, start = _npy_header(name, member)
            size = math.prod(shape) * dtype.itemsize
            total += size
            if total > max_bytes:
                raise DumpError(f"the arrays up to {name}, {list(shape)}, claim {total} bytes, "
                                f"over the limit of {max_bytes}")
            if start + size != info.file_size:
                raise DumpError(f"{name} claims shape {list(shape)} of {dtype}, {size} bytes, but "
                                f"holds {info.file_size - start}")
            with archive.open(info) as member:
                found[name] = np.lib.format.read_array(member, allow_pickle=False)
    text = found.pop("options", None)
    options = {} if text is None else _parsed(_text(text))
    for name in OPTIONS:
        if name in found and not (name == "scale" and found[name].ndim):
            x = found.pop(name)
            options[name] = _text(x) if x.dtype.kind in "US" else x.tolist()
    return found, options


def _npy_header(name: str, member: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise DumpError(f"{name} has .npy format {version}; 1.0 and 2.0 are read")
    read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
            else np.lib.format.read_array_header_2_0)
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise DumpError(f"{name} holds Python objects, which are never loaded")
    if dtype.names or dtype.subdtype:
        raise DumpError(f"{name} holds records ({dtype}); plain numbers are needed")
    if any(s < 0 for s in shape):
        raise DumpError(f"{name} claims the shape {list(shape)}")
    return shape, dtype, member.tell()


def _read_safetensors(file: BinaryIO, path: Path,
                      max_bytes: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or file.read(1) != b"{":
        raise DumpError(f"{path} is neither an .npz nor a .safetensors file")
    if length > size - 8:
        raise DumpError(f"{path} is damaged: its header claims {length} bytes, the file has {size}")
    if size > max_bytes:
        raise DumpError(f"{path} has {size} bytes, over the limit of {max_bytes}")
    from safetensors import safe_open

    with safe_open(path, "numpy") as opened:
        metadata = opened.metadata() or {}
        names = list(opened.keys())
        for name in names:
            if name not in INPUTS + RESULTS + ("scale",):
                raise _unknown(name)
        found = {name: opened.get_tensor(name) for name in names}
    options = _parsed(metadata["options"]) if "options" in metadata else {}
    return found, options


def _unknown(name: str) -> DumpError:
    return DumpError(f"{_shown(name)} is not a name of a dump; arrays are "
                     f"{', '.join(INPUTS + RESULTS)}, options {', '.join(OPTIONS)}")


def _shown(name: str) -> str:
    return repr(name if len(name) < 60 else name[:57] + "...")


def _text(x: np.ndarray) -> str:
    if x.dtype.kind in "bu" and x.ndim == 1:        # the bytes of a JSON text
        x = np.array(x.astype(np.uint8).tobytes())
    if x.ndim or x.dtype.kind not in "US" or x.nbytes > _MAX_TEXT:
        raise DumpError("options must be one string of JSON, or its bytes")
    value = x.item()
    return value.decode() if isinstance(value, bytes) else value


def _parsed(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise DumpError(f"options must hold finite numbers; got {constant}")

    if len(text) > _MAX_TEXT:
        raise DumpError(f"options hold {len(text)} characters; {_MAX_TEXT} are allowed")
    try:
        options = json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DumpError(f"options are not JSON: {_first_line(error)}") from error
    if not isinstance(options, dict):
        raise DumpError(f"options must be a JSON object; got {_shown(text)}")
    for name in options:
        if name not in OPTIONS:
            raise DumpError(f"{_shown(name)} is not an option of a dump; options are "
                            f"{', '.join(OPTIONS)}")
    return {name: value for name, value in options.items() if value is not None}


def _sorted_out(found: dict[str, np.ndarray], options: dict[str, Any]) -> Dump:
    """Give every array its dtype and its layout, and every option its type."""
    options = {name: _CHECKS[name](name, value) for name, value in options.items()}
    declared = options.pop("dtype", None)
    layout = options.pop("layout", "bhnd")
    held = {}
    for name, x in found.items():
        if x.dtype.itemsize == 2 and (x.dtype.kind == "V"
                                      or (x.dtype == np.uint16 and declared == "bfloat16")):
            x = x.view(ml_dtypes.bfloat16)
        if name in ("mask", "keep"):
            if x.dtype.kind not in "bu" or (x.dtype.kind == "u" and (x > 1).any()):
                raise DumpError(f"{name} must be boolean; got {x.dtype}")
            x = x.astype(bool)
        elif x.dtype.name not in arrays.FLOATS:
            raise DumpError(f"{name} must be one of {', '.join(arrays.FLOATS)}; got {x.dtype.name}"
                            + (" (for bfloat16 as its bits, write the option dtype='bfloat16')"
                               if x.dtype == np.uint16 else ""))
        if layout == "bnhd" and name in _TOKENS:
            if x.ndim < 3:
                raise DumpError(f"{name} must have 3 axes or more for layout bnhd; got {x.shape}")
            x = np.swapaxes(x, -3, -2)
        held[name] = x
    if "scale" in held:
        options["scale"] = held.pop("scale")
    return Dump(held, options)


def _boolean_or_top_left(name: str, x: Any) -> Any:
    if x in ("top_left", True, False) or x in (0, 1):
        return x if x == "top_left" else bool(x)
    raise DumpError(f"{name} must be false, true or 'top_left'; got {_shown(str(x))}")


def _integers(name: str, x: Any) -> Any:
    """Return an int, or nested lists of ints."""
    if isinstance(x, list):
        return [_integers(name, item) for item in x]
    return _number(require_integer, name, x)


def _real(name: str, x: Any) -> Any:
    if isinstance(x, list):
        return [_number(require_real, name, item) for item in x]
    return _number(require_real, name, x)


def _one_real(name: str, x: Any) -> Any:
    return _number(require_real, name, x)


def _number(require: Callable[[str, Any], Any], name: str, x: Any) -> Any:
    if isinstance(x, bool | str):
        raise DumpError(f"{name} must be a number; got {_shown(str(x))}")
    return require(name, x)


def _window(name: str, x: Any) -> Any:
    if not isinstance(x, list):
        return _number(require_integer, name, x)
    if len(x) != 2:
        raise DumpError(f"{name} must be an integer or [left, right]; got {_shown(str(x))}")
    return tuple(None if side is None else _number(require_integer, name, side) for side in x)


def _segments(name: str, x: Any) -> Any:
    x = _integers(name, x)
    pair = isinstance(x, list) and len(x) == 2 and all(isinstance(y, list) for y in x)
    if not isinstance(x, list) or not x or not (pair or all(isinstance(y, int) for y in x)):
        raise DumpError(f"{name} must be a list of lengths, or two such lists")
    if pair and (len(x[0]) != len(x[1]) or not x[0]):
        raise DumpError(f"{name} must be two lists of one length; got {len(x[0])}, {len(x[1])}")
    return tuple(tuple(y) for y in x) if pair else tuple(x)


def _choice(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, x: Any) -> str:
        if not isinstance(x, str) or x not in allowed:
            raise DumpError(f"{name} must be one of {', '.join(allowed)}; got {_shown(str(x))}")
        return x
    return check


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "causal": _boolean_or_top_left, "window": _window, "scale": _real, "softcap": _one_real,
    "q_lengths": _integers, "kv_lengths": _integers, "segments": _segments, "dropout": _one_real,
    "layout": _choice("bhnd", "bnhd"), "dtype": _choice(*arrays.FLOATS),
    "out_dtype": _choice(*arrays.FLOATS), "grad_dtype": _choice(*arrays.FLOATS),
}


def check_dump(dump: str | Path | Dump, *, max_bytes: int = MAX_BYTES,
               advance: Callable[[str], None] = lambda text: None) -> Report:
    """Judge the results in a dump by its inputs; see `write_dump` for what it may hold.

    Parameters
    ----------
    dump : path or Dump
        A file, or what `read_dump` made of one.
    max_bytes : int
        Refuse a file whose arrays claim to hold more.
    advance : function of a string
        Called four times with what has been done.

    Returns
    -------
    Report
        ``report.passed``, and as text the error of each result and where it is worst.

    Raises
    ------
    DumpError
        The file cannot be read, misses an array, or its shapes do not fit together.

    Notes
    -----
    Dense float64 formulas: minutes where there are 10^9 pairs of query and key in all.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> from pyattn import testing
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 40, 8), dtype=np.float32)
    >>> dump = testing.Dump(dict(q=q, k=k, v=v, out=pyattn.attention(q, k, v)), {})
    >>> testing.check_dump(dump).passed
    True
    """
    title = "dump" if isinstance(dump, Dump) else Path(dump).name
    if not isinstance(dump, Dump):
        dump = read_dump(dump, max_bytes=max_bytes)
    options = dict(dump.options)
    dtypes = {"out": options.pop("out_dtype", None), "d": options.pop("grad_dtype", None)}
    inputs = _inputs(dump.arrays, options)
    results = {name: dump.arrays[name] for name in RESULTS if name in dump.arrays}
    try:
        right = answers(inputs, advance)
    except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise DumpError(f"the arrays and options do not fit together: "
                        f"{_first_line(error)}") from error
    missing = sorted(set(results) - set(right.exact))
    if missing:
        raise DumpError(f"{', '.join(missing)} cannot be checked without the array it is the "
                        f"gradient of")
    for name, x in right.plain.items():
        wanted = dtypes["out"] if name == "out" else dtypes["d"]
        if name == "lse":       # wider than it need be is no mistake
            wanted = "float64" if "lse" in results and results[name].dtype == np.float64 else None
        if name == "dscale" and isinstance(dump.options["scale"], list):
            wanted = results[name].dtype.name if name in results else None
        right.plain[name] = x if wanted is None else x.astype(plain_dtype(wanted))
    comparisons, words = judge(results, inputs, right)
    facts = [(name, f"{dump.arrays[name].shape} {dump.arrays[name].dtype.name}")
             for name in INPUTS if name in dump.arrays]
    facts += [(name, str(value)) for name, value in options.items()]
    result = CaseResult(title, inputs.q.dtype.name, OK if all(comparisons) else FAILED,
                        comparisons, words)
    return Report(f"{title} against pyattn.reference", (result,), tuple(facts))


def _inputs(held: Mapping[str, np.ndarray], options: dict[str, Any]) -> Inputs:
    """Build the call that the dump is of; refuse before anything large is computed."""
    missing = [name for name in ("q", "k", "v") if name not in held]
    if missing:
        raise DumpError(f"the dump has no {', '.join(missing)}; it must hold q, k and v")
    if not any(name in held for name in RESULTS):
        raise DumpError(f"the dump has nothing to check; it may hold {', '.join(RESULTS)}")
    gradients = [name for name in held if name in RESULTS and name.startswith("d")]
    if gradients and "dout" not in held:
        raise DumpError(f"the dump has {', '.join(gradients)} but no dout")
    q, k, v = (held[name] for name in ("q", "k", "v"))
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if min(q.ndim, k.ndim, v.ndim) < 3:
        raise DumpError(f"q, k and v must be (..., H, N, D), (..., G, M, D), (..., G, M, E); "
                        f"got {shapes}")
    if len({x.dtype for x in (q, k, v)}) > 1:
        raise DumpError(f"q, k and v must share one dtype; got {q.dtype.name}, {k.dtype.name}, "
                        f"{v.dtype.name}")
    try:
        lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except ValueError:
        raise DumpError(f"the leading axes of q, k and v must broadcast; got {shapes}") from None
    (h, n, d), (g, m) = q.shape[-3:], k.shape[-3:-1]
    if (h % g if g else h) or v.shape[-3:-1] != (g, m) or k.shape[-1] != d:
        raise DumpError("q (..., H, N, D), k (..., G, M, D) and v (..., G, M, E) must fit, H a "
                        f"multiple of G; got {shapes}")
    heads, pairs = math.prod(lead) * h, max(n, 1) * max(m, 1)
    if (heads > MAX_HEADS or pairs > MAX_SCORES or heads * pairs > MAX_TOTAL
            or max(d, v.shape[-1]) > MAX_WIDTH):
        raise DumpError(f"the check is dense and takes up to {MAX_HEADS} heads of {MAX_SCORES} "
                        f"pairs of query and key, {MAX_TOTAL} in all, and width {MAX_WIDTH}; got "
                        f"{shapes}: dump a shorter sequence or fewer heads")
    scores = (*lead, h, n, m)
    for name, wanted in (("dout", (*lead, h, n, v.shape[-1])), ("dlse", (*lead, h, n)),
                         ("bias", scores), ("gate", scores), ("mask", scores), ("keep", scores),
                         ("sinks", (h,)), ("alibi_slopes", (h,))):
        if name in held:
            _require_fit(name, held[name], wanted, exactly=name in ("dout", "dlse"))
    if "scale" in options and np.ndim(options["scale"]):
        options["scale"] = np.asarray(options["scale"])
        _require_fit("scale", options["scale"], (h,), exactly=False)
    if options.get("softcap", 1) <= 0 or not 0 <= options.get("dropout", 0) < 1:
        raise DumpError("softcap must be positive, dropout at least 0 and below 1")
    if options.get("dropout") and "keep" not in held:
        raise DumpError("a dump with dropout must hold keep, which tells what was kept")
    given = {name: held[name] for name in ("bias", "gate", "mask", "keep", "sinks",
                                           "alibi_slopes") if name in held}
    for name in ("q_lengths", "kv_lengths"):
        if name in options:
            try:
                given[name] = np.asarray(options[name], np.int64)
            except (ValueError, OverflowError):
                raise DumpError(f"{name} must be integers that broadcast to {lead}") from None
            _require_fit(name, given[name], lead, exactly=False)
    rest = {name: x for name, x in options.items() if name not in given}
    return Inputs(q, k, v, held.get("dout"), held.get("dlse"), {**rest, **given})


def _require_fit(name: str, x: np.ndarray, wanted: tuple[int, ...], exactly: bool) -> None:
    shape = (1,) * (len(wanted) - x.ndim) + x.shape
    fits = (x.shape == wanted if exactly else len(shape) == len(wanted) and all(
        a in (1, b) for a, b in zip(shape, wanted, strict=True)))
    if not fits:
        verb = "have the shape" if exactly else "broadcast to"
        raise DumpError(f"{name} must {verb} {wanted}; got {x.shape}")
