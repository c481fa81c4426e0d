"""``python -m pyattn show``: the tiles of a mask, or of a variant's pattern, counted and drawn."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import math
from typing import Any

import numpy as np

from .. import VARIANTS, masks
from ..checks import BackendError, OptionError, require_integer
from . import content
from .catalogue import completed, full_name, parse_options, require_options

CONSTRUCTORS = ("block_lists", "blocks", "causal", "dense", "fixed", "full", "global_tokens",
                "lengths", "packed", "per_head", "random_blocks", "segments", "strided", "window",
                "window_2d")

WITHHELD = ("return_lse", "return_weights", "decisions")


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "show", help="count and draw the tiles of a mask or of a variant's pattern",
        description="Compile a mask, or the pattern that an attention variant computes, count its "
                    "tiles and pairs, and draw it.",
        epilog='examples: show "causal() & window(64, 0)" --n 512 --output mask.png; '
               "show longformer --n 64 --option window=8 --option causal=True")
    parser.add_argument(
        "mask", help="a name, such as causal, or an expression of masks with & | ~, such as "
                     '"causal() & (window(64, 0) | global_tokens([0]))"; there are '
                     + ", ".join(CONSTRUCTORS) + "; or a variant, such as bigbird; where contents "
                          "decide, those of random tokens")
    parser.add_argument("--n", type=int, default=512, metavar="N", help="queries (512)")
    parser.add_argument("--m", type=int, metavar="M", help="keys (as many as queries)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="an option for the variant; may be repeated; what it needs has small "
                             "defaults")
    parser.add_argument("--heads", type=int, default=4, metavar="H",
                        help="heads of the variant; the pattern of the first is drawn (4)")
    parser.add_argument("--output", metavar="FILE",
                        help="write the picture there, as .png, .pdf or .svg (needs matplotlib)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print counts and picture; write the picture if asked."""
    import pyattn

    n, m = args.n, args.n if args.m is None else args.m
    name = full_name(args.mask.strip())
    executed, told = None, ""
    if name in VARIANTS:
        options = completed(name, parse_options(args.option), n)
        if name in content.NAMES:
            require_options(name, options, withheld=WITHHELD)
            heads = require_integer("--heads", args.heads, minimum=1)
            mask, m, told = content.pattern(name, content.example(name, n, m, heads), options)
        else:
            mask, n, m, executed = pattern(name, n, m, args.heads, options)
        arrays = [p.name for p in inspect.signature(getattr(pyattn, name)).parameters.values()
                  if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        print(f"{name}({', '.join(arrays)}{given})")
    elif args.option:
        raise OptionError(f"--option is for variants; {args.mask!r} is none")
    else:
        mask = parse(args.mask)
    blocks = mask.compile(n, m)
    tiles, pairs = blocks.tiles, blocks.count().pairs
    copies = math.prod(blocks.layout.shape)
    share = f" ({pairs / (n * m * copies):.2%})" if n * m * copies else ""
    print(f"{told or repr(mask)}, {n:,} queries, {m:,} keys"
          + (f", leading axes {mask.lead}, the first drawn" if mask.lead else ""))
    print(f"tiles  {tiles.full:,} full, {tiles.partial:,} partial, {tiles.empty:,} empty")
    if executed is not None:
        print(f"run    {executed:,} tiles by each head")
    print(f"pairs  {pairs:,} of {n * m * copies:,} allowed{share}")
    print(f"bytes  {blocks.nbytes:,} in {len(blocks.rows.first):,} runs "
          f"and {len(blocks.bits):,} bit tiles")
    if n and m:
        print(f"\n{mask.draw(n, m)}")
    if args.output:
        _write(mask, n, m, args.output)
        print(f"\nwrote {args.output}")
    return 0


def pattern(name: str, n: int, m: int, heads: int, options: dict[str, Any]) -> tuple[Any, ...]:
    """Return the mask that a variant attends by, its queries, keys, and tiles executed by a head.

    The variant is run on zeros of width 1, and its record tells: what is drawn is what is computed.
    Where it attends several times, or inside groups of tokens, the mask is that of all together.

    Raises
    ------
    OptionError
        The variant does not take these options.

    Examples
    --------
    >>> pattern("sliding_window_attention", 8, 8, 2, {"window": 1, "causal": True})[0].mask
    window(1, 1) & causal()
    """
    import pyattn

    require_options(name, options, withheld=WITHHELD)
    heads = require_integer("--heads", heads, minimum=1)
    q, k = (np.zeros((heads, require_integer(side, count, minimum=0), 1), np.float32)
            for side, count in (("--n", n), ("--m", m)))
    operation, arrays = getattr(pyattn, name), {}
    if name == "swin_attention" and np.ndim(options["shape"]) == 1:
        reach = np.broadcast_to(options["window"], np.shape(options["shape"]))
        arrays["bias_table"] = np.zeros((int((2 * reach - 1).prod()), heads), np.float32)
    more = [p.name for p in list(inspect.signature(operation).parameters.values())[3:]
            if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty and p.name not in arrays]
    if more:
        raise OptionError(f"{name} cannot be drawn: it needs arrays, {', '.join(more)}")
    _, saved = operation.forward(q, k, k, **arrays, **options)
    found, tiles = _records(saved), saved.stats["tiles"] // heads
    if len(found) == 1 and getattr(found[0], "order", None) is None:
        return found[0].mask, found[0].placement.n, found[0].placement.m, tiles
    seen = functools.reduce(np.logical_or, (_over_tokens(record, q.shape[1]) for record in found))
    return masks.dense(seen), *seen.shape, tiles


def _records(saved: Any) -> list[Any]:
    """Return the records in `saved` that have a mask."""
    if hasattr(saved, "mask"):
        return [saved]
    parts = [part for value in vars(saved).values()
             for part in (value if isinstance(value, tuple) else [value])]
    return [record for part in parts if hasattr(part, "stats") for record in _records(part)]


def _over_tokens(record: Any, tokens: int) -> np.ndarray:
    """Return which of all tokens the first head lets see each other, bool (tokens, tokens)."""
    seen = np.zeros((tokens, tokens), bool)
    for item, cells in enumerate(record.order.index):
        slots = np.flatnonzero(cells >= 0)
        allowed = record.mask.pick((item, 0)).dense(len(cells), len(cells))
        seen[np.ix_(cells[slots], cells[slots])] |= allowed[np.ix_(slots, slots)]
    return seen


def _write(mask: Any, n: int, m: int, path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError("--output needs matplotlib, which is not installed: "
                           "pip install 'pyattn[plot]'") from None
    figure = Figure(figsize=(6.4, 7))
    mask.plot(n, m, ax=figure.add_subplot())
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except ValueError as error:
        raise OptionError(f"--output {path}: {error}") from None


def parse(expression: str) -> Any:
    """Build the mask that `expression` describes; nothing but constructors is ever called.

    Raises
    ------
    OptionError
        It is no such expression, or names a constructor that does not exist.

    Examples
    --------
    >>> parse("causal & ~window(2, None)")
    causal() & ~window(2, None)
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        mask = _value(tree.body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, OptionError):
            raise
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise OptionError(f"{expression!r} is no expression of masks: {reason}") from None
    from pyattn.masks import Mask

    if not isinstance(mask, Mask):
        raise OptionError(f"{expression!r} is no mask; there are {', '.join(CONSTRUCTORS)}")
    return mask


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return [_value(part) for part in parts]
        case ast.Name(id=name):
            return _made(name, [], {})
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            options = {str(keyword.arg): _value(keyword.value) for keyword in keywords}
            return _made(name, [_value(part) for part in args], options)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_mask(operand)
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _mask(left) & _mask(right)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _mask(left) | _mask(right)
    raise OptionError(f"{ast.unparse(node)!r} has no place in an expression of masks: they have "
                      "constructors, numbers, lists, & | ~ and parentheses")


def _mask(node: ast.expr) -> Any:
    from pyattn.masks import Mask

    value = _value(node)
    if not isinstance(value, Mask):
        raise OptionError(f"& | ~ combine masks; {ast.unparse(node)!r} is none")
    return value


def _made(name: str, args: list[Any], options: dict[str, Any]) -> Any:
    from pyattn import masks

    if name not in CONSTRUCTORS:
        raise OptionError(f"there is no mask {name!r}; there are {', '.join(CONSTRUCTORS)}")
    constructor = getattr(masks, name)
    signature = inspect.signature(constructor)
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        parameters = ", ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default!r}"
            for p in signature.parameters.values())
        raise OptionError(f"{name}: {error}; it is {name}({parameters})") from None
    return constructor(*args, **options)
