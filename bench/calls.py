"""What a rival is, and how those that are made of torch are called.

A rival is ``rival(row, inputs, backward) -> (call, host)``: `call()` does the work and returns when
it is done; `host(result)` gives what it returned as NumPy arrays, (out,) or (out, dq, dk, dv), and
the gradient of a bias, or of a table of biases, where there is one. Where `host` is None the rival
computes something else, which is timed and compared with nothing. What a user would prepare once
(layouts, dense masks for libraries that need them, compilation) is prepared outside `call`. A rival
that is not installed raises ImportError; one that cannot do the row, Unsupported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .rows import Row

Inputs = dict[str, np.ndarray]
Rival = tuple[Callable[[], Any], Callable[[Any], tuple[np.ndarray, ...]] | None]


class Unsupported(Exception):
    """A rival cannot do a row; the message says why."""


def torch_tensors(row: Row, inputs: Inputs) -> list[Any]:
    """The inputs as tensors, in their order."""
    import torch

    wide = np.float64 if row.dtype == "float64" else np.float32
    dtype = getattr(torch, row.dtype)
    return [torch.from_numpy(x.astype(wide)).to(dtype) for x in inputs.values()]


def torch_call(attend: Callable[[], Any], leaves: Sequence[Any], dout: Any,
               backward: bool) -> Callable[[], tuple[Any, ...]]:
    """The call that gives what `attend()` does, and the gradients of `leaves`."""
    import torch

    if backward:
        for x in leaves:
            x.requires_grad_()

    def call() -> tuple[Any, ...]:
        out = attend()
        return (out, *torch.autograd.grad(out, leaves, dout)) if backward else (out,)

    return call


def torch_to_host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """What such a call returned, as NumPy arrays."""
    return tuple(x.detach().double().numpy() for x in result)
