"""``python -m pyattn demo``: train a small language model on text that ships with CPython.

A character-level Transformer learns `pydoc_data.topics`, forward and backward by `pyattn.layers`
alone. The bar to clear is the text's bigram entropy, the least loss that any model can reach which
looks at one character at a time: below it, attention has found something.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import functools
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import VARIANTS, layers
from ..checks import OptionError, require_integer
from ..differentiable import Saved, differentiable, gradients
from .catalogue import EXAMPLES, completed, full_name, parameters, parse_options, require_options
from .progress import progress
from .trained import FUNCTIONS, LAYERS, init_layer, moved_centroids

BLOCK = tuple(layers.init_transformer_block(0, 1))
BLOCK_WITH_LAYER = tuple(layers.init_transformer_block(0, 1, attention={}))
LANGUAGE_MODEL = tuple(name for name in layers.init_language_model(
    0, vocabulary=1, width=1, depth=1) if name != "blocks")

STEPS = 400
CONTEXT = 128
"""Characters of a text, unless said otherwise."""

TOKENS = 2048
"""Characters of a step, all its texts together."""

SAMPLE = 400
"""Characters of a sample; of the one before training, a quarter."""

WITHHELD = ("causal", "reference", "decisions", "return_lse", "return_weights", "state",
            "return_state")
"""Options that the demo does not take; some originals are causal in a way that lets texts leak."""

EVALUATIONS = 8
"""How many times the held-out loss is taken on the way, for the curve."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything about a model but its weights; saved with them."""

    alphabet: str
    attention: str = "attention"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    ablate: bool = False
    width: int = 128
    num_heads: int = 4
    depth: int = 3
    context: int = CONTEXT

    def parameters(self, rng: np.random.Generator) -> dict[str, Any]:
        """Fresh weights."""
        sizes = {"num_heads": self.num_heads, "depth": self.depth}
        attention = functools.partial(
            init_layer, self.attention, width=self.width, context=self.context,
            options=self.options, **sizes)
        return layers.init_language_model(rng, vocabulary=len(self.alphabet), width=self.width,
                                          attention=attention if self.has_layer else None, **sizes)

    @property
    def has_layer(self) -> bool:
        """Whether attention has parameters of its own."""
        return self.attention in LAYERS and not self.ablate

    @property
    def batch(self) -> int:
        """Texts of a step."""
        return max(1, TOKENS // self.context)

    def encode(self, text: str) -> np.ndarray:
        """Each character's number."""
        number = {character: i for i, character in enumerate(self.alphabet)}
        if not number.keys() >= set(text):
            raise OptionError(f"the model's alphabet has no {sorted(set(text) - number.keys())}")
        return np.array([number[character] for character in text], np.int64)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What `pyattn.layers.language_model` is called with."""
        attention = attention_function(self.attention, self.options)
        return {"num_heads": self.num_heads, "activation": "gelu_tanh", "rotary_base": 10000.0,
                "attention": no_attention if self.ablate else attention, **self.options}


@dataclasses.dataclass(frozen=True)
class NoAttentionSaved(Saved):
    """The arguments of `no_attention`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def backward(self, dout: np.ndarray) -> Any:
        """Nothing reaches q, k and v."""
        return gradients(("q", "k", "v"))(*map(np.zeros_like, (self.q, self.k, self.v)))


@differentiable
def no_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray,
                 **options: Any) -> tuple[np.ndarray, NoAttentionSaved]:
    """Attention with its output zeroed: no token hears of another."""
    return np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), NoAttentionSaved(q, k, v)


def attention_function(name: str, options: dict[str, Any]) -> Any:
    """The attention function of that name, or OptionError if it cannot be causal as asked."""
    import pyattn

    # a variant without an example is of grids, of more than one sequence, or a layer
    causal = [variant for variant in VARIANTS
              if {*EXAMPLES, *LAYERS}.intersection([variant]) and "causal" in parameters(variant)]
    if name not in causal:
        raise OptionError(f"--attention must be one of {', '.join(causal)}, which can be causal; "
                          f"got {name!r}")
    # the tokens that a cluster takes depend on later ones
    leaks = ("mode",) if name == "routing_attention" else ()
    require_options(name, options, withheld=WITHHELD + leaks)
    return LAYERS.get(name) or FUNCTIONS.get(name) or getattr(pyattn, name)


def read_text() -> tuple[str, str, str]:
    """The whole text, what is trained on, and what is held out: every tenth topic.

    Topics repeat each other in places; what occurs in a held-out topic is not trained on.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise OptionError("this Python comes without pydoc_data.topics, the text of the demo; "
                          "python.org's and most distributions' have it") from None
    names = sorted(topics)
    paragraphs = [topics[name].strip("\n").split("\n\n") for name in names]
    held_out = [paragraph for topic in paragraphs[::10] for paragraph in topic]
    training = [paragraph for i, topic in enumerate(paragraphs) if i % 10 for paragraph in topic]
    seen = set(held_out)
    return ("\n".join(topics[name] for name in names),
            "\n\n".join(paragraph for paragraph in training if paragraph not in seen),
            "\n\n".join(held_out))


def entropies(text: str) -> tuple[float, float]:
    """Nats a character of a text: by how often characters occur, and given the one before."""
    singles = np.array(list(collections.Counter(text[:-1]).values())) / (len(text) - 1)
    pairs = np.array(list(collections.Counter(itertools.pairwise(text)).values()))
    pairs = pairs / (len(text) - 1)
    alone = -np.sum(singles * np.log(singles))
    return float(alone), float(-np.sum(pairs * np.log(pairs)) - alone)


def held_out_loss(model: Model, params: dict[str, Any], text: np.ndarray, batch: int) -> float:
    """Mean loss over all whole windows of `text`, in nats a character."""
    windows = (len(text) - 1) // model.context
    tokens, targets = (text[start:start + windows * model.context].reshape(windows, model.context)
                       for start in (0, 1))
    losses = [float(layers.cross_entropy(
        layers.language_model(tokens[i:i + batch], params, **model.arguments),
        targets[i:i + batch])) for i in range(0, windows, batch)]
    sizes = [len(tokens[i:i + batch]) for i in range(0, windows, batch)]
    return float(np.average(losses, weights=sizes))


def train(model: Model, training: np.ndarray, held_out: np.ndarray, *, steps: int, seed: int,
          seconds: float = math.inf, batch: int | None = None, learning_rate: float = 2e-3,
          ) -> tuple[dict[str, Any], list[tuple[int, float, float | None]]]:
    """Train from scratch; the weights, and (step, loss, held-out loss where taken) of each step.

    Adam with 50 steps of warm-up and a cosine to a twentieth of the rate, gradients clipped to
    norm 1. Up to `seconds`, the seed decides everything.
    """
    rng, batch = np.random.default_rng(seed), batch or model.batch
    params, state = model.parameters(rng), None
    curve: list[tuple[int, float, float | None]] = []
    places = np.arange(model.context + 1)
    began = time.monotonic()
    with progress("training", steps) as bar:
        for step in range(steps):
            starts = rng.integers(0, len(training) - model.context, batch)
            window = training[starts[:, None] + places]
            logits, saved = layers.language_model.forward(window[:, :-1], params,
                                                          **model.arguments)
            loss, saved_loss = layers.cross_entropy.forward(logits, window[:, 1:])
            grads = saved.backward(saved_loss.backward().logits).params
            grads, _ = layers.clip_by_norm(grads, 1.0)
            rate = learning_rate * min(1.0, (step + 1) / 50) \
                * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
            params, state = layers.adam(params, grads, state, learning_rate=rate,
                                        betas=(0.9, 0.98))
            if model.has_layer and model.attention == "routing_attention":
                params["blocks"] = moved_centroids(params["blocks"], saved.blocks)
            elapsed = time.monotonic() - began
            done = step + 1 == steps or elapsed >= seconds
            due = done or (step + 1) % max(1, steps // EVALUATIONS) == 0
            curve.append((step + 1, float(loss),
                          held_out_loss(model, params, held_out, batch) if due else None))
            tokens = (step + 1) * batch * model.context / elapsed
            bar.advance(text=f"loss {float(loss):.2f}, {tokens:,.0f} tokens/s")
            if done:
                break
    return params, curve


def sample(model: Model, params: dict[str, Any], prompt: str, length: int, seed: int) -> str:
    """Continue `prompt`, drawing each character at temperature 0.7."""
    rng = np.random.default_rng(seed)
    tokens = list(model.encode(prompt))
    for _ in range(length):
        window = np.array(tokens[-model.context:], np.int64)
        logits = layers.language_model(window, params, **model.arguments)[-1].astype(np.float64)
        # the largest of logits with Gumbel noise is a draw from their softmax
        tokens.append(int(np.argmax(logits / 0.7 + rng.gumbel(size=logits.shape))))
    return "".join(model.alphabet[token] for token in tokens)


def save(path: Path, model: Model, params: dict[str, Any]) -> None:
    """Write weights and model to a safetensors file."""
    from safetensors.numpy import save_file

    flat = {name: value for name, value in params.items() if name != "blocks"}
    for i, block in enumerate(params["blocks"]):
        own = {f"attention.{name}": value for name, value in block.get("attention", {}).items()}
        flat |= {f"blocks.{i}.{name}": value for name, value in (block | own).items()
                 if name != "attention"}
    save_file(flat, path, metadata={"pyattn.demo": json.dumps(dataclasses.asdict(model))})


def load(path: Path) -> tuple[Model, dict[str, Any]]:
    """Read what `save` wrote, or raise OptionError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as read

    data = path.read_bytes()
    try:
        flat = read(data)
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        model = Model(**json.loads(header["__metadata__"]["pyattn.demo"]))
        sizes = (model.width, model.num_heads, model.depth, model.context)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"its sizes must be positive integers; got {sizes}")
        params: dict[str, Any] = {name: flat[name] for name in LANGUAGE_MODEL}
        params["blocks"] = [_block(flat, f"blocks.{i}.", model) for i in range(model.depth)]
        if params["embedding"].shape != (len(model.alphabet), model.width):
            raise ValueError(f"embedding must be {len(model.alphabet)} x {model.width}; "
                             f"got {params['embedding'].shape}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{path} does not hold weights that the demo has saved: "
                          f"{type(error).__name__}: {error}") from None
    return model, params


def _block(flat: dict[str, Any], prefix: str, model: Model) -> dict[str, Any]:
    """The parameters of a block, whose names start with `prefix` in the file."""
    if not model.has_layer:
        return {name: flat[prefix + name] for name in BLOCK}
    block = {name: flat[prefix + name] for name in BLOCK_WITH_LAYER if name != "attention"}
    own = f"{prefix}attention."
    return block | {"attention": {name.removeprefix(own): value for name, value in flat.items()
                                  if name.startswith(own)}}


def draw_curve(directory: Path, curve: list[tuple[int, float, float | None]], bigram: float,
               title: str) -> list[Path]:
    """Write loss.csv and, with matplotlib, loss.png; return what was written."""
    table = directory / "loss.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "held_out_loss"])
        writer.writerows(curve)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [table]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, losses, _ = zip(*curve, strict=True)
    axes.plot(steps, losses, color="0.7", linewidth=1, label="training")
    axes.plot(*zip(*[(step, held) for step, _, held in curve if held is not None], strict=True),
              color="#0072b2", marker="o", label="held out")
    axes.axhline(bigram, color="#d55e00", linestyle="--", label=f"bigram entropy {bigram:.2f}")
    axes.set(xlabel="step", ylabel="nats a character", title=title)
    axes.legend()
    picture = directory / "loss.png"
    figure.savefig(picture, dpi=120)
    return [table, picture]


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "demo", help="train a small language model on text that ships with Python",
        description="Train a character-level Transformer on pydoc_data.topics, forward and "
                    "backward by pyattn alone, and compare its loss on held-out text with the "
                    "text's bigram entropy. Status 1 if a full run does not get below it.")
    parser.add_argument("--attention", default="attention", metavar="NAME",
                        help="any causal attention function of pyattn, such as longformer "
                             "(default: attention)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="an option for it, such as window=32; may be repeated; what it "
                             "needs has small defaults")
    parser.add_argument("--ablate", action="store_true",
                        help="zero the attention's output: the same model without it")
    parser.add_argument("--context", type=int, metavar="N",
                        help=f"characters that a text has (default: {CONTEXT}); a step "
                             f"takes some {TOKENS:,} characters however long a text is")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pyattn-demo"), metavar="DIR",
                        help="where weights and loss curve go (default: %(default)s)")
    parser.add_argument("--load", type=Path, metavar="FILE",
                        help="train nothing: take saved weights, and sample from them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, or load, and tell."""
    if args.steps < 1 or not args.seconds > 0 or args.seed < 0:
        raise OptionError("--steps and --seconds must be positive and --seed not negative; got "
                          f"{args.steps}, {args.seconds:g} and {args.seed}")
    text, training, held_out = read_text()
    prompt = held_out[:100].rpartition(" ")[0]
    unigram, bigram = entropies(text)
    if args.load is not None:
        model, params = load(args.load)
        print(sample(model, params, prompt, SAMPLE, args.seed))
        return 0
    name, options = full_name(args.attention), parse_options(args.option)
    attention_function(name, options)
    sizes = {} if args.context is None else {
        "context": require_integer("--context", args.context, minimum=1)}
    model = Model("".join(sorted(set(text))), name, completed(name, options), args.ablate, **sizes)
    if model.context >= min(len(training), len(held_out)):
        raise OptionError(f"--context must be less than the {len(held_out):,} characters held out; "
                          f"got {model.context}")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"text: {len(text):,} characters, {len(model.alphabet)} distinct: "
          f"ln({len(model.alphabet)}) = {math.log(len(model.alphabet)):.2f}, unigram entropy "
          f"{unigram:.2f}, bigram entropy {bigram:.2f} nats")
    name = f"{model.attention}{' zeroed' if model.ablate else ''}"
    if model.options:
        name += f" ({', '.join(f'{key}={value}' for key, value in model.options.items())})"
    print(f"model: {model.depth} blocks of width {model.width}, {model.num_heads} heads of {name}, "
          f"context {model.context}\n", flush=True)
    fresh = model.parameters(np.random.default_rng(args.seed))
    print(_quoted("before training", sample(model, fresh, prompt, SAMPLE // 4, args.seed)),
          flush=True)
    began = time.monotonic()
    params, curve = train(model, model.encode(training), model.encode(held_out), steps=args.steps,
                          seed=args.seed, seconds=args.seconds)
    took = time.monotonic() - began
    step = len(curve)
    loss = [held for _, _, held in curve if held is not None][-1]
    print(_quoted("after training", sample(model, params, prompt, SAMPLE, args.seed)))
    weights = args.out / "weights.safetensors"
    save(weights, model, params)
    written = [weights, *draw_curve(args.out, curve, bigram, name)]
    passed = loss < bigram
    print(f"held-out loss {loss:.3f} nats a character after {step} steps in {took:.0f} s: "
          f"{'below' if passed else 'NOT below'} the bigram entropy, {bigram:.3f}")
    print(f"written: {', '.join(map(str, written))}")
    judged = not model.ablate and step >= STEPS
    return 1 if judged and not passed else 0


def _quoted(title: str, text: str) -> str:
    return f"--- {title}\n{text}\n---\n"
