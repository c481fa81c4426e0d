"""``python -m bench.recall``: who remembers what was said thousands of tokens ago, at what cost.

Associative recall: in the first quarter of a sequence keys stand in front of their values, here and
there among fillers; in its last eighth the keys stand alone, and the model is to name the value
that followed each. One layer of attention, the same for all variants but for what a query reads, is
trained by pyattn's own backward on sequences that become twice as long whenever it knows most
answers, and is asked about sequences that it has not seen. With several threads nothing but the
time changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import pyattn
from pyattn.cli.progress import progress
from pyattn.features import embedding, kmeans, standardise, update_centroids
from pyattn.layers import (
    adam,
    clip_by_norm,
    cross_entropy,
    init_nsa_layer,
    layer_norm,
    linear,
    multi_head,
    nsa_layer,
)

Array = np.ndarray
Params = dict[str, Any]

KEYS = VALUES = FILLERS = 64
"""Kinds of tokens; numbers in this order."""

SHORTEST = 64
"""Tokens of the sequences that training starts with."""

TOKENS = 4096
"""Of all sequences of a step together, unless two are longer."""

WIDTH, HEADS = 128, 2

PASSED = 0.8
"""Share of right answers, running over about ten steps, at which sequences become longer."""

RATE, DECAY, WARM = 3e-3, 2.0, 20
"""The learning rate, what it takes off the weights, and steps until it is reached. The decay makes
a model forget what it need not know, such as the fillers' keys, which blur the mean of a block."""

TRAINED, ASKED = 1, 2
"""Streams of random numbers of one seed."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """Sequences, where they ask, and the number of the right value."""

    tokens: Array
    """(B, N)."""
    places: Array
    """(B, Q)."""
    answers: Array
    """(B, Q)."""


def draw(rng: np.random.Generator, batch: int, length: int) -> Questions:
    """Draw sequences of `length`, whose answers stand at least 5/8 of it before the questions.

    There are 2 to 32 pairs of a key and its value, one for 32 tokens, and each is asked for.
    """
    pairs = min(KEYS // 2, max(2, length // 32))
    tokens = KEYS + VALUES + rng.integers(0, FILLERS, (batch, length))
    places, answers = np.empty((2, batch, pairs), np.int64)
    for b in range(batch):
        keys, values = rng.permutation(KEYS)[:pairs], rng.integers(0, VALUES, pairs)
        told = 2 * rng.permutation(length // 8)[:pairs]
        tokens[b, told], tokens[b, told + 1] = keys, KEYS + values
        places[b] = length - 1 - 2 * rng.permutation(length // 16)[:pairs]
        asked = rng.permutation(pairs)
        tokens[b, places[b]], answers[b] = keys[asked], values[asked]
    return Questions(tokens, places, answers)


@dataclasses.dataclass(frozen=True)
class Read:
    """What a layer found."""

    y: Array
    backward: Callable[[Array], tuple[Array, Params]]
    """From dy to the gradients of x and of the layer's params."""
    pairs: int
    """Of a query and a key that it read, of all heads and sequences."""


class Separate:
    """A layer whose queries and keys have projections of their own."""

    def __init__(self, attention: Any, **options: Any) -> None:
        self.options = {"num_heads": HEADS, "attention": attention, "causal": True, **options}

    def init(self, rng: np.random.Generator) -> Params:
        return {"w_qkv": _normal(rng, WIDTH, 3 * WIDTH), "w_o": _normal(rng, WIDTH, WIDTH)}

    def forward(self, x: Array, params: Params, turn: int, learn: bool) -> Read:
        y, saved = multi_head.forward(x, **params, **self.options)

        def backward(dy: Array) -> tuple[Array, Params]:
            grads = saved.backward(dy)
            return grads.x, {"w_qkv": grads.w_qkv, "w_o": grads.w_o}

        return Read(y, backward, saved.heads.attended.stats["pairs"])


class Native:
    """Native sparse attention, whose branches share keys and values."""

    def __init__(self, **options: Any) -> None:
        self.options = {"num_heads": HEADS, **options}

    def init(self, rng: np.random.Generator) -> Params:
        return init_nsa_layer(rng, WIDTH, num_heads=HEADS, separate=False)

    def forward(self, x: Array, params: Params, turn: int, learn: bool) -> Read:
        drawn = {"rng": turn} if self.options["mode"] == "lsh" else {}
        y, saved = nsa_layer.forward(x, params, **self.options, **drawn)
        return Read(y, saved.backward, saved.stats["pairs"])


class Shared:
    """A layer whose queries are its keys, as the papers of LSH and of routing have it if causal."""

    def init(self, rng: np.random.Generator) -> Params:
        return {name: _normal(rng, WIDTH, WIDTH) for name in ("w_qk", "w_v", "w_o")}

    def attend(self, qk: Array, v: Array, turn: int, learn: bool) -> Read:
        """Attend among heads (B, H, N, D); the way back leads to qk and v."""
        raise NotImplementedError

    def forward(self, x: Array, params: Params, turn: int, learn: bool) -> Read:
        qk, saved_qk = linear.forward(x, params["w_qk"])
        v, saved_v = linear.forward(x, params["w_v"])
        read = self.attend(_split(qk), _split(v), turn, learn)
        y, saved_y = linear.forward(_merged(read.y), params["w_o"])

        def backward(dy: Array) -> tuple[Array, Params]:
            dmerged = saved_y.backward(dy)
            dqk, dv = read.backward(_split(dmerged.x))
            back_qk, back_v = saved_qk.backward(_merged(dqk)), saved_v.backward(_merged(dv))
            return back_qk.x + back_v.x, {"w_qk": back_qk.w, "w_v": back_v.w, "w_o": dmerged.w}

        return Read(y, backward, read.pairs)


class Hashed(Shared):
    """Reformer's, with new hashes for each step."""

    def __init__(self, **options: Any) -> None:
        self.options = {"causal": True, **options}

    def attend(self, qk: Array, v: Array, turn: int, learn: bool) -> Read:
        out, saved = pyattn.lsh_attention.forward(qk, v, rng=turn, **self.options)
        return Read(out, saved.backward, saved.stats["pairs"])


class Routed(Shared):
    """Routing Transformer's: a centroid for each `tokens` of a sequence.

    Where training comes to a new length they are k-means' of the tokens there; then they follow.
    """

    def __init__(self, tokens: int, decay: float, **options: Any) -> None:
        self.tokens, self.decay = tokens, decay
        self.options = {"causal": True, **options}

    def init(self, rng: np.random.Generator) -> Params:
        self.state: Any = None
        self.centroids = np.zeros((HEADS, 0, WIDTH // HEADS), np.float32)
        return super().init(rng)

    def attend(self, qk: Array, v: Array, turn: int, learn: bool) -> Read:
        count = max(1, qk.shape[-2] // self.tokens)
        if learn and count != self.centroids.shape[1]:
            together = np.swapaxes(standardise(qk), 0, 1).reshape(HEADS, -1, qk.shape[-1])
            self.state = kmeans(together, num_clusters=count, metric="cosine").centroids
            self.centroids = standardise(self.state)
        out, saved = pyattn.routing_attention.forward(qk, qk, v, self.centroids, **self.options)
        if learn:
            self.state = update_centroids(self.state, standardise(qk),
                                          saved.decisions["clusters"], decay=self.decay)
            self.centroids = standardise(self.state.centroids)

        def backward(dout: Array) -> tuple[Array, Array]:
            grads = saved.backward(dout)
            return grads.q + grads.k, grads.v

        return Read(out, backward, saved.stats["pairs"])


def variants() -> dict[str, Any]:
    """Return fresh layers by name. The window is as wide as the most that another query reads."""
    groups = {"window": 127, "segment": 128, "num_selected": 32}
    return {
        "dense": Separate(pyattn.attention),
        "window": Separate(pyattn.attention, window=831),
        "nsa paper": Native(mode="paper", window=63, block_size=16, stride=8, select_block=16,
                            num_selected=16, num_initial=1, num_local=2),
        "nsa kmeans": Native(mode="kmeans", num_clusters=8, num_top_clusters=32, **groups),
        "nsa lsh": Native(mode="lsh", num_rounds=8, num_buckets=64, num_candidates=64, **groups),
        "lsh": Hashed(num_rounds=8, bucket_length=64),
        "routing": Routed(64, 0.99, cluster_size=256),
    }


def _normal(rng: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> Array:
    return (rng.standard_normal((rows, columns)) * (gain / np.sqrt(rows))).astype(np.float32)


def _split(x: Array) -> Array:
    """(B, N, C) as (B, H, N, D)."""
    return np.swapaxes(x.reshape(*x.shape[:-1], HEADS, -1), 1, 2)


def _merged(x: Array) -> Array:
    """(B, H, N, D) as (B, N, C)."""
    return np.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def init(layer: Any, seed: int) -> Params:
    """Return fresh parameters of the model around a layer."""
    rng = np.random.default_rng(seed)
    kinds = KEYS + VALUES + FILLERS
    tables = 0.3 * rng.standard_normal((2, kinds, WIDTH)).astype(np.float32)
    return {"now": tables[0], "before": tables[1], "gamma": np.ones(WIDTH, np.float32),
            "beta": np.zeros(WIDTH, np.float32), "w": _normal(rng, WIDTH, VALUES, 0.1),
            "b": np.zeros(VALUES, np.float32), "layer": layer.init(rng)}


def answer(layer: Any, params: Params, asked: Questions, turn: int = 0,
           learn: bool = False) -> tuple[Array, Callable[[Array], Params], int]:
    """Return scores (B, Q, VALUES), the way back from their gradient, and the pairs read.

    A token is embedded together with the one before it: where a value stands, its key shows.
    """
    before = np.roll(asked.tokens, 1, axis=1)
    before[:, 0] = KEYS + VALUES
    now, saved_now = embedding.forward(asked.tokens, params["now"])
    past, saved_past = embedding.forward(before, params["before"])
    x = now + past
    read = layer.forward(x, params["layer"], turn, learn)
    rows = np.arange(len(x))[:, None]
    normal, saved_normal = layer_norm.forward((x + read.y)[rows, asked.places], params["gamma"],
                                              params["beta"])
    scores, saved_scores = linear.forward(normal, params["w"], params["b"])

    def backward(dscores: Array) -> Params:
        last = saved_scores.backward(dscores)
        picked = saved_normal.backward(last.x)
        dsum = np.zeros_like(x)
        # forward: picked = (x + y)[rows, places], and no place is asked at twice
        dsum[rows, asked.places] = picked.x
        through, grads = read.backward(dsum)
        dx = dsum + through
        return {"now": saved_now.backward(dx).table, "before": saved_past.backward(dx).table,
                "gamma": picked.gamma, "beta": picked.beta, "w": last.w, "b": last.b,
                "layer": grads}

    return scores, backward, read.pairs


def right(scores: Array, asked: Questions) -> float:
    """Return the share of questions whose answer has the largest score."""
    return float(np.mean(np.argmax(scores, axis=-1) == asked.answers))


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training made."""

    params: Params
    length: int
    """Tokens of the last sequences."""
    steps: int
    seconds: float
    """Of the process's own time."""
    reached: dict[int, int]
    """For each length the step before which it was met."""


def train(layer: Any, *, length: int, steps: int, seconds: float = float("inf"), seed: int = 0,
          tell: Callable[[int, str], None] = lambda step, text: None) -> Trained:
    """Train a layer on sequences of up to `length`, for so many steps, or so long if that is less.

    The learning rate stays for half of the steps and then falls to 0.
    """
    params, state = init(layer, seed), None
    rng = np.random.default_rng([seed, TRAINED])
    now, known = min(SHORTEST, length), 0.0
    reached = {now: 0}
    started, spent, step = time.process_time(), 0.0, 0
    while step < steps and spent < seconds:
        asked = draw(rng, max(2, TOKENS // now), now)
        scores, backward, _ = answer(layer, params, asked, step, learn=True)
        _, saved = cross_entropy.forward(scores, asked.answers)
        grads, _ = clip_by_norm(backward(saved.backward().logits), 1.0)
        rate = RATE * min(1.0, (step + 1) / WARM, 2 * (1 - step / steps))
        params, state = adam(params, grads, state, learning_rate=rate, betas=(0.9, 0.98),
                             weight_decay=DECAY)
        step, spent = step + 1, time.process_time() - started
        known = 0.9 * known + 0.1 * right(scores, asked)
        tell(step, f"N = {now}, {known:.0%} right")
        if known > PASSED and now < length:
            now, known = min(2 * now, length), 0.0
            reached[now] = step
    return Trained(params, now, step, spent, reached)


@dataclasses.dataclass(frozen=True)
class Score:
    """How a layer answers about sequences of one length."""

    length: int
    right: float
    keys: float
    """That a query of a head reads on average."""


def ask(layer: Any, params: Params, *, length: int, sequences: int, seed: int = 0) -> Score:
    """Ask about sequences that training did not see."""
    rng = np.random.default_rng([seed, ASKED, length])
    shares, pairs = [], 0
    for turn in range(sequences):
        asked = draw(rng, 1, length)
        scores, _, read = answer(layer, params, asked, turn)
        shares.append(right(scores, asked))
        pairs += read
    return Score(length, float(np.mean(shares)), pairs / (sequences * length * HEADS))


def markdown(rows: Iterable[tuple[str, Trained, list[Score]]]) -> str:
    """Return the table: a line for each variant, two columns for each length."""
    rows = list(rows)
    lengths = [score.length for score in rows[0][2]]
    titles = ["variant", *(title for n in lengths for title in (f"right, N = {n}", "keys read")),
              "steps", "trained up to N", "minutes"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for name, trained, scores in rows:
        cells = [cell for score in scores for cell in (f"{score.right:.1%}", f"{score.keys:.0f}")]
        lines.append([name, *cells, str(trained.steps), str(trained.length),
                      f"{trained.seconds / 60:.1f}"])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (f"{text}\n\nChance is {1 / VALUES:.1%}. Keys that a query of a head reads, on average "
            "over a sequence; minutes of the process's own time, of training alone.\n")


def main() -> int:
    """Parse the command line, train and ask."""
    names = list(variants())
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=(
        "Train variants of attention to recall what stood thousands of tokens before."))
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME",
                        help="of " + ", ".join(map(repr, names)) + " (default: all)")
    parser.add_argument("--length", type=int, default=4096,
                        help="trained up to, and asked at; also at its double (default: 4096)")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: 400)")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="at most so many of training for a variant (default: no limit)")
    parser.add_argument("--sequences", type=int, default=32,
                        help="asked about, of 32 questions (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    args = parser.parse_args()
    if args.length < SHORTEST or args.length & (args.length - 1):
        parser.error(f"--length must be a power of two, {SHORTEST} or more; got {args.length}")
    rows = []
    for name in args.variants:
        layer = variants()[name]
        with progress(name, total=args.steps) as bar:
            trained = train(layer, length=args.length, steps=args.steps, seconds=args.seconds,
                            seed=args.seed, tell=lambda step, text, bar=bar: bar.advance(text=text))
        rows.append((name, trained, [
            ask(layer, trained.params, length=length, sequences=args.sequences, seed=args.seed)
            for length in (args.length, 2 * args.length)]))
    table = markdown(rows)
    print(table, end="")
    if args.output:
        args.output.write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
