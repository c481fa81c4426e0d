"""``python -m pyattn warmup``: compile the usual kernels now, into the cache on disk."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "float64", "bfloat16", "float16")


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "warmup", help="compile the usual kernels into the cache",
        description="Run attention forward and backward on tiny arrays, in all its kinds, "
                    "so that Numba compiles the CPU kernels and they are kept on disk; later "
                    "processes load them. PYATTN_CACHE_DIR says where; `pyattn info` shows it.")
    parser.add_argument("--dtype", action="append", choices=DTYPES,
                        help="only for this dtype (may be given again); default: all")
    parser.add_argument("--tune", action="store_true",
                        help="measure, too, how work is best cut on this CPU, and keep the figures")
    parser.add_argument("--gpu", action="store_true",
                        help="instead compile CUDA kernels for the current GPU, measure how their "
                             "work is best divided there, and keep the choices")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile."""
    if args.gpu:
        return _tune_gpu()
    from .progress import progress

    began = time.perf_counter()
    jobs = list(itertools.product(args.dtype or DTYPES, _CALLS))
    with progress("compiling", total=len(jobs)) as bar:
        for dtype, name in jobs:
            _CALLS[name](dtype)
            bar.advance(text=f"{dtype} {name}")
    print(f"{len(jobs)} calls in {time.perf_counter() - began:.1f} s")
    if args.tune:
        _tune()
    return 0


def _tune() -> None:
    """Measure the tuning table on one thread and keep it."""
    from pyattn.kernels.cpu import tuning
    from pyattn.threads import get_num_threads, set_num_threads

    from .progress import progress
    from .tune import measure

    usual = get_num_threads()
    set_num_threads(1)
    try:
        with progress("measuring", total=len(tuning.CANDIDATES) * len(tuning.KINDS)) as bar:
            found = measure(lambda text: bar.advance(text=text))
    finally:
        set_num_threads(usual)
    print(found)
    print(f"kept in {tuning.save(found) or 'no file: the folder for it cannot be written to'}")


def _tune_gpu() -> int:
    """Measure the tuning table of the current GPU and keep it."""
    from pyattn.kernels.cuda import device as devices
    from pyattn.kernels.cuda import tuning

    reason = devices.unavailable()
    if reason is None:
        import cupy

        array = cupy.zeros(1)
        reason = devices.missing(array)
    if reason is not None:
        print(f"warmup --gpu: {reason}", file=sys.stderr)
        return 2
    from .progress import progress
    from .tune_gpu import FILL_QUESTIONS, measure, questions

    device = devices.of(array)
    total = sum(1 for _ in questions(device)) + FILL_QUESTIONS
    with progress("measuring", total=total) as bar:
        found = measure(cupy.asarray, lambda text: bar.advance(text=text))
    written = tuning.text(device, found.choices, found.seconds)
    print(written)
    for line in found.wrong:
        print(f"wrong: {line}")
    path = tuning.save(device, written)
    print(f"kept in {path or 'no file: the folder for it cannot be written to'}")
    return 1 if found.wrong else 0


def _terms() -> dict[str, Any]:
    import numpy as np

    return {"bias": np.zeros((1, 70), np.float32), "gate": np.ones((70, 70), np.float32),
            "softcap": 30.0, "sinks": np.zeros(2, np.float32),
            "alibi_slopes": np.ones(2, np.float32), "dropout": 0.1, "rng": 0}


def _ones(dtype: str, tokens: int) -> Any:
    import ml_dtypes  # noqa: F401, gives NumPy the name bfloat16
    import numpy as np

    return np.ones((1, 2, tokens, 64), np.dtype(dtype))


def _attend(dtype: str, options: Any) -> None:
    import pyattn

    x = _ones(dtype, 70)
    out, saved = pyattn.attention.forward(x, x, x, **options())
    saved.backward(out)


def _heads(name: str, tokens: int, arrays: Callable[[Any], tuple[Any, ...]] = lambda x: (),
           **options: Any) -> Callable[[str], None]:
    """Return a call of a variant with further arrays, made from an array of ones (1, 2, N, 64)."""
    def call(dtype: str) -> None:
        import pyattn

        x = _ones(dtype, tokens)
        out, saved = getattr(pyattn, name).forward(x, x, x, *arrays(x), **options)
        saved.backward(out)

    return call


def _convolve(dtype: str) -> None:
    import pyattn

    x = _ones(dtype, 70)[0, 0]
    out, saved = pyattn.dynamic_convolution.forward(x, x[:, None, :7], causal=True)
    saved.backward(out)
    out, saved = pyattn.layers.conv1d.forward(x, x[:3], causal=True)
    saved.backward(out)


_CALLS: dict[str, Callable[[str], None]] = {
    "plain": lambda dtype: _attend(dtype, dict),
    "causal": lambda dtype: _attend(dtype, lambda: {"causal": True}),
    "terms": lambda dtype: _attend(dtype, _terms),
    "blocks listed": _heads("nsa_attention", 200, lambda x: (x[..., :3],), window=31,
                            num_selected=4),
    "clusters": _heads("nsa_attention", 200, lambda x: (x[..., :3],), window=31, mode="kmeans",
                       tree=True, num_selected=8),
    "keys listed": _heads("top_k_attention", 70, top=8),
    "sums over keys": _heads("performer_attention", 70, causal=True, num_features=64, rng=0),
    "additive scores": _heads("additive_attention", 70,
                              lambda x: (x[0, 0, :64], x[0, 0, :64], x[0, 0, 0])),
    "talking heads": _heads("talking_heads_attention", 70,
                            lambda x: (x[0, 0, :2, :2], x[0, 0, :2, :2])),
    "convolution": _convolve,
}
"""Each brings kernels that those before it have not."""
