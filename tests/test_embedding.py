"""Every python block of the README runs, and the recipes give the frameworks' own gradients."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from pyattn.cli import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
FRAMEWORKS = ("jax", "torch", "thinc")


def blocks():
    """(heading, code, output) of the python blocks; a text block right behind one is its output."""
    heading, found = "", []
    parts = r"^#+ ([^\n]+)$|^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    for title, code, output in re.findall(parts, README, re.MULTILINE | re.DOTALL):
        heading = title or heading
        if code:
            found.append((heading, code, output))
    return found


BLOCKS = blocks()


def test_blocks_are_found():
    headings = [heading for heading, _, _ in BLOCKS]
    assert {"Example", "Masks", "JAX", "torch", "thinc", "Adding a variant"} <= set(headings)
    assert sum(bool(output) for _, _, output in BLOCKS) >= 2


def framework(name):
    """The module, or a skip; what a framework's import warns of is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as missing:
            pytest.skip(f"{name} is not installed here: {missing}")


def run(code):
    space = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), space)
    return space


def recipe(heading):
    code, = (code for title, code, _ in BLOCKS if title == heading)
    return run(code)


@pytest.mark.parametrize(("heading", "code", "output"), [
    pytest.param(*block, id=f"{number}-{block[0]}") for number, block in enumerate(BLOCKS)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(jax|torch|thinc).*")
def test_readme_block_runs(heading, code, output, tmp_path, monkeypatch, capsys):
    for name in FRAMEWORKS:
        if re.search(rf"^(import|from) {name}\b", code, re.MULTILINE):
            framework(name)
    monkeypatch.chdir(tmp_path)
    run(code)
    assert output in capsys.readouterr().out
    for dump in tmp_path.iterdir():
        assert main(["check", str(dump)]) == 0


def operands(dtype=np.float32, lead=(2, 4)):
    rng = np.random.default_rng(7)
    return tuple(rng.standard_normal((*lead, 67, 16)).astype(dtype) for _ in range(4))


def close(got, right):
    np.testing.assert_allclose(np.asarray(got), np.asarray(right), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jax_recipe(causal):
    jax = framework("jax")
    attention = recipe("JAX")["attention"]
    *qkv, dout = operands()

    def own(q, k, v):
        swapped = (jax.numpy.swapaxes(x, 1, 2) for x in (q, k, v))
        return jax.numpy.swapaxes(
            jax.nn.dot_product_attention(*swapped, is_causal=causal), 1, 2)

    out, back = jax.vjp(jax.jit(lambda q, k, v: attention(q, k, v, causal)), *qkv)
    right, right_back = jax.vjp(own, *qkv)
    close(out, right)
    for got, wanted in zip(back(dout), right_back(dout), strict=True):
        close(got, wanted)
    mapped = jax.vmap(lambda q, k, v: attention(q, k, v, causal), in_axes=(0, 0, None))
    q, k, v = qkv
    close(mapped(q, k, v[0]), own(q, k, np.stack([v[0]] * 2)))


@pytest.mark.parametrize("causal", [False, True])
def test_torch_recipe(causal):
    torch = framework("torch")
    attention = recipe("torch")["Attention"].apply
    *qkv, dout = map(torch.from_numpy, operands())
    qkv = [x.requires_grad_() for x in qkv]
    out = attention(*qkv, causal)
    right = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=causal)
    close(out.detach(), right.detach())
    grads = torch.autograd.grad(out, qkv, dout)
    for got, wanted in zip(grads, torch.autograd.grad(right, qkv, dout), strict=True):
        close(got, wanted)


def test_torch_recipe_passes_torchs_gradcheck():
    torch = framework("torch")
    attention = recipe("torch")["Attention"].apply
    qkv = [torch.from_numpy(x[..., :5, :3].copy()).requires_grad_()
           for x in operands(np.float64, lead=(2,))[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, True), qkv)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_thinc_recipe():
    framework("thinc.api")
    from thinc.api import Linear, chain

    layer = recipe("thinc")["attention"](num_heads=2)
    rng = np.random.default_rng(7)
    x, dout = rng.standard_normal((9, 24)), rng.standard_normal((9, 8))
    _, backprop = layer(x, is_train=True)
    step = rng.standard_normal(x.shape)
    difference = np.sum(dout * (layer.predict(x + 1e-6 * step) - layer.predict(x - 1e-6 * step)))
    assert np.isclose(np.sum(backprop(dout) * step), difference / 2e-6, rtol=1e-7)

    model = chain(Linear(24, 5), layer, Linear(5, 8))
    x = rng.standard_normal((9, 5)).astype(np.float32)
    model.initialize(X=x)
    out, backprop = model(x, is_train=True)
    assert out.shape == backprop(np.ones_like(out)).shape == (9, 5)
