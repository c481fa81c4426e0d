"""The adversarial table: small problems, each of which some kernel got wrong."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from pyattn import reference
from pyattn.checks import OptionError

from .compare import plain_dtype

Draw = Callable[[np.random.Generator, "Case"], Any]
"""Makes an option's value, when it is an array, from the case's shapes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One problem: shapes, options, and what is unusual about it."""

    name: str
    family: str
    n: int = 70
    m: int = 70
    heads: int = 2
    kv_heads: int = 2
    d: int = 32
    e: int = 32
    batch: tuple[int, ...] = (2,)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the call; a callable draws an array (`Draw`)."""
    layout: str = "bhnd"
    """"bnhd": arrays are views of (B, N, H, D) memory."""
    logits: float = 1.0
    """The queries are multiplied by this."""
    poison: str = ""
    """"unseen": NaN in every key that no query sees and in queries that see no key;
    "seen": besides, in a key that only later queries see."""
    dlse: bool = False
    """Whether the log-sum-exp has a gradient too."""
    quick: bool = False
    """Whether it is in the quick set."""

    def inputs(self, dtype: str, seed: int = 0) -> Inputs:
        """Draw the arrays; the same for the same case, dtype and seed."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        wide = "float64" if dtype == "float64" else "float32"
        options = {name: x(rng, self) if callable(x) else x for name, x in self.options.items()}
        options = {name: x.astype(wide) if getattr(x, "dtype", None) == np.float64 else x
                   for name, x in options.items()}
        q = self.logits * rng.standard_normal((*self.batch, self.heads, self.n, self.d))
        k = rng.standard_normal((*self.batch, self.kv_heads, self.m, self.d))
        v = rng.standard_normal((*self.batch, self.kv_heads, self.m, self.e))
        dout = rng.standard_normal((*self.batch, self.heads, self.n, self.e))
        dlse = rng.standard_normal(dout.shape[:-1]) if self.dlse else None
        if self.poison:
            self._spoil(q, k, v, dout, options)
        q, k, v, dout = (self._laid_out(x.astype(plain_dtype(dtype))) for x in (q, k, v, dout))
        return Inputs(q, k, v, dout, None if dlse is None else dlse.astype(wide), options)

    def _spoil(self, q: Any, k: Any, v: Any, dout: Any, options: dict[str, Any]) -> None:
        # equal scores: what has a weight is what may be seen
        pairs = reference.weights(0 * q, 0 * k, **options) > 0
        share = self.heads // self.kv_heads
        seen = pairs.reshape(*self.batch, self.kv_heads, share, self.n, self.m).any((-3, -2))
        k[~seen], v[~seen] = np.nan, np.inf
        blind = ~pairs.any(-1)
        q[blind] = dout[blind] = np.nan
        if self.poison == "seen":
            k[..., self.m - 3, 0], v[..., self.m - 2, 1] = np.nan, np.nan

    def _laid_out(self, x: np.ndarray) -> np.ndarray:
        if self.layout == "bnhd":
            return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3, -2)), -3, -2)
        return x


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of one call."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray | None
    dlse: np.ndarray | None
    options: dict[str, Any]


def _normal(*axes: str, scale: float = 1.0) -> Draw:
    def draw(rng: np.random.Generator, case: Case) -> np.ndarray:
        return scale * rng.standard_normal(_shape(axes, case))
    return draw


def _uniform(low: float, high: float, *axes: str) -> Draw:
    def draw(rng: np.random.Generator, case: Case) -> np.ndarray:
        return rng.uniform(low, high, _shape(axes, case))
    return draw


def _shape(axes: Iterable[str], case: Case) -> tuple[int, ...]:
    sizes = {"b": case.batch, "h": (case.heads,), "n": (case.n,), "m": (case.m,), "1": (1,)}
    return tuple(s for axis in axes for s in sizes[axis])


def _bernoulli(*axes: str) -> Draw:
    """Draw a mask of random pairs, with a row, a whole tile of rows and a column closed."""
    def draw(rng: np.random.Generator, case: Case) -> np.ndarray:
        mask = rng.random(_shape(axes, case)) < 0.3
        mask[..., 3, :] = mask[..., 5] = False
        mask[..., 64:128, :64] = False
        mask[..., :64, 64:128] = True
        return mask
    return draw


def _bias_with_holes(rng: np.random.Generator, case: Case) -> np.ndarray:
    bias = rng.standard_normal((case.heads, case.n, case.m))
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    bias[:, 4] = -np.inf
    return bias


def _gate(rng: np.random.Generator, case: Case) -> np.ndarray:
    gate = rng.uniform(0.1, 1, (case.heads, case.n, case.m))
    gate[rng.random(gate.shape) < 0.2] = 0
    return gate


def _slopes(rng: np.random.Generator, case: Case) -> np.ndarray:
    return 2.0 ** -(1 + np.arange(case.heads))


def _lengths(*values: int) -> Draw:
    return lambda rng, case: np.resize(values, case.batch)


ATTENTION: tuple[Case, ...] = (
    Case("one query, one key", "lengths", n=1, m=1, quick=True),
    Case("3 x 3", "lengths", n=3, m=3),
    Case("63 x 63", "lengths", n=63, m=63),
    Case("64 x 64", "lengths", n=64, m=64),
    Case("65 x 65", "lengths", n=65, m=65, quick=True),
    Case("113 x 203", "lengths", n=113, m=203, dlse=True, quick=True),
    Case("203 x 113", "lengths", n=203, m=113),
    Case("one query, 129 keys", "lengths", n=1, m=129),
    Case("no keys", "zero length", m=0, quick=True),
    Case("no queries", "zero length", n=0, quick=True),
    Case("no batch items", "zero length", batch=(0,)),
    Case("grouped heads", "heads", heads=6, kv_heads=2, n=67, m=93, dlse=True, quick=True),
    Case("one key head", "heads", heads=5, kv_heads=1),
    Case("no batch axis", "batch", batch=()),
    Case("two batch axes", "batch", batch=(2, 3), n=9, m=17, quick=True),
    Case("values wider than keys", "widths", d=24, e=80, quick=True),
    Case("values narrower than keys", "widths", d=128, e=16),
    Case("odd widths", "widths", d=17, e=9),
    Case("width 1", "widths", d=1, e=1),
    Case("(B, N, H, D) memory", "strides", layout="bnhd", heads=4, kv_heads=2, quick=True),
    Case("causal", "causal", n=130, m=130, options={"causal": True}, dlse=True, quick=True),
    Case("causal, more keys", "causal", n=70, m=150, options={"causal": True}, quick=True),
    Case("causal, more queries", "causal", n=150, m=70, options={"causal": True}, dlse=True),
    Case("causal, one query", "causal", n=1, m=77, options={"causal": True}),
    Case("causal, grouped heads", "causal", heads=4, options={"causal": True}),
    Case("causal from the top left, more keys", "top left", n=70, m=150,
         options={"causal": "top_left"}, quick=True),
    Case("causal from the top left, more queries", "top left", n=150, m=70,
         options={"causal": "top_left"}),
    Case("window", "window", n=150, m=150, options={"window": 5}, quick=True),
    Case("window, more keys", "window", n=70, m=150, options={"window": 20}),
    Case("causal window", "window", n=150, m=150, options={"window": 17, "causal": True},
         quick=True),
    Case("causal window, more keys", "window", n=70, m=150,
         options={"window": 64, "causal": True}),
    Case("window of the key itself", "window", options={"window": 0}),
    Case("lopsided window", "window", n=130, m=130, options={"window": (3, 40)}),
    Case("padded keys", "padding", options={"kv_lengths": _lengths(64, 13)}, quick=True),
    Case("padded keys, one item without any", "padding", options={"kv_lengths": _lengths(65, 0)}),
    Case("padded queries and keys, causal", "padding", n=90, m=130, quick=True, dlse=True,
         options={"kv_lengths": _lengths(100, 31), "q_lengths": _lengths(66, 90), "causal": True}),
    Case("boolean mask", "mask", n=150, m=150, options={"mask": _bernoulli("n", "m")}, quick=True),
    Case("boolean mask by head", "mask", n=130, m=140, options={"mask": _bernoulli("h", "n", "m")}),
    Case("boolean mask by item", "mask", n=130, m=140,
         options={"mask": _bernoulli("b", "1", "n", "m")}),
    Case("boolean mask and causal", "mask", n=130, m=140, dlse=True,
         options={"mask": _bernoulli("n", "m"), "causal": True}),
    Case("nothing allowed", "mask", options={"mask": np.zeros((1, 1), bool)}, quick=True),
    Case("bias", "bias", options={"bias": _normal("h", "n", "m")}, quick=True),
    Case("bias by item", "bias", options={"bias": _normal("b", "1", "n", "m")}),
    Case("bias by key", "bias", options={"bias": _normal("1", "1", "m"), "causal": True}),
    Case("bias with -inf", "bias", options={"bias": _bias_with_holes}, dlse=True),
    Case("gate", "gate", options={"gate": _gate}, quick=True),
    Case("gate by key, causal", "gate",
         options={"gate": _uniform(0, 1, "h", "1", "m"), "causal": True}),
    Case("softcap", "softcap", logits=4, options={"softcap": 3.0}, quick=True),
    Case("softcap and bias", "softcap", logits=4,
         options={"softcap": 2.0, "bias": _normal("h", "n", "m"), "causal": True}),
    Case("scale", "scale", options={"scale": 0.31}, quick=True),
    Case("scale by head", "scale", heads=4, options={"scale": _uniform(0.05, 0.4, "h")}),
    Case("sinks", "sinks", options={"sinks": _normal("h")}, dlse=True, quick=True),
    Case("sinks and rows without keys", "sinks", n=90, m=60, dlse=True,
         options={"sinks": _normal("h"), "causal": True}),
    Case("ALiBi", "alibi", heads=4, n=100, m=100,
         options={"alibi_slopes": _slopes, "causal": True}, quick=True),
    Case("ALiBi both ways, more keys", "alibi", n=70, m=130, options={"alibi_slopes": _slopes}),
    Case("packed sequences", "segments", n=150, m=150, quick=True,
         options={"segments": (1, 70, 0, 64, 15), "causal": True}),
    Case("packed sequences of their own lengths", "segments", n=100, m=140, dlse=True,
         options={"segments": ((30, 0, 70), (80, 10, 50)), "causal": True}),
    Case("huge logits", "logits", logits=200.0, options={"causal": True}, quick=True),
    Case("NaN in padded keys", "poison", poison="unseen", n=100, m=130, quick=True,
         options={"kv_lengths": _lengths(70, 1)}),
    Case("NaN in unseen keys and blind queries", "poison", poison="unseen", n=150, m=150,
         quick=True, options={"mask": _bernoulli("n", "m")}),
    Case("NaN outside the window", "poison", poison="unseen", n=60, m=200,
         options={"causal": True, "window": 9}),
    Case("NaN beyond the queries' sight", "poison", poison="unseen", n=70, m=150,
         options={"causal": "top_left"}),
    Case("NaN that later queries see", "poison", poison="seen", n=130, m=130, quick=True,
         options={"causal": True}),
    Case("everything at once", "everything", n=130, m=150, heads=4, dlse=True, quick=True,
         options={"causal": True, "window": 70, "softcap": 4.0, "bias": _normal("h", "n", "m"),
                  "gate": _gate, "scale": _uniform(0.1, 0.4, "h"), "sinks": _normal("h"),
                  "alibi_slopes": _slopes, "kv_lengths": _lengths(140, 7),
                  "mask": _bernoulli("n", "m")}),
)
"""Every case of attention."""


def select(cases: str | Case | Iterable[str | Case] | None = None) -> tuple[Case, ...]:
    """Return the cases that are meant: all, ``"quick"``, or by name, family or pattern.

    Examples
    --------
    >>> from pyattn.testing import cases
    >>> [case.name for case in cases.select("top left")][0]
    'causal from the top left, more keys'
    """
    if cases is None:
        return ATTENTION
    if isinstance(cases, str | Case):
        cases = [cases]
    found: dict[Case, None] = {}
    for wanted in cases:
        if isinstance(wanted, Case):
            hits = [wanted]
        else:
            hits = [case for case in ATTENTION if (wanted == "quick" and case.quick)
                    or fnmatch.fnmatchcase(case.name, wanted) or case.family == wanted]
        if not hits:
            families = ", ".join(dict.fromkeys(case.family for case in ATTENTION))
            raise OptionError(f"cases must be 'quick', a name, a pattern or one of the families "
                              f"{families}; got {wanted!r}")
        found.update(dict.fromkeys(hits))
    return tuple(found)
