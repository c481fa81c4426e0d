"""Who is measured: each rival of a function as a call on arrays of its own library.

A rival is ``rival(row, inputs, backward) -> (call, host)``: `call()` does the work and returns when
it is done; `host(result)` gives what it returned as NumPy arrays, (out,) or (out, dq, dk, dv). What
a user would prepare once (layouts, dense masks for libraries that need them) is prepared outside
`call`. A rival that is not installed raises ImportError; one that cannot do the row, Unsupported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .rows import Row

Inputs = dict[str, np.ndarray]
Rival = tuple[Callable[[], Any], Callable[[Any], tuple[np.ndarray, ...]]]


class Unsupported(Exception):
    """A rival cannot do a row; the message says why."""


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray | None,
          allowed: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """The textbook formulas with N x N arrays: (out,), or (out, dq, dk, dv) if `dout` is given."""
    shared = q.shape[-3] // k.shape[-3]
    kk, vv = (np.repeat(x, shared, axis=-3) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    p = q @ kk.mT
    p *= scale
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
    ds *= scale
    summed = (*k.shape[:-2], shared, *k.shape[-2:])
    dk = (ds.mT @ q).reshape(summed).sum(axis=-3)
    dv = (p.mT @ dout).reshape(summed).sum(axis=-3)
    return out, ds @ kk, dk, dv


def _numpy_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    allowed = row.allowed()
    acc = np.float64 if row.dtype == "float64" else np.float32

    def call() -> tuple[np.ndarray, ...]:
        # NumPy multiplies bfloat16 matrices element by element: one converts, as here
        q, k, v, dout = (x.astype(acc, copy=False) for x in inputs.values())
        result = dense(q, k, v, dout if backward else None, allowed)
        return tuple(x.astype(row.dtype, copy=False) for x in result)

    return call, lambda result: result


def _pyattn_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    import pyattn

    q, k, v, dout = inputs.values()

    def forward() -> tuple[np.ndarray, ...]:
        return (pyattn.attention(q, k, v, **row.options),)

    def both() -> tuple[np.ndarray, ...]:
        out, saved = pyattn.attention.forward(q, k, v, **row.options)
        return (out, *saved.backward(dout))

    return (both if backward else forward), lambda result: result


def _torch_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    dtype = getattr(torch, row.dtype)
    wide = np.float64 if row.dtype == "float64" else np.float32
    q, k, v, dout = (torch.from_numpy(x.astype(wide)).to(dtype) for x in inputs.values())
    settings: dict[str, Any] = {"enable_gqa": row.groups != row.heads}
    allowed = row.allowed()
    if row.options == {"causal": True}:
        settings["is_causal"] = True
    elif allowed is not None:
        settings["attn_mask"] = torch.from_numpy(allowed)
    if backward:
        for x in (q, k, v):
            x.requires_grad_()

    def call() -> tuple[Any, ...]:
        out = scaled_dot_product_attention(q, k, v, **settings)
        return (out, *torch.autograd.grad(out, (q, k, v), dout)) if backward else (out,)

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        return tuple(x.detach().double().numpy() for x in result)

    return call, host


def _jax_attention(row: Row, inputs: Inputs, backward: bool) -> Rival:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    # (B, N, H, D) is JAX's own layout
    q, k, v, dout = (jnp.asarray(np.swapaxes(x, 1, 2)) for x in inputs.values())
    settings: dict[str, Any] = {"is_causal": row.options.get("causal", False)}
    if "window" in row.options:
        settings["local_window_size"] = (row.options["window"],) * 2
    if "kv_lengths" in row.options:
        settings["key_value_seq_lengths"] = jnp.asarray(row.options["kv_lengths"], jnp.int32)

    def attention(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, **settings)

    @jax.jit
    def both(q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, ...]:
        out, back = jax.vjp(attention, q, k, v)
        return (out, *back(dout))

    forward = jax.jit(attention)

    def call() -> tuple[Any, ...]:
        result = both(q, k, v, dout) if backward else (forward(q, k, v),)
        return jax.block_until_ready(result)

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        return tuple(np.swapaxes(np.asarray(x), 1, 2) for x in result)

    return call, host


RIVALS: dict[str, dict[str, Callable[[Row, Inputs, bool], Rival]]] = {
    "attention": {
        "pyattn": _pyattn_attention,
        "torch": _torch_attention,
        "jax": _jax_attention,
        "numpy": _numpy_attention,
    },
}
"""By function and by the name that `Row.rivals` uses."""

JUDGES = {"attention": dense}
"""The formulas that every rival's result is held against, in float64, before it is timed."""


def gemms(dtype: str, size: int = 1024) -> dict[str, Callable[[], Any]]:
    """Square matrix products of `dtype`, by library: what the machine can do."""
    x = np.random.default_rng(0).standard_normal((size, size), dtype=np.float64)
    products: dict[str, Callable[[], Any]] = {}
    if dtype != "bfloat16":
        a = x.astype(dtype)
        products["numpy"] = lambda: a @ a
    try:
        import torch
    except ImportError:
        return products
    b = torch.from_numpy(x).to(getattr(torch, dtype))
    products["torch"] = lambda: b @ b
    return products
