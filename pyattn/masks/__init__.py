"""Who may attend to whom: small masks, combined with ``&``, ``|``, ``~``, and their compiled form.

>>> from pyattn import masks
>>> mask = masks.causal() & (masks.window(2, 0) | masks.global_tokens([0]))
>>> print(mask.draw(6))
█·····
██····
███···
████··
█·███·
█··███
"""

from .algebra import Mask, per_head, restrict
from .block_mask import BlockMask, Runs
from .distances import distances
from .per_item import per_item
from .placement import placed
from .plan import plan
from .positions import (
    causal,
    fixed,
    full,
    global_tokens,
    predicate,
    staircase,
    strided,
    window,
    window_2d,
)
from .segments import packed, segments
from .stored import block_lists, blocks, dense, graph, lengths, random_blocks

__all__ = [
    "BlockMask",
    "Mask",
    "Runs",
    "block_lists",
    "blocks",
    "causal",
    "dense",
    "distances",
    "fixed",
    "full",
    "global_tokens",
    "graph",
    "lengths",
    "packed",
    "per_head",
    "per_item",
    "placed",
    "plan",
    "predicate",
    "random_blocks",
    "restrict",
    "segments",
    "staircase",
    "strided",
    "window",
    "window_2d",
]
