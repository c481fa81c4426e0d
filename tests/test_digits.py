"""Real images: a Swin encoder learns scikit-learn's digits from our backward alone.

The second half of the set is trained on and the first is the test; they are by different writers.
The encoder's shape and the length of training were chosen on the halves the other way round, so
nothing was fitted to this test. The encoder has one stage: patch merging mixes neighbours as well,
so that with it a network without attention is not much worse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from pyattn.layers import adam, clip_by_norm, cross_entropy, init_swin, linear, swin

SIDE, EPOCHS, BATCH, VARIANTS = 32, 150, 48, 32
ENCODER: dict[str, Any] = {"patch": 4, "num_heads": (4,), "window": 4}
DEPTHS, WIDTH = (4,), 48
RATE, WARM, DECAY = 2e-3, 100, 0.05


def varied(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, stretch and move images a little, each several times: (VARIANTS, ...)."""
    middle = np.full(2, (SIDE - 1) / 2)
    found = np.empty((VARIANTS, *images.shape), np.float32)
    for place in np.ndindex(found.shape[:2]):
        angle = rng.uniform(-0.26, 0.26)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]]) * rng.uniform(0.85, 1.15, 2)
        shift = middle - turn @ middle + rng.uniform(-3, 3, 2)
        found[place] = ndimage.affine_transform(images[place[1]], turn, shift, order=1)
    return found


def without_attention(params: dict[str, Any]) -> dict[str, Any]:
    """Let what the attention computes be multiplied by zeros."""
    return {**params, "stages": [
        {**stage, "blocks": [{**block, "w_o": np.zeros_like(block["w_o"])}
                             for block in stage["blocks"]]} for stage in params["stages"]]}


def logits(params: dict[str, Any], images: np.ndarray) -> tuple[np.ndarray, Any]:
    """Return the logits (B, 10), and the function from their gradient to that of `params`."""
    cells, encoded = swin.forward(images[..., None], params["encoder"], **ENCODER)
    scores, read = linear.forward(cells.mean((1, 2)), params["w"], params["b"])

    def backward(dscores: np.ndarray) -> dict[str, Any]:
        last = read.backward(dscores)
        # forward: the mean over the cells
        dcells = np.broadcast_to(last.x[:, None, None] / np.prod(cells.shape[1:3]), cells.shape)
        dcells = dcells.astype(cells.dtype)
        return {"encoder": encoded.backward(dcells).params, "w": last.w, "b": last.b}

    return scores, backward


def accuracy_of_swin(train: np.ndarray, classes: np.ndarray, test: np.ndarray, right: np.ndarray,
                     *, ablated: bool, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    params = {"encoder": init_swin(rng, image=(SIDE, SIDE), channels=1, patch=ENCODER["patch"],
                                   width=WIDTH, depths=DEPTHS, num_heads=ENCODER["num_heads"],
                                   window=ENCODER["window"]),
              "w": np.zeros((WIDTH * 2 ** (len(DEPTHS) - 1), 10), np.float32),
              "b": np.zeros(10, np.float32)}
    pool, state, step = varied(train, rng), None, 0
    batches = len(train) // BATCH
    for _ in range(EPOCHS):
        order = rng.permutation(len(train))[:batches * BATCH].reshape(batches, BATCH)
        for rows in order:
            if ablated:
                params["encoder"] = without_attention(params["encoder"])
            scores, backward = logits(params, pool[rng.integers(0, VARIANTS, BATCH), rows])
            _, loss = cross_entropy.forward(scores, classes[rows])
            grads, _ = clip_by_norm(backward(loss.backward(1.0).logits), 1.0)
            step += 1
            rate = RATE * min(1, step / WARM) * (1 + np.cos(np.pi * step / (EPOCHS * batches))) / 2
            params, state = adam(params, grads, state, learning_rate=rate, weight_decay=DECAY)
    if ablated:
        params["encoder"] = without_attention(params["encoder"])
    return float((logits(params, test)[0].argmax(1) == right).mean())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_swin_learns_the_digits(record_property):
    """Better than logistic regression on the pixels, and than itself without attention."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    pixels, classes = digits.images / 16, digits.target
    half = len(classes) // 2
    flat = pixels.reshape(len(pixels), -1)
    logistic = max(LogisticRegression(C=c, max_iter=5000).fit(flat[half:], classes[half:])
                   .score(flat[:half], classes[:half]) for c in (0.1, 1, 10))
    images = ndimage.zoom(pixels, (1, 4, 4), order=1).astype(np.float32)
    whole, ablated = (accuracy_of_swin(images[half:], classes[half:], images[:half], classes[:half],
                                       ablated=ablated) for ablated in (False, True))
    for name, value in (("swin", whole), ("without attention", ablated), ("logistic", logistic)):
        record_property(name, value)
        print(f"{name}: {value:.4f}")
    assert whole > logistic + 0.02
    assert whole > ablated + 0.1
