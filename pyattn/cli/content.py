"""Who attends to whom where tokens' contents, or a graph, decide: for inputs made up here."""

from __future__ import annotations

from typing import Any

import numpy as np

import pyattn
from pyattn import masks
from pyattn.checks import OptionError, require_integer
from pyattn.features.partition import level_sizes

WIDTH, CLUSTERS = 16, 8

NAMES = ("adaptive_span_attention", "bp_attention", "gat_attention", "graph_attention",
         "lsh_attention", "nsa_attention", "routing_attention", "top_k_attention")
"""The variants that are drawn here."""

RANDOM = "random tokens (seed 0)"


def example(name: str, n: int, m: int, heads: int) -> tuple[Any, ...]:
    """Return arrays to call the variant with, the same each time.

    Raises
    ------
    OptionError
        It attends among n tokens, and m is another number.
    """
    rng = np.random.default_rng(0)
    for side, count in (("--n", n), ("--m", m)):
        require_integer(side, count, minimum=0)
    q, k, v = (rng.standard_normal((heads, tokens, WIDTH)).astype(np.float32)
               for tokens in (n, m, m))
    if name in ("lsh_attention", "graph_attention", "gat_attention") and n != m:
        raise OptionError(f"--m must be left out for {name}, which attends among the same tokens; "
                          f"got {m} for {n}")
    if name == "lsh_attention":
        return q, v
    if name == "routing_attention":
        return q, k, v, rng.standard_normal((heads, CLUSTERS, WIDTH)).astype(np.float32)
    if name == "nsa_attention":
        return q, k, v, np.ones(3, np.float32)
    if name == "adaptive_span_attention":
        return q, k, v, np.zeros(1, np.float32)
    if name == "graph_attention":
        return q, k, v, _graph(n, rng)
    if name == "gat_attention":
        return q, *rng.standard_normal((2, heads, WIDTH)).astype(np.float32), _graph(n, rng)
    return q, k, v


def _graph(n: int, rng: np.random.Generator) -> Any:
    """A ring, and as many edges between tokens drawn at random."""
    import scipy.sparse

    token = np.arange(n)
    rows, columns = np.tile(token, 2), np.concatenate([(token + 1) % max(1, n),
                                                       rng.integers(0, max(1, n), n)])
    return scipy.sparse.coo_array((np.ones(2 * n), (rows, columns)), shape=(n, n))


def pattern(name: str, arguments: tuple[Any, ...],
            options: dict[str, Any]) -> tuple[masks.Mask, int, str]:
    """Return the mask of each head, from the record of a call; its columns, and what they are.

    Examples
    --------
    >>> from pyattn.cli.content import example, pattern
    >>> mask, m, told = pattern("bp_attention", example("bp_attention", 4, 4, 1), {"step": 1})
    >>> print(mask.draw(4, m))
    ███·
    ████
    ████
    █·██
    >>> told
    'spans of tokens, each drawn at its first'
    """
    _, saved = getattr(pyattn, name).forward(*arguments, **options)
    heads, told = range(arguments[0].shape[0]), RANDOM
    columns = np.arange(arguments[1 if name != "gat_attention" else 0].shape[-2])
    if name == "lsh_attention":
        drawn = [saved.attended.mask.at((h, 0)) for h in heads]
    elif name == "adaptive_span_attention":
        told, drawn = "a span of 0, the soft edge alone", [saved.attended.mask] * len(heads)
    elif name == "routing_attention":
        drawn = [_routes(saved, h) for h in heads]
    elif name == "nsa_attention":
        sums = saved.branches[0].saved.attended.k.shape[-2]
        drawn = [masks.dense(_branches(saved, h)) for h in heads]
        told += f", and after them {sums} keys that each sum up several"
        return masks.per_head(tuple(drawn)), len(columns) + sums, told
    else:
        if name == "bp_attention":
            told, columns = "spans of tokens, each drawn at its first", _first_tokens(len(columns))
        elif name != "top_k_attention":
            told = "a ring, and as many edges drawn at random"
        edges = saved.attended.edges
        drawn = [masks.graph(_listed(edges, own, columns)) for own in edges.owner[0]]
    return masks.per_head(tuple(drawn)), int(columns.max(initial=-1)) + 1, told


def _listed(edges: Any, own: int, columns: np.ndarray) -> Any:
    """The pairs of a list, key j in column ``columns[j]``."""
    import scipy.sparse

    start = edges.start[own]
    key = columns[edges.key[start[0]:start[-1]]]
    return scipy.sparse.csr_array((np.ones(len(key)), key, start - start[0]),
                                  shape=(len(start) - 1, int(columns.max(initial=-1)) + 1))


def _first_tokens(n: int) -> np.ndarray:
    """The first token of each node of the binary tree, level after level."""
    return np.concatenate([np.zeros(0, int), *(
        np.arange(size) << level for level, size in enumerate(level_sizes(n)))])


def _routes(saved: Any, head: int) -> masks.Mask:
    """Who sees whom in the clusters of a head."""
    mask = saved.attended.mask
    if saved.mode == "assign":
        return mask.at((head, 0))
    seen = np.zeros((saved.q.shape[-2], saved.k.shape[-2]), bool)
    clusters = list(zip(saved.clusters[head], saved.key_clusters[head], strict=True))
    for c, (queries, keys) in enumerate(clusters):
        allowed = mask.pick((head * len(clusters) + c, 0)).dense(len(queries), len(keys))
        slots = np.flatnonzero(queries >= 0), np.flatnonzero(keys >= 0)
        seen[np.ix_(queries[slots[0]], keys[slots[1]])] |= allowed[np.ix_(*slots)]
    return masks.dense(seen)


def _branches(saved: Any, head: int) -> np.ndarray:
    """Who sees whom, and after the tokens, what stands for several."""
    far, listed, near = (branch.saved for branch in saved.branches)
    far, n, m = far.attended, near.q.shape[-2], near.k.shape[-2]
    seen = near.mask.dense(n, m)
    if hasattr(listed.attended, "edges"):
        edges = listed.attended.edges
        own = _listed(edges, edges.owner[0, head], np.arange(m))
        seen[np.repeat(np.arange(n), np.diff(own.indptr)), own.indices] = True
    else:
        call = listed.attended
        blocks = np.zeros((n, -(-m // call.block_size) + 1), bool)
        # -1, for none, is the last column
        np.put_along_axis(blocks, saved.decisions["blocks"][head].astype(np.int64), True, axis=1)
        chosen = np.repeat(blocks[:, :-1], call.block_size, axis=1)[:, :m]
        position = np.arange(n)[:, None] + (call.placement.offset[0] if call.causal else m)
        seen |= chosen & (np.arange(m) <= position)
    sums = far.mask.dense(n, far.k.shape[-2])
    if far.bias is not None:
        # a group without members
        sums = sums & (far.bias[head] > -np.inf)
    return np.concatenate([seen, sums], axis=1)
