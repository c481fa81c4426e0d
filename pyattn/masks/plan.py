"""How to visit a mask's pairs in few tiles: regroup, gather, and merge what is left.

A mask is a union of branches, and some kinds of them are cheaper in another order of the tokens:

- distances that are multiples of a step (dilated windows, strides): tokens of one residue together;
- rectangles of a grid's cells: the cells patch by patch;
- keys that all queries see, and queries that see all keys: gathered, wherever they stand;
- anything else: in place.

Each branch becomes a part, without the pairs of those before it, so that the parts' results can be
merged by their log-sum-exps. What costs less, the parts or the mask in place, is decided by
counting tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple, cast

import numpy as np

from .algebra import And, Index, Mask, Not, Or, per_head
from .bits import TILE, spans, tiles_of
from .block_mask import BlockMask
from .order import Order, by_patches, listed, patches, reordered, residues
from .placement import Frame, PlainFrame, bottom_right, placed
from .positions import Relative, fixed, full, global_tokens, strided, window, window_2d

MOST_BRANCHES = 16

COUNTED = 2**22
"""Among more tiles than this, a mask that has a better order is not counted in place."""

NOTHING = ~full()

MERGE, GATHER = 1.0, 0.5
"""What merging a part, and gathering queries or keys, costs for 64 tokens, in tiles' worth."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some of the pairs, and the order that makes few tiles of them."""

    mask: Mask
    """Over slots where there is an order, else over positions."""
    queries: Order | None
    keys: Order | None
    n: int
    m: int
    offset: int | None
    heads: tuple[int, ...] | None = None
    """Which heads have pairs here, where not all do; the mask has an axis for them."""

    def for_all(self, heads: int) -> Part:
        """Return the same part with all heads, some of which have no pairs."""
        if self.heads is None:
            return self
        own = dict(zip(self.heads, cast("per_head", self.mask).masks, strict=True))
        mask = per_head(tuple(own.get(head, NOTHING) for head in range(heads)))
        return dataclasses.replace(self, mask=mask, heads=None)

    @property
    def items(self) -> int:
        """How many lists of tokens attend apart from each other."""
        return max((order.items for order in (self.queries, self.keys) if order), default=1)

    @functools.cached_property
    def blocks(self) -> BlockMask:
        """The part's mask, compiled."""
        n = self.n if self.queries is None else self.queries.slots
        m = self.m if self.keys is None else self.keys.slots
        return self.mask.compile(n, m, offset=self.offset)

    def layouts(self, batch: int, heads: int) -> np.ndarray:
        """Return which layout each item of `batch` sequences reads, int32 (items, heads)."""
        heads = heads if self.heads is None else len(self.heads)
        layout = np.broadcast_to(self.blocks.layout, (batch, self.items, heads))
        return np.ascontiguousarray(layout.reshape(-1, heads))

    @property
    def tiles(self) -> int:
        """How many tiles are visited, over items and heads."""
        return self.blocks.count().tiles

    @property
    def cost(self) -> float:
        """What the part costs, in tiles' worth: those visited, and moving tokens about."""
        moved = sum(2 * _size(order) for order in (self.queries, self.keys) if order)
        return self.tiles + GATHER * moved * self.blocks.layout.shape[-1]


def _size(order: Order) -> int:
    return tiles_of(int(np.count_nonzero(order.index >= 0)))


class Density(NamedTuple):
    """What planning achieved."""

    pairs: int
    """Allowed pairs."""
    executed: int
    """Pairs of the tiles that are visited."""
    parts: int
    """Partial results that are merged; 1 where the mask is left in place."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class plan(Mask):
    """A mask with the order in which its pairs are best visited.

    Wherever a mask is taken a plan is, and gives the same results: the engine regroups strided
    tokens, gathers scattered ones, and merges the partial results, if that visits fewer tiles. It
    does so for calls whose queries and keys are aligned alike in all batch items and that are not
    packed; others find the mask in place.

    Parameters
    ----------
    mask : Mask
        May have an axis for the heads, as `per_head` gives it.
    n, m : int
        Queries and keys.

    Notes
    -----
    Planned at the first use for given lengths, and kept as compiled masks are: made again from
    equal masks at each call, it costs a comparison. ``&`` plans anew.

    References
    ----------
    .. [1] Zheng et al., "SparTA: Deep-Learning Model Sparsity via Tensor-with-Sparsity-Attribute",
       OSDI 2022, section 4. Its blocks of 16 to 128 are tiles of 64 here.

    Examples
    --------
    >>> from pyattn import masks
    >>> mask = masks.causal() & (masks.window(127, 0) | masks.strided(128))
    >>> plan = masks.plan(mask, 16384, 16384)
    >>> plan.density()
    Density(pairs=3129408, executed=4706304, parts=2)
    >>> mask.compile(16384, 16384).count().tiles * 64 * 64          # in place
    68677632
    >>> [part.items for part in plan.parts()]                       # 128 residues
    [1, 128]
    """

    mask: Mask
    n: int
    m: int

    @property
    def lead(self) -> tuple[int, ...]:
        return self.mask.lead

    def at(self, index: tuple[int, ...]) -> Mask:
        return self.mask.at(index)

    def resolve(self, frame: Frame) -> Mask:
        return self.mask.resolve(frame)

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        return self.mask.allowed(i, j)

    def compile(self, n: int, m: int, *, offset: Any = None) -> BlockMask:
        """Compile the mask in place."""
        return self.mask.compile(n, m, offset=offset)

    def parts(self, offset: int | None = None) -> tuple[Part, ...]:
        """Return the parts to visit one after the other; a single one is the mask in place.

        `offset` is the position of query 0, by default that of the last query at the last key.
        """
        return _parts(self.mask, self.n, self.m, offset)

    def density(self, offset: int | None = None) -> Density:
        """Count the pairs allowed and those executed, for one batch item."""
        parts = self.parts(offset)
        counts = [part.blocks.count() for part in parts]
        return Density(sum(count.pairs for count in counts),
                       TILE * TILE * sum(count.tiles for count in counts), len(parts))

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return plan(self.mask & (other.mask if isinstance(other, plan) else other), self.n, self.m)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Held(global_tokens):
    """One half of `global_tokens`: the pairs whose key, or whose query, is one of them."""

    side: str = "keys"

    def allowed(self, i: Index, j: Index) -> np.ndarray:
        held = self._holds(i if self.side == "queries" else j)
        return np.broadcast_to(held, np.broadcast_shapes(i.shape, j.shape))

    def classify(self, i0: Index, i1: Index, j0: Index, j1: Index) -> np.ndarray:
        low, high = (i0, i1) if self.side == "queries" else (j0, j1)
        return self._held(low, high)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Distance(Relative):
    """Pairs of slots by their distance."""

    low: int | None
    high: int | None
    step: int


class Branch(NamedTuple):
    """Some of a mask's pairs, and what makes few tiles of them."""

    mask: Mask
    """Over positions."""
    rest: Mask
    """What of it is left to be tested in that order."""
    step: int = 1
    """Tokens of a residue go together."""
    grid: window_2d | None = None
    """Tokens of a patch of its cells do."""
    side: str = ""
    """"keys" or "queries": which are gathered."""
    index: Any = None
    """The positions of those that are."""


@functools.lru_cache(maxsize=64)
def _parts(mask: Mask, n: int, m: int, offset: int | None) -> tuple[Part, ...]:
    in_place = (Part(mask, None, None, n, m, offset),)
    if len(mask.lead) > 1 or not n or not m:
        return in_place
    frame = bottom_right(n, m) if offset is None else PlainFrame(n, m, offset)
    heads = [mask.at((head,)) for head in range(mask.lead[0])] if mask.lead else [mask]
    branches = [_branches(own, frame) for own in heads]
    candidates = []
    if any(_ordered(branch) for own in branches for branch in own):
        candidates.append(_assemble(branches, frame, offset))
        if tiles_of(n) * tiles_of(m) > COUNTED:
            return candidates[0] or in_place
    elif len(heads) == 1 and tiles_of(n) * tiles_of(m) <= COUNTED:
        candidates += [_assemble([found], frame, offset)
                       for found in (_lines(heads[0], in_place[0], frame), _stride(heads[0], frame))
                       if found]
    # some have no pairs, or would gather what lies elsewhere
    candidates = [tuple(part for part in parts if part.tiles) for parts in candidates]
    candidates = [parts for parts in candidates if parts]
    if not candidates:
        return in_place
    best = min(candidates, key=_cost)
    return best if _cost(best) < in_place[0].tiles else in_place


def _cost(parts: tuple[Part, ...]) -> float:
    """Return what visiting the parts costs; the first of several is what others merge with."""
    merged = [min(tiles_of(part.n), _size(part.queries) if part.queries else tiles_of(part.n))
              * part.blocks.layout.shape[-1] for part in parts]
    heads = {head for part in parts
             for head in part.heads or range(part.blocks.layout.shape[-1])}
    alone = tiles_of(parts[0].n) * len(heads)
    return sum(part.cost for part in parts) + MERGE * max(sum(merged) - alone, 0)


def _ordered(branch: Branch) -> bool:
    return branch.step > 1 or branch.grid is not None or branch.side != ""


def _alternatives(mask: Mask, frame: PlainFrame) -> list[tuple[Mask, ...]]:
    """Write a mask as a union of intersections."""
    if isinstance(mask, plan):
        return _alternatives(mask.mask, frame)
    if isinstance(mask, Or):
        return [atoms for part in mask.masks for atoms in _alternatives(part, frame)]
    if isinstance(mask, And):
        parts = [_alternatives(part, frame) for part in mask.masks]
        return [tuple(itertools.chain(*atoms)) for atoms in itertools.product(*parts)]
    if isinstance(mask, global_tokens) and not isinstance(mask, _Held):
        return [(_Held(mask.index, side),) for side in ("keys", "queries")]
    if isinstance(mask, fixed) and 0 < mask.columns < mask.stride:
        key = np.arange(frame.m)
        return [(fixed(mask.stride, 0),),
                (_Held(key[key % mask.stride >= mask.stride - mask.columns]),)]
    return [(mask,)]


def _branches(mask: Mask, frame: PlainFrame) -> list[Branch]:
    """Split a mask into branches, those of one order together; the pairs of several may overlap."""
    alternatives = _alternatives(mask, frame)
    if len(alternatives) > MOST_BRANCHES:
        return [Branch(mask, mask)]
    found: dict[Any, Branch] = {}
    for atoms in alternatives:
        new = _branch(atoms)
        key = _order_of(new)
        old = found.get(key)
        found[key] = new if old is None else old._replace(
            mask=old.mask | new.mask, rest=old.rest | new.rest)
    return list(found.values())


def _branch(atoms: tuple[Mask, ...]) -> Branch:
    whole = _all(atoms)
    for place, atom in enumerate(atoms):
        if isinstance(atom, _Held):
            rest = _all(atoms[:place] + atoms[place + 1:])
            return Branch(whole, rest, side=atom.side, index=atom.index)
    grid = next((atom for atom in atoms if isinstance(atom, window_2d)), None)
    if grid is not None:
        return Branch(whole, whole, grid=grid)
    steps = [atom.step for atom in atoms if isinstance(atom, Relative) and atom.step > 1]
    return Branch(whole, whole, step=max(steps, default=1))


def _order_of(branch: Branch) -> tuple[Any, ...]:
    """Return what is equal for branches of one order."""
    index = None if branch.index is None else branch.index.tobytes()
    grid = None if branch.grid is None else (branch.grid.shape[1], _patch(branch.grid))
    return branch.step, grid, branch.side, index


def _patch(grid: window_2d) -> tuple[int, int]:
    """Return the shape of a tile's worth of cells that meets the fewest others of its shape."""
    shapes = [(TILE // width, width) for width in (8, 16, 4, 32, 2, 64, 1)]
    return min(shapes, key=lambda shape: math.prod(
        1 + 2 * -(-reach // side) for reach, side in zip(grid.reach, shape, strict=True)))


def _all(atoms: tuple[Mask, ...]) -> Mask:
    atoms = tuple(atom for atom in atoms if not isinstance(atom, full))
    if not atoms:
        return full()
    return atoms[0] if len(atoms) == 1 else And(atoms)


def _assemble(heads: list[list[Branch]], frame: PlainFrame, offset: int | None) -> tuple[Part, ...]:
    """Make parts of the branches of each head, no pair in two of them."""
    shares: dict[Any, tuple[Branch, list[Mask]]] = {}
    for head, branches in enumerate(heads):
        before: list[Mask] = []
        for branch in sorted(branches, key=lambda b: (b.side, b.step)):
            rules = shares.setdefault(_order_of(branch), (branch, [NOTHING] * len(heads)))[1]
            rules[head] = _all((branch.rest, *(~mask for mask in before)))
            before.append(branch.mask)
    parts = (_part(branch, rules, frame, offset) for branch, rules in shares.values())
    return tuple(part for part in parts if part is not None)


def _part(branch: Branch, rules: list[Mask], frame: PlainFrame, offset: int | None) -> Part | None:
    """Make the part of a branch, whose pairs are those of `rules`, one for each head."""
    n, m, start = frame.n, frame.m, frame.offset
    queries = keys = None
    if branch.side == "keys":
        keys = listed(branch.index[branch.index < m])
    elif branch.side == "queries":
        rows = branch.index - start
        queries = listed(rows[(rows >= 0) & (rows < n)])
    elif branch.step > 1:
        queries, keys = residues(n, branch.step, start), residues(m, branch.step)
    elif branch.grid is not None:
        columns, shape = branch.grid.shape[1], _patch(branch.grid)
        queries, keys = patches(n, columns, shape, start), patches(m, columns, shape)
    if any(order is not None and order.slots == 0 for order in (queries, keys)):
        return None

    def moved(rule: Mask) -> Mask:
        slots = _on_slots(rule, branch.step) if branch.step > 1 and queries is not None else None
        if slots is not None and queries is not None:
            first = queries.index[:, 0]
            ahead = (first + start - np.arange(branch.step)) // branch.step
            return placed(slots, np.where(first < 0, 0, ahead))
        if branch.grid is not None and queries is not None and keys is not None:
            return by_patches(rule, queries, keys, frame)
        rows = np.arange(n)[None] if queries is None else queries.taken
        columns = np.arange(m)[None] if keys is None else keys.taken
        return reordered(rule.resolve(frame), rows, columns)

    heads = tuple(head for head, rule in enumerate(rules) if rule is not NOTHING)
    found = [rules[head] for head in heads]
    if queries is not None or keys is not None:
        found, offset = [moved(rule) for rule in found], None
    return Part(per_head(tuple(found)) if len(rules) > 1 else found[0], queries, keys, n, m, offset,
                None if len(heads) == len(rules) else heads)


def _on_slots(mask: Mask, step: int) -> Mask | None:
    """Return what a mask is among tokens `step` apart, by slots; None if not by distance alone."""
    if isinstance(mask, full):
        return mask
    if isinstance(mask, Relative):
        return _Distance(None if mask.low is None else -(-mask.low // step),
                         None if mask.high is None else mask.high // step,
                         mask.step // math.gcd(mask.step, step))
    if isinstance(mask, Not):
        inner = _on_slots(mask.mask, step)
        return None if inner is None else ~inner
    if isinstance(mask, And | Or):
        parts = tuple(slots for part in mask.masks if (slots := _on_slots(part, step)) is not None)
        return type(mask)(parts) if len(parts) == len(mask.masks) else None
    return None


def _lines(mask: Mask, in_place: Part, frame: PlainFrame) -> list[Branch]:
    """Find scattered keys that most queries see, and queries that see most keys; none is []."""
    blocks = in_place.blocks
    rows, columns, name = _partial_tiles(blocks)
    sparse = np.bitwise_count(blocks.bits).sum(1)[name] < TILE * TILE // 4
    found = {}
    for side, line, bits, length in (("keys", columns, blocks.bits_t, frame.m),
                                     ("queries", rows, blocks.bits, frame.n)):
        tiles = np.zeros(tiles_of(length), np.int64)
        np.add.at(tiles, line[sparse], 1)
        seen = np.zeros((len(tiles), TILE), np.int64)
        np.add.at(seen, line[sparse], np.bitwise_count(bits[name[sparse]]))
        often = (seen >= TILE // 2 * tiles[:, None]) & (tiles[:, None] >= 4)
        index = np.flatnonzero(often.ravel())
        found[side] = index[index < length]
    found["queries"] = found["queries"] + frame.offset
    if not any(index.size for index in found.values()):
        return []
    held = [Branch(_Held(index, side) & mask, mask, side=side, index=index)
            for side, index in found.items() if index.size]
    others = _all((mask, *(~_Held(branch.index, branch.side) for branch in held)))
    return [Branch(others, others), *held]


def _partial_tiles(blocks: BlockMask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, column and name of every partial tile of the first layout."""
    runs = blocks.rows
    mine = slice(runs.start[0, 0], runs.start[0, -1])
    row = np.repeat(np.arange(runs.start.shape[1] - 1), np.diff(runs.start[0]))
    partial = runs.tile[mine] >= 0
    count = runs.count[mine][partial].astype(np.int64)
    first, place = (x[mine][partial].astype(np.int64) for x in (runs.first, runs.tile))
    return np.repeat(row[partial], count), spans(first, count), runs.names[spans(place, count)]


def _stride(mask: Mask, frame: PlainFrame) -> list[Branch]:
    """Find out, from some rows, whether most keys lie a common step apart; none is []."""
    sample = np.unique(np.linspace(0, frame.n - 1, 32).astype(np.int64))
    seen = mask.resolve(frame).allowed(sample[:, None], np.arange(frame.m)[None, :])
    row, key = np.nonzero(seen)
    apart = np.diff(key)[np.diff(row) == 0]
    apart = apart[apart > 1]
    if len(apart) < 2 * len(sample):
        return []
    step = int(np.bincount(apart).argmax())
    if np.count_nonzero(apart == step) < len(apart) / 2:
        return []
    near = window(TILE, TILE) | ~strided(step)
    return [Branch(mask & near, mask & near), Branch(mask, mask, step=step)]
