"""Blocks of queries and keys whose connections are learned, each with a gate of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import OptionError, require_broadcast, require_choice, require_integer
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..engines.problem import GateForm
from ..features.connections import block_offsets, is_relative, own_blocks, require_blocks
from ..features.gates import KINDS, GatesSaved, sample
from ..masks.algebra import host_array
from .attention import attend, handed_on

REFUSED = ("gate", "window", "segments")


@dataclasses.dataclass(frozen=True)
class GatedSaved(Saved):
    """What attention keeps, the gates that were drawn, and the logits they came from."""

    attended: Any
    sampled: GatesSaved | None
    """None where the gates were frozen."""
    gate_logits: Array
    own: np.ndarray = dataclasses.field(metadata=ON_HOST)
    """bool (query blocks, key blocks): blocks that are always open."""
    drawn: dict[str, np.ndarray] = dataclasses.field(metadata=ON_HOST)

    @property
    def decisions(self) -> dict[str, Array]:
        """``gates`` or ``noise``, and those of the attention."""
        return {**self.attended.decisions, **self.drawn}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None, *, reward: Any = None,
                 baseline: Any = 0.0) -> Any:
        """Gradients of the array arguments given, ``gate_logits`` after ``v``.

        Parameters
        ----------
        dout, dlse : array
            Gradients of the output and of the log-sum-exp.
        reward, baseline : float, or array that broadcasts to the logits
            For ``kind="policy"``: gate_logits then has the gradient of ``-reward``, by
            `pyattn.features.policy_gradient`; 0 without a reward.
        """
        found = self.attended.backward(dout, dlse)._asdict()
        xp, logits = arrays.namespace(self.gate_logits), self.gate_logits
        if self.sampled is None:
            dlogits = xp.zeros_like(logits)
        else:
            dgates = found.pop("gate")
            # forward: gates = own or gates
            dgates = xp.where(_on_device(xp, self.own, dgates), xp.zeros_like(dgates), dgates)
            if is_relative(logits):
                # forward: gates[r, c] = gates[c - r + rows - 1]
                dgates = _summed_by_offset(xp, dgates)
            given = {} if reward is None else {"reward": reward, "baseline": baseline}
            dlogits = self.sampled.backward(arrays.reshape(xp, dgates, logits.shape),
                                            **given).logits
        operands = {name: found.pop(name) for name in ("q", "k", "v")}
        found = {**operands, "gate_logits": dlogits, **found}
        return gradients(tuple(found))(**found)


def _on_device(xp: Any, x: np.ndarray, like: Array) -> Array:
    return arrays.from_host(xp, x, arrays.device(like))


def _summed_by_offset(xp: Any, x: Array) -> Array:
    """Sum (..., rows, columns) along its diagonals: (..., rows + columns - 1)."""
    *lead, rows, columns = x.shape
    # rows in reverse, each one place further to the right than the one above
    wide = xp.concat([xp.flip(x, axis=-2), xp.zeros((*lead, rows, rows), dtype=x.dtype,
                                                    device=arrays.device(x))], axis=-1)
    line = arrays.reshape(xp, wide, (*lead, rows * (columns + rows)))
    width = columns + rows - 1
    return xp.sum(arrays.reshape(xp, line[..., :rows * width], (*lead, rows, width)), axis=-2)


@differentiable
def gated_attention(q: Array, k: Array, v: Array, gate_logits: Array, *, block_size: int,
                    kind: str = "straight_through", frozen: bool = False,
                    temperature: float | None = None, causal: bool | str = False,
                    mask: Any = None, rng: Any = None, decisions: dict[str, Any] | None = None,
                    **options: Any) -> tuple[Any, GatedSaved]:
    """Attention through gates between blocks of tokens, which learn what to leave open.

    The weight of key j for query i is ``g e^score`` in the softmax, g the gate of their blocks, in
    [0, 1]. The block that holds a query's own position is always open. With logits a and
    ``s = sigmoid(a)``: "straight_through": open where a > 0, with the gradient of sigmoid(a / t);
    "concrete": ``sigmoid((a + noise) / t)``; "hard_concrete": that, stretched and clipped, exactly
    0 and 1 at times; "policy": drawn, open with probability s, and taught by a reward.
    E.g. ``block_size=2``, four tokens, logits [[-1, -2], [3, -1]]: 0 and 1 see {0, 1}, 2 and 3 all.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    gate_logits : array, broadcasting to (..., H, query blocks, key blocks), any float dtype
        Or of shape (H or 1, query blocks + key blocks - 1), one for each offset between blocks:
        number ``c - r + query blocks - 1`` is for query block r and key block c.
    block_size : int, >= 1
        Tokens in a block; the last one may be shorter.
    kind : "straight_through", "concrete", "hard_concrete" or "policy"
        How gates come from logits; see `pyattn.features` for the samplers by themselves.
    frozen : bool
        Gates are decided: open where a > 0 (or where ``decisions["gates"]`` are), and closed blocks
        are not visited. Logits then have the gradient 0.
    temperature : float, > 0, optional
        t, 1 by default, for "hard_concrete" 2/3.
    causal : bool or "top_left"
        True: query i stands at position ``i + M - N`` and sees keys up to its own; "top_left": i.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    rng : int, numpy.random.Generator or None
    decisions : dict, optional
        ``gates`` (for "straight_through", "policy", frozen) or ``noise``, in the shape of the
        logits; ``dropout_seed``.
    **options
        As for `pyattn.attention`, but ``gate``, ``window`` and ``segments``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0. With ``return_lse`` a tuple, as for `pyattn.attention`.
        Gradients: q, k, v, gate_logits, then those of options. The gradient of a policy takes
        ``saved.backward(dout, reward=..., baseline=...)``.

    Raises
    ------
    ShapeError
        The logits are not those of so many blocks and heads.
    OptionError
        An unknown kind, a temperature that is not positive, decisions of another kind.

    Notes
    -----
    While gates learn, all blocks are visited, O(N M (D + E)): a closed gate's gradient, ``sum of
    u (dp - delta)`` with ``u = e^(score - lse)``, says what opening it would bring, and so it can
    open again. Frozen, O(open blocks * block_size^2 (D + E)), by tiles (``saved.stats``). The
    gradient of gates is summed by block, never by pair. With lengths of items the own block is that
    of a whole item. `pyattn.features.gate_mask` exports what was learned.

    References
    ----------
    .. [1] Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
       Conditional Computation", 2013, arXiv:1308.3432 (straight through).
    .. [2] Maddison et al., "The Concrete Distribution", 2017, arXiv:1611.00712.
    .. [3] Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
       arXiv:1712.01312 (hard concrete). These gates within attention are no paper's own form.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 8, 4))
    >>> logits = np.full((2, 4, 4), -1.0)
    >>> out, saved = pyattn.gated_attention.forward(q, k, v, logits, block_size=2)
    >>> np.allclose(out, pyattn.block_diagonal_attention(q, k, v, block_size=2))
    True
    >>> bool((saved.backward(out).gate_logits[0, 0, 1:] != 0).all())
    True
    """
    options = handed_on(options, REFUSED, "gates are those of blocks in one sequence")
    block_size = require_integer("block_size", block_size, minimum=1)
    kind = require_choice("kind", kind, KINDS)
    causal = require_choice("causal", causal, (False, True, "top_left"))
    own = own_blocks(q.shape[-2], k.shape[-2], block_size, causal)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    require_blocks(gate_logits, own, (*batch, q.shape[-3]))
    known = dict(decisions or {})
    if "dropout_seed" in known:
        options["decisions"] = {"dropout_seed": known.pop("dropout_seed")}
    options |= {"rng": rng, "causal": causal}
    xp = arrays.namespace(q, k, v, gate_logits)
    if frozen:
        return _frozen(q, k, v, gate_logits, own, block_size, mask, known, options)
    rng = options["rng"] = np.random.default_rng(rng)
    gates, sampled = sample(kind, gate_logits, temperature=temperature, rng=rng, decisions=known)
    if is_relative(gates):
        index = _on_device(xp, block_offsets(*own.shape).reshape(-1), gates)
        gates = arrays.reshape(xp, xp.take(gates, index, axis=-1), (-1, *own.shape))
    gates = xp.where(_on_device(xp, own, gates), xp.ones_like(gates), gates)
    out, attended = attend(q, k, v, mask=mask, gate=gates, gate_form=GateForm(block=block_size),
                           **options)
    return out, GatedSaved(attended, sampled, gate_logits, own, sampled.decisions)


def _frozen(q: Array, k: Array, v: Array, gate_logits: Array, own: np.ndarray, block_size: int,
            mask: Any, decisions: dict[str, Any],
            options: dict[str, Any]) -> tuple[Any, GatedSaved]:
    unknown = sorted(set(decisions) - {"gates"})
    if unknown:
        raise OptionError(f"decisions of frozen gates may hold gates; got {', '.join(unknown)}")
    gates = host_array(decisions.get("gates", host_array(gate_logits) > 0)) > 0
    require_broadcast("gates", gates.shape, tuple(gate_logits.shape), "the logits' shape")
    gates = np.broadcast_to(gates, gate_logits.shape)
    open_ = gates[:, block_offsets(*own.shape)] if is_relative(gate_logits) else gates
    pattern = masks.restrict(masks.blocks(open_ | own, block_size), mask)
    out, attended = attend(q, k, v, mask=pattern, **options)
    return out, GatedSaved(attended, None, gate_logits, own, {"gates": gates})
