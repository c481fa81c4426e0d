"""Two branches of native sparse attention: to compressed blocks, and to blocks selected by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer
from ..differentiable import Saved, gradients
from ..engines import selected as listed_blocks
from ..engines.placement import first_position
from ..features.compression import WEIGHTS, complete_blocks, compress
from ..features.importance import important_blocks, require_choices
from ..masks.algebra import host_array
from .attention import attention


@dataclasses.dataclass(frozen=True)
class CompressedSaved(Saved):
    """Attention to compressed keys, and how keys and values were compressed."""

    attended: Any
    k: Any
    v: Any
    k_weights: tuple[str, ...] | None
    """Names of the weights that keys were compressed with; None if none were given."""
    v_weights: tuple[str, ...] | None

    @property
    def keys(self) -> Array:
        """The compressed keys."""
        return self.attended.k

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention; a compressed key counts as one."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k, v and, where given, of the weights, as dicts."""
        grads = self.attended.backward(dout, dlse)
        found, more = {"q": grads.q}, {}
        for name in "kv":
            own = getattr(self, name).backward(getattr(grads, name))._asdict()
            found[name] = own.pop("x")
            if getattr(self, f"{name}_weights") is not None:
                more[f"{name}_weights"] = own
        found |= more
        return gradients(tuple(found))(**found)


def compressed(q: Array, k: Array, v: Array, *, k_weights: Mapping[str, Array] | None,
               v_weights: Mapping[str, Array] | None, block_size: int, stride: int,
               compression: str, activation: str, causal: bool | str, q_lengths: Any,
               kv_lengths: Any, scale: float | None) -> tuple[tuple[Array, Array], CompressedSaved]:
    """Attend to blocks of keys, each summed up in one; returns ``((out, lse), saved)``."""
    if k.shape[-2:-1] != v.shape[-2:-1]:
        raise ShapeError(f"k and v must have equally many tokens; got k {tuple(k.shape)}, "
                         f"v {tuple(v.shape)}")
    require_choice("compression", compression, tuple(WEIGHTS))
    done = {}
    for name, x, weights in (("k", k, k_weights), ("v", v, v_weights)):
        known = ("pe", *WEIGHTS[compression])
        unknown = sorted(set(weights or {}) - set(known))
        if unknown:
            raise OptionError(f"{name}_weights must be of {', '.join(known)} for "
                              f"compression={compression!r}; got {', '.join(unknown)}")
        done[name] = compress.forward(x, **(weights or {}), block_size=block_size, stride=stride,
                                      kind=compression, activation=activation, lengths=kv_lengths)
        if done[name][0].shape[-1] != x.shape[-1]:
            raise ShapeError(f"{name}_weights must give {name} its own width, {x.shape[-1]}; got "
                             f"{done[name][0].shape[-1]}")
    n, m = q.shape[-2], k.shape[-2]
    mask = None
    if causal is not False:
        mask = masks.placed(masks.staircase(block_size, stride),
                            first_position(n, m, causal, q_lengths, kv_lengths))
    there = None if kv_lengths is None else complete_blocks(host_array(kv_lengths), block_size,
                                                            stride)
    found, attended = attention.forward(q, done["k"][0], done["v"][0], mask=mask, scale=scale,
                                        q_lengths=q_lengths, kv_lengths=there, return_lse=True)
    return found, CompressedSaved(attended, done["k"][1], done["v"][1], _names(k_weights),
                                  _names(v_weights))


def _names(weights: Mapping[str, Array] | None) -> tuple[str, ...] | None:
    return None if weights is None else tuple(weights)


@dataclasses.dataclass(frozen=True)
class SelectedSaved(Saved):
    """Attention to the blocks listed, and what listing them took."""

    attended: Any
    weighing: int
    """Operations of the products that told how important blocks are."""

    @property
    def decisions(self) -> dict[str, Array]:
        """``blocks``, (..., G, N, count)."""
        return self.attended.decisions

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention, the products that told the importance among the flops."""
        stats = self.attended.stats
        return stats | {"flops": stats["flops"] + self.weighing}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of q, k and v: the lists are constants."""
        return self.attended.backward(dout, dlse)


def selected(q: Array, k: Array, v: Array, *, lse: Array, by: CompressedSaved, block_size: int,
             stride: int, select_block: int, num_selected: int, num_initial: int, num_local: int,
             causal: bool | str, q_lengths: Any, kv_lengths: Any, scale: float | None,
             decisions: Mapping[str, Any] | None,
             ) -> tuple[tuple[Array, Array], SelectedSaved]:
    """Attend to the blocks that the compressed branch `by`, with its `lse`, weighs most."""
    require_choices(num_selected, num_initial, num_local, causal=causal is not False)
    weighing = 0
    if decisions is None or "blocks" not in decisions:
        blocks = important_blocks(
            q, by.keys, lse, tokens=k.shape[-2], block_size=block_size, stride=stride,
            select_block=select_block, num_selected=num_selected, num_initial=num_initial,
            num_local=num_local, causal=causal, q_lengths=q_lengths, kv_lengths=kv_lengths,
            scale=scale)
        widths = q.shape[-1] + by.attended.v.shape[-1]
        weighing = by.stats["flops"] * q.shape[-1] // max(1, widths)
    else:
        blocks = np.asarray(arrays.to_host(decisions["blocks"]))
    found, attended = listed_blocks.forward(
        q, k, v, blocks, block_size=select_block, causal=causal, q_lengths=q_lengths,
        kv_lengths=kv_lengths, scale=scale, return_lse=True)
    return found, SelectedSaved(attended, weighing)


def branches(q: Array, far: tuple[Array, Array], listed: tuple[Array, Array],
             weights: tuple[Mapping[str, Array] | None, Mapping[str, Array] | None], *,
             compression: str, activation: str, block_size: int, stride: int, select_block: int,
             num_selected: int, num_initial: int, num_local: int,
             decisions: Mapping[str, Any] | None,
             **shared: Any) -> tuple[tuple[Any, CompressedSaved], tuple[Any, SelectedSaved]]:
    """Return both branches, each as ``((out, lse), saved)``, of keys and values of their own."""
    # beyond the tokens, sizes make no difference, but they may be too large to compute with
    beyond = listed[0].shape[-2] + 1
    block_size = require_integer("block_size", block_size, minimum=1)
    shared |= {"block_size": block_size if any(weights) else min(block_size, beyond),
               "stride": min(require_integer("stride", stride, minimum=1), beyond)}
    select_block = min(require_integer("select_block", select_block, minimum=1),
                       max(listed_blocks.TILE, beyond))
    coarse = compressed(q, far[0], far[1], k_weights=weights[0], v_weights=weights[1],
                        compression=compression, activation=activation, **shared)
    fine = selected(q, listed[0], listed[1], lse=coarse[0][1], by=coarse[1],
                    select_block=select_block, num_selected=num_selected, num_initial=num_initial,
                    num_local=num_local, decisions=decisions, **shared)
    return coarse, fine
