"""Layers: gradients by central differences, torch as a second opinion, invariants, array libraries.

`plain_attention` is a whole attention function written here, so that what the layers add around
one is tested apart from the engine.
"""

import dataclasses
import inspect
import typing

import numpy as np
import pytest

import pyattn
from pyattn import layers
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.differentiable import Saved, differentiable, gradients
from pyattn.features.activation import ACTIVATIONS, erf


@dataclasses.dataclass(frozen=True)
class PlainSaved(Saved):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    p: np.ndarray

    def backward(self, dout):
        group = self.q.shape[-3] // self.k.shape[-3]
        k, v = (np.repeat(x, group, axis=-3) for x in (self.k, self.v))
        scale = self.q.shape[-1] ** -0.5
        dp = dout @ v.swapaxes(-1, -2)
        ds = self.p * (dp - np.sum(dp * self.p, axis=-1, keepdims=True))
        dq, dk, dv = ds @ k * scale, ds.swapaxes(-1, -2) @ self.q * scale, \
            self.p.swapaxes(-1, -2) @ dout
        dk, dv = (d.reshape(*d.shape[:-3], -1, group, *d.shape[-2:]).sum(-3) for d in (dk, dv))
        if self.bias is None:
            return gradients(("q", "k", "v"))(dq, dk, dv)
        dbias = ds.reshape(-1, *ds.shape[-3:]).sum(0)
        return gradients(("q", "k", "v", "bias"))(dq, dk, dv, dbias)


@differentiable
def plain_attention(q, k, v, *, causal=False, bias=None):
    """Textbook attention; bias (H, N, M)."""
    group = q.shape[-3] // k.shape[-3]
    s = q @ np.repeat(k, group, axis=-3).swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias
    if causal:
        s = np.where(np.tri(*s.shape[-2:], s.shape[-1] - s.shape[-2], dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    return p @ np.repeat(v, group, axis=-3), PlainSaved(q, k, v, bias, p)


@dataclasses.dataclass(frozen=True)
class NothingSaved(Saved):
    arrays: tuple

    def backward(self, dout):
        return gradients(("q", "k", "v"))(*(np.zeros_like(x) for x in self.arrays))


def leaves(tree, path=()):
    if isinstance(tree, dict):
        return [leaf for name, item in tree.items() for leaf in leaves(item, (*path, name))]
    if isinstance(tree, list):
        return [leaf for i, item in enumerate(tree) for leaf in leaves(item, (*path, i))]
    return [(path, tree)]


def replaced(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


def check_gradients(operation, arguments, **options):
    """Every gradient against central differences along three random directions."""
    rng = np.random.default_rng(99)
    out, saved = operation.forward(**arguments, **options)
    dout = rng.standard_normal(out.shape)
    grads = saved.backward(dout)
    for name, grad in grads._asdict().items():
        found = dict(leaves(grad))
        assert found.keys() == dict(leaves(arguments[name])).keys(), name
        for path, x in leaves(arguments[name]):
            gradient = found[path]
            assert gradient.shape == x.shape, (name, path)
            assert gradient.dtype == x.dtype, (name, path)
            for _ in range(3):
                direction = rng.standard_normal(x.shape)
                ends = [np.sum(dout * operation(**replaced(
                    arguments, (name, *path), x + step * direction), **options))
                    for step in (1e-5, -1e-5)]
                wanted, got = (ends[0] - ends[1]) / 2e-5, np.sum(gradient * direction)
                size = 1 + abs(wanted) + np.sqrt(np.sum(gradient ** 2))
                assert abs(got - wanted) < 1e-7 * size, f"gradient of {(name, *path)}: {got} " \
                    f"but differences say {wanted}"
    return grads


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def close(got, wanted, rtol=1e-12):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * max(1.0, np.abs(wanted).max()))


def block_params(width=8, seed=0, **options):
    """Parameters none of which is 0 or 1, so that none can be forgotten unnoticed."""
    rng = np.random.default_rng(seed)
    params = layers.init_transformer_block(rng, width, dtype=np.float64, **options)
    return {name: x + 0.3 * rng.standard_normal(x.shape) for name, x in params.items()}


X, CONTEXT = draw((2, 5, 8), (2, 7, 6), seed=7)


def multi_head_arguments(heads=2, groups=2, width=4, biases=True):
    w_qkv, w_o, b_qkv, b_o = draw((8, (heads + 2 * groups) * width), (heads * width, 3),
                                  ((heads + 2 * groups) * width,), (3,))
    return {"x": X, "w_qkv": w_qkv, "w_o": w_o} | ({"b_qkv": b_qkv, "b_o": b_o} if biases else {})


def cross_arguments(biases=True):
    w_q, w_kv, w_o, b_q, b_kv, b_o = draw((8, 12), (6, 12), (12, 5), (12,), (12,), (5,))
    return {"x": X, "context": CONTEXT, "w_q": w_q, "w_kv": w_kv, "w_o": w_o} | (
        {"b_q": b_q, "b_kv": b_kv, "b_o": b_o} if biases else {})


def projected_arguments(context=True, biases=True):
    rows = 6 if context else 8
    w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o = draw(
        (8, 16), (rows, 8), (rows, 6), (12, 5), (16,), (8,), (6,), (5,))
    return {"x": X, "w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o} | (
        {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o} if biases else {}) | (
        {"context": CONTEXT} if context else {})


def feed_arguments():
    return dict(zip(("x", "w1", "b1", "w2", "b2"),
                    draw((2, 3, 4), (4, 6), (6,), (6, 5), (5,)), strict=True))


def norm_arguments():
    return dict(zip(("x", "gamma", "beta"), draw((2, 3, 6), (6,), (6,)), strict=True))


def vit_arguments(positions="learned"):
    rng = np.random.default_rng(3)
    params = layers.init_vit(rng, image=(4, 6), channels=2, patch=2, width=8, depth=2, num_heads=2,
                             positions=positions, dtype=np.float64)
    params["blocks"] = [block_params(num_heads=2, seed=i) for i in range(2)]
    params |= {"norm_beta": rng.standard_normal(8), "class_token": rng.standard_normal(8)}
    return {"images": rng.standard_normal((3, 4, 6, 2)), "params": params}


BIAS = draw((2, 5, 5), seed=8)[0]
CASES = {
    "linear": (layers.linear, dict(zip(("x", "w", "b"), draw((2, 3, 4), (4, 5), (5,)),
                                       strict=True)), {}),
    "linear-vector-no-bias": (layers.linear, dict(zip(("x", "w"), draw((4,), (4, 5)),
                                                      strict=True)), {}),
    "layer_norm": (layers.layer_norm, norm_arguments(), {}),
    "layer_norm-eps": (layers.layer_norm, norm_arguments(), {"eps": 0.5}),
    **{f"feed_forward-{name}": (layers.feed_forward, feed_arguments(), {"activation": name})
       for name in ACTIVATIONS},
    "multi_head": (layers.multi_head, multi_head_arguments(), {"num_heads": 2}),
    "multi_head-no-biases": (layers.multi_head, multi_head_arguments(biases=False),
                             {"num_heads": 2, "causal": True}),
    "multi_head-grouped": (layers.multi_head, multi_head_arguments(4, 2),
                           {"num_heads": 4, "num_kv_heads": 2}),
    "multi_head-one-kv-head": (layers.multi_head, multi_head_arguments(4, 1),
                               {"num_heads": 4, "num_kv_heads": 1}),
    "multi_head-rotary": (layers.multi_head, multi_head_arguments(),
                          {"num_heads": 2, "rotary_base": 100.0, "causal": True}),
    "multi_head-interleaved": (layers.multi_head, multi_head_arguments(),
                               {"num_heads": 2, "rotary_base": 10.0, "interleaved": True,
                                "positions": np.arange(5) + 3}),
    "multi_head-bias": (layers.multi_head, multi_head_arguments() | {"bias": BIAS},
                        {"num_heads": 2}),
    "multi_head-plain": (layers.multi_head, multi_head_arguments() | {"bias": BIAS},
                         {"num_heads": 2, "attention": plain_attention}),
    "cross_attention": (layers.cross_attention, cross_arguments(),
                        {"num_heads": 2, "num_kv_heads": 1}),
    "cross_attention-no-biases": (layers.cross_attention, cross_arguments(biases=False),
                                  {"num_heads": 4, "num_kv_heads": 2, "causal": True}),
    "projected_attention": (layers.projected_attention, projected_arguments(context=False),
                            {"num_heads": 4, "num_kv_heads": 2, "rotary_base": 100.0}),
    "projected_attention-context": (layers.projected_attention, projected_arguments(),
                                    {"num_heads": 4, "num_kv_heads": 2}),
    "projected_attention-no-biases": (layers.projected_attention,
                                      projected_arguments(biases=False),
                                      {"num_heads": 4, "num_kv_heads": 2}),
    **{f"transformer_block-{norm}": (
        layers.transformer_block, {"x": X, "params": block_params(num_heads=2)},
        {"num_heads": 2, "norm": norm, "causal": True}) for norm in ("pre", "post")},
    "transformer_block-grouped": (
        layers.transformer_block,
        {"x": X, "params": block_params(num_heads=2, num_kv_heads=1, biases=False, hidden=5),
         "bias": BIAS},
        {"num_heads": 2, "num_kv_heads": 1, "activation": "silu", "rotary_base": 100.0}),
    **{f"vit-{positions}": (layers.vit, vit_arguments(positions),
                            {"patch": 2, "num_heads": 2, "positions": positions})
       for positions in ("learned", "sinusoidal", "none")},
    "vit-bias": (layers.vit, vit_arguments() | {"bias": draw((2, 7, 7), seed=9)[0]},
                 {"patch": (2, 2), "num_heads": 2, "norm": "post"}),
    "patchify": (layers.patchify, {"images": draw((2, 4, 6, 2))[0]}, {"patch": (2, 3)}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    operation, arguments, options = CASES[case]
    grads = check_gradients(operation, arguments, **options)
    # in the order of the signature, the attention's array options last
    order = [*inspect.signature(operation).parameters, *arguments]
    assert list(grads._fields) == sorted(arguments, key=order.index)


def test_the_gradient_check_fails_on_a_wrong_gradient():
    @dataclasses.dataclass(frozen=True)
    class OffSaved(Saved):
        right: typing.Any

        def backward(self, dout):
            grads = self.right.backward(dout)
            return grads._replace(w=grads.w * (1 + 1e-5))

    @differentiable
    def off(x, w, b):
        out, saved = layers.linear.forward(x, w, b)
        return out, OffSaved(saved)

    _, arguments, _ = CASES["linear"]
    with pytest.raises(AssertionError, match=r"gradient of \('w',\)"):
        check_gradients(off, arguments)


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_left_alone_and_backward_may_be_called_again(case):
    operation, arguments, options = CASES[case]
    for _, x in leaves(arguments):
        x.flags.writeable = False
    try:
        out, saved = operation.forward(**arguments, **options)
        out.flags.writeable = False
        first, second = saved.backward(out), saved.backward(out)
    finally:
        for _, x in leaves(arguments):
            x.flags.writeable = True
    assert np.array_equal(out, operation(**arguments, **options))
    for name in first._fields:
        for (_, a), (_, b) in zip(leaves(getattr(first, name)), leaves(getattr(second, name)),
                                  strict=True):
            assert np.array_equal(a, b)
    assert saved.nbytes > 0


def mapped(function, tree):
    if isinstance(tree, dict):
        return {name: mapped(function, item) for name, item in tree.items()}
    if isinstance(tree, list):
        return [mapped(function, item) for item in tree]
    return function(tree)


PORTABLE = [case for case in CASES if not case.endswith("plain")]
# a new shape costs JAX a compilation for every operation, so that all cases would take a minute
FEW = [case for case in PORTABLE if case.startswith(("linear", "layer_norm", "feed", "patchify"))]


@pytest.mark.parametrize(("case", "library"), [
    *((case, library) for case in PORTABLE for library in ("array_api_strict", "torch")),
    *((case, "jax.numpy") for case in (*FEW, "multi_head-no-biases"))])
def test_other_array_libraries_give_the_same_numbers(case, library):
    xp = pytest.importorskip(library)
    operation, arguments, options = CASES[case]
    arguments = mapped(lambda x: x.astype(np.float32), arguments)
    wanted, saved = operation.forward(**arguments, **options)
    out, other = operation.forward(**mapped(xp.asarray, arguments), **options)
    assert type(out) is type(xp.asarray(wanted))
    assert str(out.dtype).endswith("float32")
    close(out, wanted, rtol=2e-5)
    grads, others = saved.backward(wanted), other.backward(xp.asarray(wanted))
    assert grads._fields == others._fields
    # some gradients are 0 but for rounding, that of a key's bias for one
    size = max(np.abs(x).max() for _, x in leaves(grads._asdict()))
    for name in grads._fields:
        for (path, want), (_, got) in zip(leaves(getattr(grads, name)),
                                          leaves(getattr(others, name)), strict=True):
            np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-5 * size)
            assert str(got.dtype).endswith("float32"), (name, path)


@pytest.mark.parametrize("case", ["linear", "layer_norm", "feed_forward-gelu"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_float32_and_rounds_once(case, dtype):
    import ml_dtypes

    half = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    operation, arguments, options = CASES[case]
    arguments = mapped(lambda x: x.astype(half), arguments)
    wide = mapped(lambda x: x.astype(np.float32), arguments)
    out, saved = operation.forward(**arguments, **options)
    wanted, saved_wide = operation.forward(**wide, **options)
    assert out.dtype == half
    assert np.array_equal(out, wanted.astype(half))
    grads, wanted = saved.backward(out), saved_wide.backward(out.astype(np.float32))
    for got, want in zip(grads, wanted, strict=True):
        assert got.dtype == half
        assert np.array_equal(got, want.astype(half))


def test_half_precision_activations_go_with_single_precision_weights():
    arguments = mapped(lambda x: x.astype(np.float32), multi_head_arguments())
    arguments["x"] = arguments["x"].astype(np.float16)
    out, saved = layers.multi_head.forward(**arguments, num_heads=2)
    assert out.dtype == np.float16
    grads = saved.backward(out)
    assert all(getattr(grads, name).dtype == x.dtype for name, x in arguments.items())


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_blocks_run_in_half_precision(library, dtype, norm):
    import ml_dtypes

    half = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    xp = pytest.importorskip(library)
    arguments = {"x": X, "params": block_params(num_heads=2)}
    options = {"num_heads": 2, "rotary_base": 100.0, "norm": norm}
    arguments = mapped(lambda x: x.astype(half).astype(np.float64), arguments)
    wanted, wide = layers.transformer_block.forward(**arguments, **options)
    out, saved = layers.transformer_block.forward(
        **mapped(lambda x: pyattn.arrays.from_host(xp, x.astype(half)), arguments), **options)
    grads, wide = saved.backward(out), wide.backward(wanted)
    eps = float(ml_dtypes.finfo(half).eps)
    found = {"out": out, "x": grads.x, **grads.params}
    for name, want in {"out": wanted, "x": wide.x, **wide.params}.items():
        assert pyattn.arrays.dtype_name(found[name]) == dtype, name
        got = pyattn.arrays.to_host(found[name]).astype(np.float64)
        # of the whole: the gradient of a key's bias is 0 but for rounding
        assert np.abs(got - want).max() < 16 * eps * max(np.abs(want).max(), 5), name


def test_no_leading_axes_several_and_no_tokens():
    arguments = multi_head_arguments()
    whole = layers.multi_head(**arguments, num_heads=2)
    close(layers.multi_head(**arguments | {"x": X[1]}, num_heads=2), whole[1])
    close(layers.multi_head(**arguments | {"x": X[None, :, None]}, num_heads=2),
          whole[None, :, None])
    out, saved = layers.multi_head.forward(**arguments | {"x": X[:, :0]}, num_heads=2)
    assert out.shape == (2, 0, 3)
    grads = saved.backward(out)
    assert grads.x.shape == (2, 0, 8)
    assert not grads.w_qkv.any()


# projections


def test_fused_qkv_is_three_products_in_the_packing_of_reshape_3_h_d():
    heads, width = 2, 4
    arguments = multi_head_arguments(heads, heads, width)
    packed = (X @ arguments["w_qkv"] + arguments["b_qkv"]).reshape(2, 5, 3, heads, width)
    q, k, v = (packed[:, :, part].swapaxes(1, 2) for part in range(3))
    found = plain_attention(q, k, v, causal=True).swapaxes(1, 2).reshape(2, 5, heads * width)
    wanted = found @ arguments["w_o"] + arguments["b_o"]
    got, saved = layers.multi_head.forward(**arguments, num_heads=heads, causal=True)
    close(got, wanted)
    thirds = [np.split(arguments[name], 3, axis=-1) for name in ("w_qkv", "b_qkv")]
    separate, other = layers.projected_attention.forward(
        X, *thirds[0], arguments["w_o"], *thirds[1], arguments["b_o"], num_heads=heads, causal=True)
    close(separate, wanted)
    fused, three = saved.backward(wanted), other.backward(wanted)
    close(fused.x, three.x)
    close(fused.w_qkv, np.concatenate([three.w_q, three.w_k, three.w_v], axis=1))
    close(fused.b_qkv, np.concatenate([three.b_q, three.b_k, three.b_v]))


def test_grouped_heads_equal_all_heads_with_copied_weights():
    arguments = multi_head_arguments(4, 2, 3)
    q, k, v = np.split(arguments["w_qkv"], [12, 18], axis=1)
    bq, bk, bv = np.split(arguments["b_qkv"], [12, 18])
    copied = [np.repeat(x.reshape(-1, 2, 3), 2, axis=1).reshape(-1, 12) for x in (k, v, bk, bv)]
    out, saved = layers.multi_head.forward(**arguments, num_heads=4, num_kv_heads=2)
    whole, other = layers.projected_attention.forward(
        X, q, copied[0], copied[1], arguments["w_o"], bq, copied[2][0], copied[3][0],
        arguments["b_o"], num_heads=4)
    close(out, whole)
    summed = other.backward(whole).w_k.reshape(8, 2, 2, 3).sum(2).reshape(8, 6)
    close(saved.backward(out).w_qkv[:, 12:18], summed)


def test_cross_attention_is_projected_attention_with_a_context():
    arguments = cross_arguments()
    w_k, w_v = np.split(arguments["w_kv"], 2, axis=1)
    b_k, b_v = np.split(arguments["b_kv"], 2)
    out, saved = layers.cross_attention.forward(**arguments, num_heads=2, num_kv_heads=1)
    same, other = layers.projected_attention.forward(
        X, arguments["w_q"], w_k, w_v, arguments["w_o"], arguments["b_q"], b_k, b_v,
        arguments["b_o"], context=CONTEXT, num_heads=2, num_kv_heads=1)
    close(out, same)
    close(saved.backward(out).context, other.backward(out).context)


def test_any_function_with_a_forward_serves_as_attention():
    arguments = multi_head_arguments() | {"bias": BIAS}
    ours, saved = layers.multi_head.forward(**arguments, num_heads=2, causal=True)
    plain, other = layers.multi_head.forward(**arguments, num_heads=2, causal=True,
                                             attention=plain_attention)
    close(ours, plain)
    for got, want in zip(saved.backward(ours), other.backward(ours), strict=True):
        close(got, want, rtol=1e-10)


def test_array_options_have_gradients_through_the_layer():
    sinks, slopes, scale, gate = draw((2,), (2,), (2,), (2, 5, 5), seed=4)
    options = {"gate": np.abs(np.tanh(gate)), "scale": np.abs(scale), "sinks": sinks,
               "alibi_slopes": np.abs(slopes)}
    check_gradients(layers.transformer_block,
                    {"x": X, "params": block_params(num_heads=2), **options}, num_heads=2)


def test_dropout_is_handed_on_and_its_decisions_come_back():
    arguments = {"x": X, "params": block_params(num_heads=2)}
    options = {"num_heads": 2, "dropout": 0.4}
    out, saved = layers.transformer_block.forward(**arguments, **options, rng=5)
    assert "dropout_seed" in saved.decisions
    assert np.array_equal(out, layers.transformer_block(**arguments, **options, rng=5))
    assert not np.array_equal(out, layers.transformer_block(**arguments, **options, rng=6))
    again = layers.transformer_block(**arguments, **options, decisions=saved.decisions)
    assert np.array_equal(out, again)
    check_gradients(layers.transformer_block, arguments, **options, decisions=saved.decisions)


# blocks


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_with_zeroed_output_weights_is_the_identity(norm):
    params = block_params(num_heads=2)
    params |= {name: np.zeros_like(params[name]) for name in ("w_o", "b_o", "w2", "b2")}
    out, saved = layers.transformer_block.forward(X, params, num_heads=2, norm=norm)
    if norm == "pre":
        assert np.array_equal(out, X)
        assert np.array_equal(saved.backward(X).x, X)
    else:
        assert not np.allclose(out, X)


def test_causal_blocks_see_nothing_later():
    params = block_params(num_heads=2)
    changed = X.copy()
    changed[:, 3:] += 1
    before, after = (layers.transformer_block(x, params, num_heads=2, causal=True)
                     for x in (X, changed))
    assert np.array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_torch_s_encoder_layer(norm, activation):
    torch = pytest.importorskip("torch")
    params = block_params(num_heads=2, hidden=12)
    theirs = torch.nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, activation=activation, batch_first=True, norm_first=norm == "pre",
        dtype=torch.float64)
    names = {"self_attn.in_proj_weight": "w_qkv", "self_attn.in_proj_bias": "b_qkv",
             "self_attn.out_proj.weight": "w_o", "self_attn.out_proj.bias": "b_o",
             "linear1.weight": "w1", "linear1.bias": "b1", "linear2.weight": "w2",
             "linear2.bias": "b2", "norm1.weight": "norm1_gamma", "norm1.bias": "norm1_beta",
             "norm2.weight": "norm2_gamma", "norm2.bias": "norm2_beta"}
    theirs.load_state_dict({name: torch.tensor(params[ours].T) for name, ours in names.items()})
    x = torch.tensor(X, requires_grad=True)
    wanted = theirs(x)
    out, saved = layers.transformer_block.forward(X, params, num_heads=2, norm=norm,
                                                  activation=activation)
    close(out, wanted.detach())
    dout, = draw(X.shape, seed=12)
    wanted.backward(torch.tensor(dout))
    grads = saved.backward(dout)
    close(grads.x, x.grad, rtol=1e-10)
    weights = dict(theirs.named_parameters())
    for name, ours in names.items():
        close(grads.params[ours], weights[name].grad.numpy().T, rtol=1e-10)


def test_pieces_are_torch_s():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, gamma, beta = (torch.tensor(a) for a in norm_arguments().values())
    close(layers.layer_norm(**norm_arguments()), functional.layer_norm(x, (6,), gamma, beta))
    points = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    theirs = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu,
              "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}
    for name, function in theirs.items():
        wanted = function(points)
        slope, = torch.autograd.grad(wanted.sum(), points)
        got = ACTIVATIONS[name](np, points.detach().numpy(), True)
        close(got[0], wanted.detach())
        close(got[1], slope)


def test_erf_without_scipy_is_accurate():
    strict = pytest.importorskip("array_api_strict")
    from scipy import special

    x = np.concatenate([np.linspace(-8, 8, 100_001), [0.0, 1e-300, np.inf, -np.inf]])
    got = np.asarray(erf(strict, strict.asarray(x)))
    np.testing.assert_allclose(got, special.erf(x), rtol=1e-15, atol=0)
    assert np.isnan(np.asarray(erf(strict, strict.asarray([np.nan]))))
    single = x.astype(np.float32)
    np.testing.assert_allclose(np.asarray(erf(strict, strict.asarray(single))),
                               special.erf(x.astype(np.float32).astype(float)), rtol=4e-7)


# loss and optimiser


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cross_entropy_is_torch_s(dtype):
    torch = pytest.importorskip("torch")
    logits = (5 * draw((2, 4, 7))[0]).astype(dtype)
    targets = np.random.default_rng(1).integers(0, 7, (2, 4))
    theirs = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(theirs.reshape(-1, 7),
                                               torch.tensor(targets).reshape(-1))
    wanted.backward()
    loss, saved = layers.cross_entropy.forward(logits, targets)
    assert loss.dtype == dtype
    rtol = 1e-12 if dtype == "float64" else 1e-6
    close(loss, wanted.detach(), rtol)
    close(saved.backward().logits, theirs.grad, rtol)
    close(saved.backward(2.0).logits, 2 * theirs.grad, rtol)
    assert saved.backward(np.asarray(1.0)).logits.dtype == dtype


def test_cross_entropy_gradient_and_range():
    logits = draw((3, 4))[0]
    targets = np.array([0, 3, 1])
    _, saved = layers.cross_entropy.forward(logits, targets)
    direction, = draw((3, 4), seed=2)
    ends = [layers.cross_entropy(logits + step * direction, targets) for step in (1e-6, -1e-6)]
    close(np.sum(saved.backward().logits * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-8)
    huge = np.array([[1000.0, -1000.0]], np.float32)
    assert layers.cross_entropy(huge, np.array([1])) == 2000


@pytest.mark.parametrize("library", ["array_api_strict", "torch", "jax.numpy"])
def test_cross_entropy_on_other_libraries(library):
    xp = pytest.importorskip(library)
    logits = draw((3, 4))[0].astype(np.float32)
    targets = np.array([0, 3, 1], np.int32)
    wanted, saved = layers.cross_entropy.forward(logits, targets)
    loss, other = layers.cross_entropy.forward(xp.asarray(logits), xp.asarray(targets))
    close(loss, wanted, 1e-6)
    close(other.backward().logits, saved.backward().logits, 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torch_s(weight_decay):
    torch = pytest.importorskip("torch")
    params = {"blocks": [{"w": draw((3, 2))[0]}], "u": draw((4, 2), seed=1)[0]}
    theirs = [torch.nn.Parameter(torch.tensor(x)) for _, x in leaves(params)]
    optimiser = torch.optim.AdamW(theirs, lr=0.03, weight_decay=weight_decay)
    state = None
    kept = mapped(np.copy, params)
    start = params
    for step in range(4):
        grads = mapped(lambda x, step=step: np.sin(x + step), params)
        for tensor, (_, grad) in zip(theirs, leaves(grads), strict=True):
            tensor.grad = torch.tensor(grad)
        optimiser.step()
        params, state = layers.adam(params, grads, state, learning_rate=0.03,
                                    weight_decay=weight_decay)
        for tensor, (_, x) in zip(theirs, leaves(params), strict=True):
            close(x, tensor.detach())
    assert state["step"] == 4
    assert all(np.array_equal(a, b) for (_, a), (_, b) in
               zip(leaves(start), leaves(kept), strict=True))


def test_adam_keeps_averages_of_half_precision_in_float32():
    params, state = layers.adam({"w": np.ones(3, np.float16)}, {"w": np.ones(3, np.float16)})
    assert params["w"].dtype == np.float16
    assert state["mean"]["w"].dtype == np.float32


def test_clipping_joins_all_arrays_in_one_norm():
    grads = {"a": np.array([3.0]), "b": [np.array([[4.0]])]}
    clipped, norm = layers.clip_by_norm(grads, 2.5)
    assert norm == 5.0
    close(clipped["a"], [1.5])
    close(clipped["b"][0], [[2.0]])
    assert layers.clip_by_norm(grads, 10.0)[0] is grads


# whole models


def language_model_arguments(positions):
    params = layers.init_language_model(0, vocabulary=7, width=8, depth=2, num_heads=2,
                                        positions=positions, dtype=np.float64)
    params["blocks"] = [block_params(num_heads=2, seed=i) for i in range(2)]
    return {"params": params}, np.random.default_rng(1).integers(0, 7, (3, 5))


@pytest.mark.parametrize(("positions", "options"), [
    (0, {"rotary_base": 100.0}), (6, {}), (5, {"causal": False, "norm": "post"})])
def test_language_model_gradients(positions, options):
    arguments, tokens = language_model_arguments(positions)
    check_gradients(layers.language_model, arguments, tokens=tokens, num_heads=2, **options)


def test_language_models_predict_from_what_came_before():
    arguments, tokens = language_model_arguments(0)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    before, after = (layers.language_model(x, **arguments, num_heads=2) for x in (tokens, changed))
    assert before.shape == (3, 5, 7)
    assert np.array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_language_model_on_other_libraries(library):
    xp = pytest.importorskip(library)
    arguments, tokens = language_model_arguments(5)
    wanted, saved = layers.language_model.forward(tokens, **arguments, num_heads=2)
    out, other = layers.language_model.forward(
        xp.asarray(tokens), **mapped(xp.asarray, arguments), num_heads=2)
    close(out, wanted, 1e-10)
    grads = other.backward(xp.asarray(wanted)).params
    for path, want in leaves(saved.backward(wanted).params):
        close(dict(leaves(grads))[path], want, 1e-8)


# images


def test_patches_are_read_row_by_row():
    images = np.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = layers.patchify(images, patch=(2, 3))
    assert tokens.shape == (2, 4, 18)
    for token, (row, column) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        patch = images[:, row:row + 2, column:column + 3]
        assert np.array_equal(tokens[:, token], patch.reshape(2, 18))


def test_without_positions_permuting_patches_permutes_the_output():
    arguments = vit_arguments("none")
    images = arguments["images"]
    order = np.array([4, 0, 5, 2, 1, 3])
    # six 2 x 2 patches, two rows of three
    grid = images.reshape(3, 2, 2, 3, 2, 2).swapaxes(2, 3).reshape(3, 6, 2, 2, 2)
    moved = grid[:, order].reshape(3, 2, 3, 2, 2, 2).swapaxes(2, 3).reshape(images.shape)
    for positions, same in (("none", True), ("sinusoidal", False)):
        options = {"patch": 2, "num_heads": 2, "positions": positions}
        before = layers.vit(images, arguments["params"], **options)
        after = layers.vit(moved, arguments["params"], **options)
        assert np.allclose(after[:, 0], before[:, 0]) is same
        assert np.allclose(after[:, 1:], before[:, 1:][:, order]) is same


def test_vit_hands_on_decisions_block_by_block():
    arguments = vit_arguments()
    options = {"patch": 2, "num_heads": 2, "dropout": 0.3}
    out, saved = layers.vit.forward(**arguments, **options, rng=1)
    assert sorted(saved.decisions) == ["0.dropout_seed", "1.dropout_seed"]
    assert not np.array_equal(*saved.decisions.values())
    assert np.array_equal(out, layers.vit(**arguments, **options, decisions=saved.decisions))


# errors


@differentiable
def no_attention(q, k, v, **options):
    return np.zeros_like(q), NothingSaved((q, k, v))


E = np.eye


@pytest.mark.parametrize(("error", "match", "call"), [
    (ShapeError, r"x has width 4 but w has 5 rows", lambda: layers.linear(E(4), E(5))),
    (ShapeError, r"w must be \(in, out\)", lambda: layers.linear(E(4), np.ones(4))),
    (ShapeError, r"b must have shape \(4,\)", lambda: layers.linear(E(4), E(4), np.ones(3))),
    (DtypeError, "x must be one of", lambda: layers.linear(np.ones((2, 4), int), E(4))),
    (ShapeError, r"gamma must have shape \(C,\)",
     lambda: layers.layer_norm(E(4), np.ones(3), np.ones(4))),
    (ShapeError, r"beta must have shape \(C,\)",
     lambda: layers.layer_norm(E(4), np.ones(4), np.ones((1, 4)))),
    (OptionError, "activation must be one of 'gelu', 'relu', 'gelu_tanh', 'silu'; got 'swish'",
     lambda: layers.feed_forward(E(4), E(4), np.ones(4), E(4), np.ones(4), activation="swish")),
    (ShapeError, "b1 has width 4 but w2 has 5 rows",
     lambda: layers.feed_forward(E(4), E(4), np.ones(4), E(5), np.ones(5))),
    (ShapeError, r"w_qkv must have a multiple of num_heads \+ 2 num_kv_heads = 9 columns",
     lambda: layers.multi_head(E(4), E(4, 12), E(4), num_heads=3)),
    (OptionError, "num_heads must be a multiple of num_kv_heads; got 4 and 3",
     lambda: layers.multi_head(E(4), E(4, 12), E(4), num_heads=4, num_kv_heads=3)),
    (OptionError, "num_heads must be an integer",
     lambda: layers.multi_head(E(4), E(4, 12), E(4), num_heads=2.0)),
    (ShapeError, r"w_o must have num_heads \* value width = 4 rows",
     lambda: layers.multi_head(E(4), E(4, 12), E(5), num_heads=2)),
    (OptionError, "return_lse must be False here",
     lambda: layers.multi_head(E(4), E(4, 12), E(4), num_heads=2, return_lse=True)),
    (OptionError, r"attention must be a function with \.forward",
     lambda: layers.multi_head(E(4), E(4, 12), E(4), num_heads=2, attention=len)),
    (OptionError, "give rotary_base",
     lambda: layers.multi_head(E(4), E(4, 12), E(4), num_heads=2, positions=np.arange(4))),
    (ShapeError, "w_kv must have 2 \\* num_kv_heads \\* head width = 8 columns",
     lambda: layers.cross_attention(E(4), E(4), E(4), E(4, 12), E(4), num_heads=2)),
    (ShapeError, "w_k must have num_kv_heads \\* head width = 4 columns",
     lambda: layers.projected_attention(E(4), E(4), E(4, 6), E(4), E(4), num_heads=2)),
    (OptionError, "rotary_base must be None with a context",
     lambda: layers.projected_attention(E(4), E(4), E(4), E(4), E(4), num_heads=2, context=E(4),
                                        rotary_base=10.0)),
    (OptionError, r"missing \['w_o'\], unknown \['w_out'\]",
     lambda: layers.transformer_block(X, {"w_out" if n == "w_o" else n: p for n, p in
                                          block_params(num_heads=2).items()}, num_heads=2)),
    (OptionError, "norm must be one of 'pre', 'post'",
     lambda: layers.transformer_block(X, block_params(), num_heads=2, norm="middle")),
    (OptionError, "width must be a multiple of num_heads; got 8 and 3",
     lambda: layers.init_transformer_block(0, 8, num_heads=3)),
    (ShapeError, r"H a multiple of 3", lambda: layers.patchify(np.ones((4, 6, 1)), patch=3)),
    (OptionError, "params must have", lambda: layers.vit(
        **vit_arguments(), patch=2, num_heads=2, positions="none")),
    (ShapeError, r"dout must have shape \(4, 4\); got \(4,\)",
     lambda: layers.linear.forward(E(4), E(4))[1].backward(np.ones(4))),
    (ShapeError, r"targets must have shape \(4,\)", lambda: layers.cross_entropy(
        E(4), np.zeros(3, int))),
    (OptionError, "targets must be 0 to V - 1 = 3; got 0 to 4",
     lambda: layers.cross_entropy(E(4), np.array([0, 1, 2, 4]))),
    (DtypeError, "targets must be integers", lambda: layers.cross_entropy(E(4), np.zeros(4))),
    (OptionError, "nested alike", lambda: layers.adam({"a": E(2)}, {"b": E(2)})),
    (OptionError, "a list of 1, another is not", lambda: layers.adam([E(2)], [E(2), E(2)])),
    (OptionError, r"missing \['w_out'\], unknown \['extra'\]", lambda: layers.language_model(
        np.zeros(3, int), {"extra" if n == "w_out" else n: p for n, p in
                           language_model_arguments(0)[0]["params"].items()}, num_heads=2)),
    (OptionError, "betas must be", lambda: layers.adam(E(2), E(2), betas=(1.0, 0.9))),
])
def test_errors_name_the_argument_the_rule_and_what_was_given(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_layers_are_listed_and_have_backwards():
    for name in layers.__all__:
        assert callable(getattr(layers, name))
    assert pyattn.layers is layers
