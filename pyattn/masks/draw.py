"""Pictures of masks: in characters, and with matplotlib."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from .algebra import EMPTY, FULL, PARTIAL, Mask
from .bits import TILE, tiles_of
from .block_mask import BlockMask

COLOURS = {FULL: "#0072b2", PARTIAL: "#e69f00", EMPTY: "#ececec"}
"""Blue and orange of Okabe and Ito, which colour-blind readers tell apart, and a light grey."""

MASKED_IN_PARTIAL = "#fbe9c3"
"""A pair that is not allowed, in a tile where others are."""

CHARACTERS = np.array(["·", "▒", "█"])
"""Of tiles that are EMPTY, PARTIAL, FULL."""


def text(mask: Mask, n: int, m: int, index: tuple[int, ...] | None) -> str:
    """Draw in characters; see `Mask.draw`."""
    blocks = _at(mask, n, m, index)
    if n <= 64 and m <= 80:
        cells = CHARACTERS[np.where(blocks.dense(), FULL, EMPTY)]
    else:
        cells = CHARACTERS[squares(blocks, 80)[0]]
    return "\n".join("".join(line) for line in cells)


def plot(mask: Mask, n: int, m: int, ax: Any, index: tuple[int, ...] | None) -> Any:
    """Draw with matplotlib where there is one, else in characters; see `Mask.plot`."""
    try:
        from matplotlib.patches import Patch
    except ImportError:
        picture = text(mask, n, m, index)
        print(picture)
        return picture
    if ax is None:
        from matplotlib import pyplot

        _, ax = pyplot.subplots(figsize=(6.4, 7), layout="constrained")

    blocks = _at(mask, n, m, index)
    pairs = n * m <= 2**18
    kinds, step = squares(blocks, max(tiles_of(n), tiles_of(m)) if pairs else 512)
    colours = _rgb([COLOURS[kind] for kind in (EMPTY, PARTIAL, FULL)])[kinds]
    size = step * TILE
    if pairs:
        kinds = kinds.repeat(TILE, axis=0).repeat(TILE, axis=1)[:n, :m]
        colours = colours.repeat(TILE, axis=0).repeat(TILE, axis=1)[:n, :m]
        colours[(kinds == PARTIAL) & ~blocks.dense()] = _rgb([MASKED_IN_PARTIAL])
        size = 1
    if colours.size:
        ax.imshow(colours, interpolation="nearest", aspect="auto", resample=False,
                  extent=(0, colours.shape[1] * size, colours.shape[0] * size, 0))
    for along, length in ((ax.axvline, m), (ax.axhline, n)):
        for edge in range(TILE, length, TILE) if tiles_of(length) <= 64 else ():
            along(edge, color="white", linewidth=0.6)

    ax.set_xlim(0, max(m, 1))
    ax.set_ylim(max(n, 1), 0)
    if max(n, m) <= 8 * min(n, m):
        ax.set_aspect("equal")
    for axis, what, length in ((ax.xaxis, "key j", m), (ax.yaxis, "query i", n)):
        axis.set_label_text(f"{what} of {length:,}")
        axis.get_major_locator().set_params(integer=True)
        axis.set_major_formatter("{x:,.0f}")
    where = f" at {_first(mask, index)} of {mask.lead}" if mask.lead else ""
    ax.set_title(textwrap.fill(textwrap.shorten(f"{mask!r}{where}", 240, placeholder=" ..."), 66),
                 fontsize="medium")
    tiles = blocks.tiles
    kept = [(COLOURS[FULL], f"full ({tiles.full:,})"),
            (COLOURS[PARTIAL], f"partial ({tiles.partial:,})")]
    if pairs:
        kept.append((MASKED_IN_PARTIAL, "masked in a partial one"))
    kept.append((COLOURS[EMPTY], f"empty ({tiles.empty:,})"))
    grouped = f"; a dot shows {step} x {step} of them" if step > 1 else ""
    ax.legend(
        handles=[Patch(facecolor=colour, edgecolor="#888888", linewidth=0.5, label=label)
                 for colour, label in kept],
        title=f"tiles of {TILE} x {TILE}{grouped}", ncols=len(kept), columnspacing=1.2,
        handlelength=1.2, fontsize="small", title_fontsize="small", frameon=False,
        loc="upper center", bbox_to_anchor=(0.5, -0.09))
    return ax


def squares(blocks: BlockMask, most: int) -> tuple[np.ndarray, int]:
    """Return EMPTY, PARTIAL or FULL for squares of tiles, and how many tiles wide a square is.

    There are at most `most` squares along either side, of a BlockMask with one layout.
    """
    rows, columns = tiles_of(blocks.n), tiles_of(blocks.m)
    step = max(1, -(-max(rows, columns) // max(most, 1)))
    shape = -(-rows // step), -(-columns // step)
    runs = blocks.rows
    row = np.repeat(np.arange(rows), np.diff(runs.start[0])) // step
    first, end = runs.first.astype(np.int64), runs.first + runs.count.astype(np.int64)
    whole, some = np.zeros(shape), np.zeros(shape)
    for column in range(shape[1]):
        tiles = np.clip(np.minimum(end, (column + 1) * step) - np.maximum(first, column * step),
                        0, None)
        some[:, column] = np.bincount(row, tiles, shape[0])
        whole[:, column] = np.bincount(row, tiles * (runs.tile < 0), shape[0])
    high, wide = (np.minimum(step, length - step * np.arange(count))
                  for length, count in zip((rows, columns), shape, strict=True))
    area = high[:, None] * wide
    return np.where(whole == area, FULL, np.where(some == 0, EMPTY, PARTIAL)), step


def _first(mask: Mask, index: tuple[int, ...] | None) -> tuple[int, ...]:
    return (0,) * len(mask.lead) if index is None else tuple(index)


def _at(mask: Mask, n: int, m: int, index: tuple[int, ...] | None) -> BlockMask:
    return mask.at(_first(mask, index)).compile(n, m)


def _rgb(colours: list[str]) -> np.ndarray:
    return np.array([[int(colour[at:at + 2], 16) for at in (1, 3, 5)] for colour in colours],
                    np.uint8)
