"""Who is measured: each rival of a function as a call on arrays of its own library.

`calls` says what a rival is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .calls import Inputs, Rival, Unsupported, torch_call, torch_tensors, torch_to_host
from .content import CONTENT, DECIDED, ContentRow
from .content_peers import CONTENT_PEERS
from .linear import LINEAR, LinearRow
from .linear_peers import LINEAR_PEERS
from .peers import PEERS
from .rows import PATTERNS, PatternRow, Row


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None = None, *,
          dout: np.ndarray | None = None, allowed: np.ndarray | None = None
          ) -> tuple[np.ndarray, ...]:
    """The textbook formulas with N x M arrays: (out,), and the gradients if `dout` is given.

    Those are dq, dk, dv, and dbias where there is a bias, which is (1, H, N, M).
    """
    shared = q.shape[-3] // k.shape[-3]
    kk, vv = (np.repeat(x, shared, axis=-3) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    p = q @ kk.mT
    p *= scale
    if bias is not None:
        p += bias
    if allowed is not None:
        p = np.where(allowed, p, -np.inf)
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    out = p @ vv
    if dout is None:
        return (out,)
    ds = dout @ vv.mT
    ds -= (dout * out).sum(axis=-1, keepdims=True)
    ds *= p
    dbias = () if bias is None else (ds.sum(axis=0, keepdims=True),)
    ds *= scale
    summed = (*k.shape[:-2], shared, *k.shape[-2:])
    dk = (ds.mT @ q).reshape(summed).sum(axis=-3)
    dv = (p.mT @ dout).reshape(summed).sum(axis=-3)
    return out, ds @ kk, dk, dv, *dbias


def judge(row: Row, inputs: Inputs, backward: bool, block: int = 512) -> tuple[np.ndarray, ...]:
    """What `dense` gives in float64, a block of queries at a time, so that long rows fit."""
    exact = {name: x.astype(np.float64) for name, x in inputs.items()}
    q, k, v, dout = (exact[name] for name in ("q", "k", "v", "dout"))
    bias = exact.get("bias")
    first, end = row.seen()
    out, dq, dk, dv = np.empty_like(q), np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias = None if bias is None else np.zeros_like(bias)
    for start in range(0, row.length, block):
        rows = slice(start, start + block)
        keys = slice(first[:, rows].min(), end[:, rows].max())      # no other key is seen
        result = dense(
            q[..., rows, :], k[..., keys, :], v[..., keys, :],
            None if bias is None else bias[..., rows, keys],
            dout=dout[..., rows, :] if backward else None, allowed=row.allowed(rows, keys))
        out[..., rows, :] = result[0]
        if backward:
            dq[..., rows, :] = result[1]
            dk[..., keys, :] += result[2]
            dv[..., keys, :] += result[3]
            if dbias is not None:
                dbias[..., rows, keys] = result[4]
    if not backward:
        return (out,)
    return (out, dq, dk, dv) if dbias is None else (out, dq, dk, dv, dbias)


def judge_variant(row: Row, inputs: Inputs, backward: bool) -> tuple[np.ndarray, ...]:
    """What the variant itself gives in float64.

    The tests hold the variants to the papers' rules; here others' code is held to the variants.
    """
    exact = {name: x.astype(np.float64) for name, x in inputs.items()}
    return _pyattn(row, exact, backward)[0]()


def judge_decided(row: ContentRow, inputs: Inputs, backward: bool) -> tuple[np.ndarray, ...]:
    """What the variant gives in float64 for what it decides in the row's dtype.

    A near tie may be decided otherwise in float64.
    """
    exact = {name: x.astype(np.float64) for name, x in inputs.items()}
    return _decided(row, exact, backward)[0]()


def _numpy_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    allowed = row.allowed()
    acc = np.float64 if row.dtype == "float64" else np.float32

    def call() -> tuple[np.ndarray, ...]:
        # NumPy multiplies matrices of 16-bit floats element by element: one converts, as here
        *arguments, dout = (x.astype(acc, copy=False) for x in inputs.values())
        result = dense(*arguments, dout=dout if backward else None, allowed=allowed)
        return tuple(x.astype(row.dtype, copy=False) for x in result)

    return call, lambda result: result


def _pyattn(row: Row, inputs: Inputs, backward: bool, **more: Any) -> Rival:
    import pyattn

    function = getattr(pyattn, row.function)
    arguments: dict[str, Any] = {**inputs, **row.arguments(), **more}
    dout = arguments.pop("dout")
    learned = [name for name in inputs if name != "dout"]

    def forward() -> tuple[np.ndarray, ...]:
        return (function(**arguments),)

    def both() -> tuple[np.ndarray, ...]:
        out, saved = function.forward(**arguments)
        gradients = saved.backward(dout)
        return (out, *(getattr(gradients, name) for name in learned))

    return (both if backward else forward), lambda result: result


def _decided(row: ContentRow, inputs: Inputs, backward: bool) -> Rival:
    """pyattn, told what it decides: what is left is attention."""
    more = {"decisions": row.decisions} if row.decisions else {}
    return _pyattn(row, inputs, backward, **more)


def _torch_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    *arguments, dout = torch_tensors(row, inputs)
    q, k, v, *bias = arguments
    settings: dict[str, Any] = {"enable_gqa": row.groups != row.heads}
    if row.options == {"causal": True} and row.density is None and not bias:
        settings["is_causal"] = True
    elif bias and row.masked:
        raise Unsupported("it takes a mask or a bias")
    elif bias:
        settings["attn_mask"] = bias[0]
    elif row.masked:
        settings["attn_mask"] = torch.from_numpy(row.allowed())
    call = torch_call(lambda: scaled_dot_product_attention(q, k, v, **settings), arguments, dout,
                      backward)
    return call, torch_to_host


def _flex_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    """FlexAttention, compiled for the row."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *arguments, _ = torch_tensors(row, inputs)
    q, k, v, *bias = arguments
    settings: dict[str, Any] = {"enable_gqa": row.groups != row.heads}
    if row.masked:
        settings["block_mask"] = create_block_mask(
            _flex_mask(row), row.batch if "kv_lengths" in row.options else None, None,
            row.length, row.key_length, device="cpu")
    if bias:
        settings["score_mod"] = lambda score, b, h, i, j: score + bias[0][0, h, i, j]
    if backward:
        for x in arguments:
            x.requires_grad_()
    torch._dynamo.reset()       # or the second shape would be compiled for any shape
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> tuple[Any, ...]:
        return (compiled(q, k, v, **settings),)

    try:
        call()
    except RuntimeError as refused:     # no compiler, no such dtype, no backward
        raise Unsupported(_first_sentence(refused)) from refused
    if backward:
        raise Unsupported("its backward on the CPU is not measured")
    return call, torch_to_host


def _flex_mask(row: Row) -> Callable[..., Any]:
    """The row's mask as FlexAttention's users write it: predicates, joined by and."""
    import torch
    from torch.nn.attention.flex_attention import and_masks

    parts: list[Callable[..., Any]] = []
    if row.options.get("causal"):
        parts.append(lambda b, h, i, j: i >= j)
    if "window" in row.options:
        reach = row.options["window"]
        parts.append(lambda b, h, i, j: (i - j <= reach) & (j - i <= reach))
    if "kv_lengths" in row.options:
        lengths = torch.tensor(row.options["kv_lengths"])
        parts.append(lambda b, h, i, j: j < lengths[b])
    if (mask := row.mask()) is not None:
        table = torch.from_numpy(mask)
        parts.append(lambda b, h, i, j: table[i, j])
    return and_masks(*parts)


def _first_sentence(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.partition(". ")[0].rstrip(".")


def _jax_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    # (B, N, H, D) is JAX's own layout, but for the bias
    *arguments, dout = (jnp.asarray(x if name == "bias" else np.swapaxes(x, 1, 2))
                        for name, x in inputs.items())
    settings: dict[str, Any] = {"is_causal": row.options.get("causal", False)}
    if "window" in row.options:
        settings["local_window_size"] = (row.options["window"],) * 2
    if "kv_lengths" in row.options:
        settings["key_value_seq_lengths"] = jnp.asarray(row.options["kv_lengths"], jnp.int32)
    if (mask := row.mask()) is not None:
        settings["mask"] = jnp.asarray(mask[None, None])

    def attention(*arguments: Any) -> Any:
        return jax.nn.dot_product_attention(*arguments, **settings)

    def both(dout: Any, *arguments: Any) -> tuple[Any, ...]:
        out, back = jax.vjp(attention, *arguments)
        return (out, *back(dout))

    if backward:
        arguments = [dout, *arguments]
    compiled = jax.jit(both if backward else lambda *arguments: (attention(*arguments),))
    try:
        compiled = compiled.lower(*arguments).compile()
    except ValueError as refused:       # no float16 on the CPU
        raise Unsupported(_first_sentence(refused)) from refused

    def call() -> tuple[Any, ...]:
        return jax.block_until_ready(compiled(*arguments))

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        swapped = tuple(np.swapaxes(np.asarray(x), 1, 2) for x in result[:4])
        return (*swapped, *(np.asarray(x) for x in result[4:]))

    return call, host


def _over_all_pairs(rival: Callable[[Row, Inputs, bool], Rival]
                    ) -> Callable[[PatternRow | ContentRow | LinearRow, Inputs, bool], Rival]:
    """The rival's call without the pattern, which is compared with nothing."""

    def prepare(row: PatternRow | ContentRow | LinearRow, inputs: Inputs,
                backward: bool) -> Rival:
        # where queries are keys, their array is both
        arrays = {name: inputs["qk"] if name in "qk" and "qk" in inputs else inputs[name]
                  for name in ("q", "k", "v", "dout")}
        return rival(row.over_all_pairs(), arrays, backward)[0], None

    return prepare


VARIANTS = {function for function, _, _ in PATTERNS.values()}
BY_CONTENT = {found.function for found in CONTENT.values()}
BY_SUMS = {found.function for found in LINEAR.values()}

RIVALS: dict[str, dict[str, Callable[[Row, Inputs, bool], Rival]]] = {
    "attention": {
        "pyattn": _pyattn,
        "torch": _torch_attention,
        "flex": _flex_attention,
        "jax": _jax_attention,
        "numpy": _numpy_attention,
    },
    **{function: {"pyattn": _pyattn, "pyattn dense": _over_all_pairs(_pyattn),
                  "torch dense": _over_all_pairs(_torch_attention), **PEERS.get(function, {})}
       for function in VARIANTS},
    **{function: {"pyattn": _pyattn, "pyattn dense": _over_all_pairs(_pyattn), DECIDED: _decided,
                  **CONTENT_PEERS.get(function, {})} for function in BY_CONTENT},
    **{function: {"pyattn": _pyattn, "pyattn dense": _over_all_pairs(_pyattn),
                  **LINEAR_PEERS.get(function, {})} for function in BY_SUMS},
}
"""By function and by the name that `Row.rivals` uses."""

JUDGES = {"attention": judge, **dict.fromkeys(VARIANTS, judge_variant),
          **dict.fromkeys(BY_CONTENT, judge_decided), **dict.fromkeys(BY_SUMS, judge_variant)}
"""What every rival's result is held against, in float64, before it is timed."""


def _numpy_gemm(dtype: str, x: np.ndarray) -> Callable[[], Any]:
    # of 16-bit floats NumPy has no product worth the name: the float32 one is what is to be had
    a = x.astype("float32" if np.dtype(dtype).itemsize == 2 else dtype)
    return lambda: a @ a


def _torch_gemm(dtype: str, x: np.ndarray) -> Callable[[], Any]:
    import torch

    a = torch.from_numpy(x).to(getattr(torch, dtype))
    return lambda: a @ a


GEMMS: dict[str, Callable[[str, np.ndarray], Callable[[], Any]]] = {
    "numpy": _numpy_gemm,
    "torch": _torch_gemm,
}
"""By library: from a dtype and a float64 matrix, its product with itself in that dtype. One that
has none raises Unsupported, or ImportError where the library is missing."""


def gemms(dtype: str, size: int = 1024) -> dict[str, Callable[[], Any]]:
    """Square matrix products of `dtype`, by library: what the machine can do."""
    x = np.random.default_rng(0).standard_normal((size, size), dtype=np.float64)
    return _those_here({name: functools.partial(prepare, dtype, x)
                        for name, prepare in GEMMS.items()})


def _numpy_sum(x: np.ndarray) -> Callable[[], Any]:
    return functools.partial(np.add.reduce, x)


def _numpy_dot(x: np.ndarray) -> Callable[[], Any]:
    return functools.partial(np.dot, x, x)


def _torch_sum(x: np.ndarray) -> Callable[[], Any]:
    import torch

    return torch.from_numpy(x).sum


READERS: dict[str, Callable[[np.ndarray], Callable[[], Any]]] = {
    "numpy sum": _numpy_sum,
    "numpy dot": _numpy_dot,
    "torch sum": _torch_sum,
}


def reads(nbytes: int) -> dict[str, Callable[[], Any]]:
    """Streaming reads of an array of that size, by reader: how fast memory can be read."""
    x = np.ones(nbytes // 4, np.float32)
    return _those_here({name: functools.partial(prepare, x) for name, prepare in READERS.items()})


def _those_here(prepared: dict[str, Callable[[], Callable[[], Any]]]
                ) -> dict[str, Callable[[], Any]]:
    here = {}
    for name, prepare in prepared.items():
        try:
            here[name] = prepare()
        except (ImportError, Unsupported):
            continue
    return here
