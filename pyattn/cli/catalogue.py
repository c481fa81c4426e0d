"""Variants by name, with the options that commands give them."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from typing import Any

from .. import VARIANTS
from ..checks import OptionError

EXAMPLES: dict[str, dict[str, Any]] = {
    "adaptive_span_attention": {"ramp": 16, "max_span": 128},
    "attention": {},
    "bigbird_attention": {"block_size": 8, "num_random": 1, "rng": 0},
    "block_diagonal_attention": {"block_size": 16},
    "blockbert_attention": {"num_blocks": 2},
    "bp_attention": {"step": 4},
    "coarse_fine_attention": {"block_size": 8},
    "global_local_attention": {"window": 16, "first": 1},
    "local_attention_2d": {"shape": [1024, 16], "window": 2},
    "longformer_attention": {"window": 16, "global_index": [0]},
    "lsh_attention": {"num_rounds": 2, "bucket_length": 8, "num_buckets": 8, "rng": 0},
    "nsa_attention": {"window": 15, "block_size": 8, "stride": 4, "select_block": 8,
                      "num_selected": 4},
    "random_attention": {"num_random": 2, "block_size": 8, "rng": 0},
    "routing_attention": {"cluster_size": 16},
    "sliding_window_attention": {"window": 16},
    "sparse_transformer_attention": {"stride": 8},
    "top_k_attention": {"top": 8},
}
"""Small options for variants of one sequence of any length."""

GRIDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "axial_attention": lambda n: {"shape": sides(n)},
    "swin_attention": lambda n: {"shape": sides(n), "window": 4, "shift": 2},
    "temporal_attention": lambda n: {"frames": sides(n)[0]},
}
"""Small options for variants whose n tokens fill a grid."""


def sides(n: int) -> tuple[int, int]:
    """Return the sides of the grid of n cells that is closest to a square.

    Examples
    --------
    >>> sides(64), sides(32), sides(7)
    ((8, 8), (4, 8), (1, 7))
    """
    rows = next(rows for rows in range(max(1, math.isqrt(n)), 0, -1) if n % rows == 0)
    return rows, n // rows


def full_name(name: str) -> str:
    """Return the catalogue's name of a variant, which may be given without "attention".

    Examples
    --------
    >>> full_name("longformer"), full_name("nothing")
    ('longformer_attention', 'nothing')
    """
    short = {variant.replace("_attention", ""): variant for variant in VARIANTS}
    return short.get(name, name)


def parse_options(given: list[str]) -> dict[str, Any]:
    """Read ``["window=3", "mode=fixed"]``; values are Python literals, or else strings.

    Raises
    ------
    OptionError
        One is not KEY=VALUE.
    """
    options = {}
    for item in given:
        key, separator, value = item.partition("=")
        if not separator or not key.isidentifier():
            raise OptionError(f"--option must be KEY=VALUE; got {item!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Return the options that the variant `name` takes, with those it hands on to attention."""
    import pyattn

    own = inspect.signature(getattr(pyattn, name)).parameters
    found = {key: p for key, p in own.items() if p.kind is p.KEYWORD_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in own.values()):
        found = {**parameters("attention"), **found}
    return found


def require_options(name: str, options: dict[str, Any], *, withheld: tuple[str, ...] = ()) -> None:
    """Raise OptionError for an option that the variant does not take, or that is `withheld`."""
    allowed = [option for option in parameters(name) if option not in withheld]
    for option in options:
        if option not in allowed:
            raise OptionError(f"--option of {name} must be one of {', '.join(allowed)}; "
                              f"got {option!r}")


def completed(name: str, options: dict[str, Any], n: int = 0) -> dict[str, Any]:
    """Return the `options` given, or examples: all if none are given, else those that it needs.

    A grid is made for n tokens, where n is given.

    Raises
    ------
    OptionError
        The variant needs an option that is not given and has no example.

    Examples
    --------
    >>> completed("longformer_attention", {"window": 3})
    {'window': 3, 'global_index': [0]}
    """
    examples = GRIDS[name](n) if n and name in GRIDS else EXAMPLES.get(name, {})
    needed = [key for key, p in parameters(name).items() if p.default is p.empty]
    missing = [key for key in needed if key not in options and key not in examples]
    if missing:
        raise OptionError(f"{name} needs --option {'=..., '.join(missing)}=...")
    if not options:
        return dict(examples)
    return options | {key: examples[key] for key in needed if key not in options}
