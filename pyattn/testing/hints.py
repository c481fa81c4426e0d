"""Known mistakes: if a wrong formula fits an array much better than the right one, say which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyattn import arrays, reference

from .cases import Inputs

_BETTER = 0.2
"""A wrong formula explains an array if it leaves this much of the difference, or less."""

_MOST_PAIRS = 2 ** 24
"""Above so many pairs of query and key, trying every mistake would take minutes."""

Call = dict[str, Any]
"""Arguments of `reference.attention`, by name."""


def hint(name: str, got: Any, inputs: Inputs, exact: dict[str, np.ndarray]) -> str:
    """Say which known mistake explains `got`, the array `name` of a kernel; "" if none does.

    Nothing is tried on problems of more than 16 million pairs of query and key.

    Parameters
    ----------
    name : {"out", "lse", "dq", "dk", "dv", ...}
    got : array of any library
    inputs : Inputs
        What the kernel was given.
    exact : dict
        The right arrays by name.
    """
    got = np.asarray(arrays.to_host(got)).astype(np.float64)
    right = exact[name].astype(np.float64)
    pairs = exact["lse"].size * inputs.k.shape[-2]
    if got.shape != right.shape or not got.size or pairs > _MOST_PAIRS:
        return ""
    with np.errstate(all="ignore"):
        leak = _leak(name, got, right, inputs, exact)
        if leak:
            return leak
        wrong = [(_distance(got, x.astype(np.float64), right), words)
                 for words, x in _wrong(name, inputs, exact) if x.shape == right.shape]
        distance, words = min(wrong, default=(np.inf, ""), key=lambda pair: pair[0])
        return words if distance < _BETTER * _distance(got, right, right) else ""


def _distance(got: np.ndarray, wanted: np.ndarray, right: np.ndarray) -> float:
    """Root mean square difference where both are finite; inf where that is too little to tell."""
    both = np.isfinite(got) & np.isfinite(wanted)
    if not both.any() or both.sum() < 0.5 * np.isfinite(right).sum():
        return np.inf
    return float(np.sqrt(np.mean((got[both] - wanted[both]) ** 2)))


def _leak(name: str, got: np.ndarray, right: np.ndarray, inputs: Inputs,
          exact: dict[str, np.ndarray]) -> str:
    """NaN where there should be none: of masked pairs, or of rows that see no key."""
    empty = exact["lse"] == -np.inf
    if (name == "lse" and (got[empty] != -np.inf).any()
            and np.allclose(got[~empty], right[~empty], rtol=0.01, atol=0.01, equal_nan=True)):
        return "rows that see no key must have lse -inf"
    if not (np.isfinite(right) & ~np.isfinite(got)).any():
        return ""
    given = (inputs.q, inputs.k, inputs.v, inputs.dout)
    if not all(x is None or np.isfinite(x.astype(np.float32)).all() for x in given):
        return ("NaN or inf of a masked pair comes through: select by the mask, do not multiply by "
                "0 or add -inf (0 * NaN and NaN - inf are NaN)")
    if empty.any():
        return ("rows that see no key become NaN: their out is 0, their lse -inf, and they add "
                "nothing to a gradient")
    return ""


def _wrong(name: str, inputs: Inputs,
           exact: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """All wrong versions of the array `name`, each after the mistake in words."""
    call: Call = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.options}
    if name in ("out", "lse"):
        for words, change in _changes(call):
            out, lse = reference.attention(**{**call, **change})
            yield words, out if name == "out" else lse
        yield from _wrong_out(call, exact) if name == "out" else _wrong_lse(exact["lse"])
    elif inputs.dout is not None:
        argument = name.removeprefix("d")
        for words, change in _changes(call):
            yield words, _gradient(argument, inputs, {**call, **change})
        yield from _wrong_gradient(argument, inputs, call, exact)


def _gradient(argument: str, inputs: Inputs, call: Call, dlse: Any = None) -> np.ndarray:
    dlse = inputs.dlse if dlse is None else dlse
    grads = reference.attention_backward(dout=inputs.dout, dlse=dlse, **call)
    return np.asarray(grads.get(argument, np.empty(0)))


def _changes(call: Call) -> Iterator[tuple[str, Call]]:
    """Mistakes that are the right formula for other arguments."""
    (h, n, d), (g, m) = call["q"].shape[-3:], call["k"].shape[-3:-1]
    causal, window = call.get("causal", False), call.get("window")
    scale = 1 / np.sqrt(d) if call.get("scale") is None else np.asarray(call["scale"])

    yield "the scale is missing", {"scale": np.ones(h)}
    yield "the scale is applied twice", {"scale": np.broadcast_to(scale * scale, h)}
    if call.get("scale") is None:
        yield "the scale is 1 / D, not 1 / sqrt(D)", {"scale": 1 / d}
    else:
        yield "the scale that was given is ignored", {"scale": None}
    if causal is True:
        left = window[0] if isinstance(window, tuple | list) else window
        yield "causality is off by one: j <= i + 1 for j <= i", {"causal": False,
                                                                 "window": (left, 1)}
        yield "causality is off by one: j < i for j <= i", {"causal": False, "window": (left, -1)}
    yield from _shifted_masks(call)
    if causal:
        yield "causality is ignored", {"causal": False}
        if n != m or any(call.get(x) is not None for x in ("q_lengths", "kv_lengths", "segments")):
            other, words = ((True, "top left, bottom right") if causal == "top_left" else
                            ("top_left", "bottom right (by the lengths), top left"))
            wanted, used = words.split(", ")
            yield (f"the causal diagonal is aligned to the {used}; it belongs to the {wanted}",
                   {"causal": other})
            if causal is True and (call.get("kv_lengths") is not None
                                   or call.get("q_lengths") is not None):
                mask = np.arange(m) <= np.arange(n)[:, None] + m - n
                yield ("the causal diagonal is aligned by the padded sizes, not by the lengths",
                       {"causal": False, "mask": _and(call.get("mask"), mask)})
    elif n > 1:
        yield "a causal mask is applied where none was asked for", {"causal": True}
    if window is not None:
        yield "the window is ignored", {"window": None}
        if np.ndim(window):
            yield "the window's left and right are swapped", {"window": tuple(window)[::-1]}
        left, right = (window, window) if np.ndim(window) == 0 else window
        for change, words in ((-1, "one key too narrow"), (1, "one key too wide")):
            yield f"the window is {words}", {"window": tuple(
                None if x is None else max(0, x + change) for x in (left, right))}
    if 1 < g < h:
        order = np.arange(h) % g
        yield ("query head h reads key head h % G; it must read h // (H // G)",
               {x: np.take(call[x], order, axis=-3) for x in "kv"})
    for option, words in (("softcap", "softcap is ignored"), ("bias", "the bias is ignored"),
                          ("gate", "the gate is ignored"), ("sinks", "the sinks are ignored"),
                          ("alibi_slopes", "ALiBi is ignored"), ("mask", "the mask is ignored"),
                          ("kv_lengths", "kv_lengths are ignored: padding is attended to"),
                          ("q_lengths", "q_lengths are ignored: padded queries attend"),
                          ("segments", "segments are ignored: sequences see each other")):
        if call.get(option) is not None:
            yield words, {option: None}
    if call.get("mask") is not None:
        yield "the mask is inverted: True means may attend", {"mask": ~np.asarray(call["mask"])}
    if call.get("alibi_slopes") is not None:
        yield ("ALiBi has the wrong sign: it is subtracted",
               {"alibi_slopes": -np.asarray(call["alibi_slopes"])})
    if call.get("bias") is not None:
        yield "the bias has the wrong sign", {"bias": -np.asarray(call["bias"])}
        yield ("the bias is added before the scale",
               {"bias": call["bias"] * np.broadcast_to(scale, h)[:, None, None]})


def _shifted_masks(call: Call) -> Iterator[tuple[str, Call]]:
    allowed = _allowed(call)
    if allowed.all() or not allowed.size:
        return
    bare = {"causal": False, "window": None, "segments": None, "kv_lengths": None,
            "q_lengths": None}
    later, earlier = np.zeros_like(allowed), np.zeros_like(allowed)
    later[..., 1:], later[..., 0] = allowed[..., :-1], allowed[..., 0]
    later[..., :-1, :] |= allowed[..., 1:, :]       # what enters at the first key
    earlier[..., :-1] = allowed[..., 1:]
    yield "the mask is shifted by one to later keys", {**bare, "mask": later}
    yield "the mask is shifted by one to earlier keys", {**bare, "mask": earlier}


def _allowed(call: Call) -> np.ndarray:
    """Find the pairs that may be seen: where all scores are equal, those with a weight."""
    q, k = (np.zeros(call[x].shape) for x in "qk")
    masks: Call = {x: call.get(x) for x in ("mask", "causal", "window", "segments", "q_lengths",
                                      "kv_lengths")}
    return reference.weights(q, k, **masks) > 0


def _and(mask: Any, other: np.ndarray) -> np.ndarray:
    return other if mask is None else np.asarray(mask) & other


def _wrong_out(call: Call, exact: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    out, lse = exact["out"], exact["lse"]
    g, h = call["v"].shape[-3], call["q"].shape[-3]
    values = np.repeat(call["v"].astype(np.float64), max(1, h // max(1, g)), axis=-3)
    if values.shape[-2]:
        mean = values.mean(-2, keepdims=True)
        yield ("rows that see no key get the mean of the values; they must be 0",
               np.where((lse == -np.inf)[..., None], mean, out))
    yield "the output is not divided by the sum of the exponentials", out * np.exp(lse)[..., None]
    yield "the output is all zero", np.zeros_like(out)


def _wrong_lse(lse: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "lse is in base 2; it must be the natural logarithm", lse / np.log(2)
    yield "lse has the wrong sign", -lse
    yield "lse holds the sum of exponentials, not its logarithm", np.exp(lse)


def _wrong_gradient(argument: str, inputs: Inputs, call: Call,
                    exact: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    right = exact[f"d{argument}"]
    h, g, d = call["q"].shape[-3], call["k"].shape[-3], call["q"].shape[-1]
    scale = 1 / np.sqrt(d) if call.get("scale") is None else np.asarray(call["scale"])
    if argument in "qk" and (np.ndim(scale) == 0 or argument == "q"):
        per_head = scale if np.ndim(scale) == 0 else scale[:, None, None]
        yield f"d{argument} lacks the factor scale", right / per_head
        yield f"d{argument} has the factor scale twice", right * per_head
    yield f"d{argument} has the wrong sign", -right

    out = exact["out"]
    dout = np.asarray(inputs.dout).astype(np.float64)
    pull = np.where(out == 0, 0, dout * out).sum(-1)
    if argument != "v":
        # delta = rowsum(dout * out) - dlse vanishes for this dlse
        yield ("delta = rowsum(dout * out) is not subtracted: dS = P * (dP - delta)",
               _gradient(argument, inputs, call, pull))
        if inputs.dlse is not None:
            yield "dlse is ignored", _gradient(argument, inputs, call, 0 * inputs.dlse)
            yield "dlse has the wrong sign", _gradient(argument, inputs, call, -inputs.dlse)
    if call.get("softcap") is not None and argument != "v":
        yield ("softcap's own derivative, 1 - tanh^2, is missing",
               _gradient(argument, inputs, _without_softcap_chain(call)))
    if g < h and argument in "kv":
        share = h // g
        repeated = {**call, **{x: np.repeat(call[x], share, axis=-3) for x in "kv"}}
        each = _gradient(argument, inputs, repeated)
        for place, words in ((slice(share - 1, None, share), "last"),
                             (slice(None, None, share), "first")):
            yield (f"d{argument} is that of the {words} query head of each group alone; it is "
                   "their sum", each[..., place, :, :])
        tiled = {**call, **{x: np.take(call[x], np.arange(h) % g, axis=-3) for x in "kv"}}
        each = _gradient(argument, inputs, tiled)
        folded = each.reshape(*each.shape[:-3], share, g, *each.shape[-2:]).sum(-4)
        yield "query head h reads key head h % G; it must read h // (H // G)", folded


def _without_softcap_chain(call: Call) -> Call:
    """Give the same scores, with what softcap takes off them as a constant bias."""
    q, k = (call[x].astype(np.float64) for x in "qk")
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    scale = 1 / np.sqrt(q.shape[-1]) if call.get("scale") is None else np.asarray(call["scale"])
    scores = (scale if np.ndim(scale) == 0 else scale[:, None, None]) * (q @ np.swapaxes(k, -1, -2))
    capped = call["softcap"] * np.tanh(scores / call["softcap"])
    bias = 0 if call.get("bias") is None else call["bias"]
    return {**call, "softcap": None, "bias": capped - scores + bias}
