"""What variants by content have in common: their records, inputs, threads, and what they refuse."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse

import pyattn
from pyattn import layers
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.engines import edges, selected

H, G, N, D = 4, 2, 70, 8
SHAPE = {"q": (2, H, N, D), "k": (2, G, N, D), "v": (2, G, N, D), "qk": (2, H, N, D),
         "h": (2, H, N, D), "centroids": (H, 5, D), "gates": (2, H, N, 3), "a_query": (H, D),
         "a_key": (H, D), "bias_table": (3, H), "edge_bias": (10, D), "k_compressed": (2, G, N, D),
         "v_compressed": (2, G, N, D), "k_window": (2, G, N, D), "v_window": (2, G, N, D)}


def ring(n=N):
    return scipy.sparse.diags_array(np.ones((4, n)), offsets=[-1, 1, 1 - n, n - 1], shape=(n, n))


NSA = {"window": 9, "block_size": 8, "stride": 4, "select_block": 8, "num_selected": 4}
CASES = {
    "lsh": ("lsh", "qk h", {"num_rounds": 2, "bucket_length": 8, "num_buckets": 8, "rng": 0,
                            "causal": True, "kv_lengths": [60, 70]}),
    "lsh in chunks": ("lsh", "qk h", {"num_rounds": 2, "bucket_length": 8, "num_buckets": 8,
                                      "rng": 0, "deduplicate": True}),
    "routing": ("routing", "q k v centroids", {"cluster_size": 7, "causal": True}),
    "routing, top": ("routing", "q k v centroids", {"cluster_size": 7}),
    "nsa": ("nsa", "q k v gates k_compressed v_compressed k_window v_window", NSA),
    "nsa, lengths": ("nsa", "q k v gates", NSA | {"kv_lengths": [70, 33], "q_lengths": [70, 20]}),
    "nsa, kmeans": ("nsa", "q k v gates", {
        "mode": "kmeans", "window": 9, "segment": 16, "num_selected": 5, "tree": True}),
    "nsa, medoids": ("nsa", "q k v gates", {
        "mode": "kmeans", "window": 9, "segment": 16, "num_selected": 5,
        "representative": "medoid", "combine": "single_softmax"}),
    "nsa, lsh": ("nsa", "q k v gates", {
        "mode": "lsh", "window": 9, "segment": 16, "num_selected": 5, "rng": 0}),
    "top_k": ("top_k", "q k v", {"top": 5, "causal": True, "kv_lengths": [60, 70]}),
    "graph": ("graph", "q k v graph bias_table", {"edge_type": np.arange(2 * N) % 3}),
    "graphs": ("graph", "q k v graphs", {}),
    "gat": ("gat", "h a_query a_key graph", {}),
    "bp": ("bp", "q k v edge_bias", {"step": 2, "causal": True}),
}


def drawn(names, dtype=np.float64):
    rng = np.random.default_rng(0)
    given = {"graph": ring(), "graphs": [ring(), ring().tocsr()[::-1]]}
    for name in SHAPE:
        x = rng.standard_normal(SHAPE[name])
        given[name] = (1 / (1 + np.exp(-x)) if name == "gates" else x).astype(dtype)
    return [given[name] for name in names.split()]


def called(case, dtype=np.float64):
    name, names, options = CASES[case]
    arguments = drawn(names, dtype)
    out, saved = getattr(pyattn, f"{name}_attention").forward(*arguments, **options)
    return arguments, out, saved


def close(found, wanted):
    assert found._fields == wanted._fields
    for own, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(own), exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_a_record_moves_to_another_library_but_for_what_was_decided(case):
    torch = pytest.importorskip("torch")
    _, out, saved = called(case)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    want, moved = saved.backward(dout), saved.to(torch)
    found = moved.backward(torch.from_numpy(dout))
    assert all(isinstance(x, torch.Tensor) for x in found)
    close(found, want)
    assert moved.stats == saved.stats
    for name, x in moved.decisions.items():
        assert type(x) is np.ndarray
        np.testing.assert_array_equal(x, saved.decisions[name])
    back = moved.to(np)
    close(back.backward(dout), want)


@pytest.mark.parametrize("case", CASES)
def test_records_are_data_and_inputs_are_left_alone(case):
    name, names, options = CASES[case]
    arguments = drawn(names)
    for x in arguments:
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    before = [x.copy() for x in arguments if isinstance(x, np.ndarray)]
    out, saved = getattr(pyattn, f"{name}_attention").forward(*arguments, **options)
    dout = np.ones_like(out)
    dout.flags.writeable = False
    want = saved.backward(dout)
    again = pickle.loads(pickle.dumps(saved))
    for found in (saved.backward(dout), again.backward(dout)):
        for own, exact in zip(found, want, strict=True):
            np.testing.assert_array_equal(own, exact)
    assert again.nbytes == saved.nbytes > 0
    for x, old in zip([x for x in arguments if isinstance(x, np.ndarray)], before, strict=True):
        np.testing.assert_array_equal(x, old)
    for given in saved.decisions.values():
        assert type(given) is np.ndarray
    same = getattr(pyattn, f"{name}_attention")(
        *arguments, **options, **({"decisions": saved.decisions} if saved.decisions else {}))
    np.testing.assert_array_equal(same, out)


@pytest.mark.parametrize("case", CASES)
def test_threads_change_no_bit(case):
    usual, found = pyattn.get_num_threads(), []
    try:
        for threads in (1, 2):
            pyattn.set_num_threads(threads)
            _, out, saved = called(case, np.float32)
            found.append((out, *saved.backward(np.ones_like(out))))
    finally:
        pyattn.set_num_threads(usual)
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told(case):
    name, names, options = CASES[case]
    operation, arguments = getattr(pyattn, f"{name}_attention"), drawn(names)
    for place, argument in enumerate(names.split()):
        if argument.startswith("graph"):
            wrong = {DtypeError: "no graph", ShapeError: ring(N + 1)}
        else:
            x = arguments[place]
            wrong = {DtypeError: x.astype(int), ShapeError: np.ones((5, 3, 5, 9, 5))}
        for error, bad in wrong.items():
            with pytest.raises((error, ShapeError)):
                operation(*arguments[:place], bad, *arguments[place + 1:], **options)


def _in_child(case, queue):
    queue.put(called(case, np.float32)[1])


@pytest.mark.parametrize("case", ["nsa", "lsh", "top_k", "bp"])
def test_forks_compute_the_same(case):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    here = called(case, np.float32)[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        # other libraries' threads, of which the child uses none
        warnings.simplefilter("ignore")
        child = context.Process(target=_in_child, args=(case, queue))
        child.start()
    found = queue.get(timeout=60)
    child.join()
    np.testing.assert_array_equal(found, here)


def test_engines_records_move_too():
    torch = pytest.importorskip("torch")
    q, k, v = drawn("q k v")
    blocks = np.random.default_rng(0).integers(-1, 9, (2, G, N, 3))
    lists = edges.Edges.from_lists(blocks, batch=2, heads=H, tokens=N)
    for out, saved in (selected.forward(q, k, v, blocks, block_size=8, causal=True),
                       edges.forward(q, k, v, lists)):
        moved = saved.to(torch)
        close(moved.backward(torch.from_numpy(out)), saved.backward(out))
        assert moved.stats == saved.stats
        assert all(type(x) is np.ndarray for x in moved.decisions.values())


def test_a_block_takes_a_layer_with_parameters_of_its_own():
    own = layers.init_nsa_layer(1, 16, num_heads=4, num_kv_heads=2, dtype=np.float64)
    params = layers.init_transformer_block(0, 16, num_heads=4, attention=own, dtype=np.float64)
    assert "w_qkv" not in params
    assert "b_o" not in params
    x = np.random.default_rng(2).standard_normal((2, 40, 16))
    given = {"num_heads": 4, "num_kv_heads": 2, "window": 5, "rotary_base": 1e4}
    for norm in ("pre", "post"):
        y, saved = layers.transformer_block.forward(x, params, attention=layers.nsa_layer,
                                                    norm=norm, **given)
        assert set(saved.decisions) == {"blocks"}
        grads = saved.backward(y)
        assert grads.params.keys() == params.keys()
        assert grads.params["attention"].keys() == own.keys()
        # the block's own arithmetic, by hand
        ones, zeros = np.ones(16), np.zeros(16)
        normed = layers.layer_norm(x, ones, zeros) if norm == "pre" else x
        found = x + layers.nsa_layer(normed, own, **given)
        if norm == "post":
            found = layers.layer_norm(found, ones, zeros)
        inner = layers.layer_norm(found, ones, zeros) if norm == "pre" else found
        whole = found + layers.feed_forward(inner, params["w1"], params["b1"], params["w2"],
                                            params["b2"])
        if norm == "post":
            whole = layers.layer_norm(whole, ones, zeros)
        np.testing.assert_allclose(y, whole, atol=1e-12)


def test_a_block_with_a_layer_has_the_right_gradients():
    own = layers.init_nsa_layer(1, 8, num_heads=2, dtype=np.float64)
    params = layers.init_transformer_block(0, 8, num_heads=2, attention=own, dtype=np.float64)
    pyattn.testing.gradcheck(
        layers.transformer_block, np.random.default_rng(2).standard_normal((1, 40, 8)), params,
        num_heads=2, attention=layers.nsa_layer, window=5)


def test_a_language_model_takes_layers():
    params = layers.init_language_model(
        0, vocabulary=7, width=8, depth=2, num_heads=2,
        attention=lambda rng: layers.init_nsa_layer(rng, 8, num_heads=2, separate=False))
    assert [block["attention"]["w_q"].shape for block in params["blocks"]] == [(8, 8)] * 2
    assert (params["blocks"][0]["attention"]["w_q"]
            != params["blocks"][1]["attention"]["w_q"]).any()
    logits, saved = layers.language_model.forward(
        np.arange(20) % 7, params, num_heads=2, attention=layers.nsa_layer, window=3)
    assert set(saved.decisions) == {"0.blocks", "1.blocks"}
    moved, state = layers.adam(params, saved.backward(logits).params)
    assert (moved["blocks"][1]["attention"]["w_gate"]
            != params["blocks"][1]["attention"]["w_gate"]).any()
    layers.adam(moved, saved.backward(logits).params, state)
    again = layers.language_model(np.arange(20) % 7, params, num_heads=2,
                                  attention=layers.nsa_layer, window=3, decisions=saved.decisions)
    np.testing.assert_array_equal(again, logits)


@pytest.mark.parametrize(("changes", "attention", "says"), [
    ({}, None, "attention must be a layer with .forward"),
    ({}, 3, "attention must be a layer with .forward"),
    ({"w_o": np.ones((8, 8))}, layers.nsa_layer, r"unknown \['w_o'\]"),
    ({"b_o": np.ones(8)}, layers.nsa_layer, r"unknown \['b_o'\]"),
    ({"attention": {}}, layers.nsa_layer, "missing"),
])
def test_a_block_tells_what_a_layer_needs(changes, attention, says):
    own = layers.init_nsa_layer(0, 8, num_heads=2)
    params = layers.init_transformer_block(0, 8, num_heads=2, attention=own) | changes
    with pytest.raises(OptionError, match=says):
        layers.transformer_block(np.ones((5, 8), np.float32), params, num_heads=2,
                                 attention=attention)


@pytest.mark.parametrize(("case", "place", "options", "error", "says"), [
    ("nsa", 3, {}, DtypeError, "an array is needed; got builtins.list"),
    ("top_k", 0, {}, DtypeError, "q must be an array; got builtins.list"),
    ("graph", 4, {}, DtypeError, "bias_table must be an array; got builtins.list"),
    ("bp", 3, {}, DtypeError, "edge_bias must be an array; got builtins.list"),
    ("nsa", None, {"decisions": {"indices": 1}}, OptionError, "may hold blocks; got indices"),
    ("nsa, lsh", None, {"decisions": {"blocks": 1}}, OptionError,
     "may hold clusters, buckets, indices; got blocks"),
    ("nsa, lsh", None, {"num_buckets": (2**16, 2**16)}, OptionError, "at most, all factors"),
    ("lsh", None, {"num_buckets": (2**16, 2**16)}, OptionError, "at most, all factors"),
])
def test_what_is_no_array_or_is_another_modes_is_told(case, place, options, error, says):
    name, names, given = CASES[case]
    arguments = drawn(names)
    if place is not None:
        arguments[place] = arguments[place].tolist()
    with pytest.raises(error, match=says):
        getattr(pyattn, f"{name}_attention")(*arguments, **given | options)


NO_FLAG = (1, "yes", None, np.zeros(3), [])
NO_INTEGER = (2.5, np.nan, "3", True, np.ones(2), [4.0])
NO_REAL = (np.nan, np.inf, "1", True, np.ones(2), 1j, 10**400, object())
NO_SEED = (-1, 0.5, "x", True, {"seed": 1}, np.zeros(2))
NO_DICT = (0, "x", [1], np.zeros(3), {"who": 1})
REFUSED = [(case, name, wrong) for cases, names, wrong in (
    ("lsh", "causal reference attend_across_buckets deduplicate return_lse", NO_FLAG),
    ("routing", "reference return_lse", NO_FLAG), ("top_k", "return_lse", NO_FLAG),
    ("graph", "self_loops return_lse", NO_FLAG), ("gat", "self_loops", NO_FLAG),
    ("bp", "causal log_size return_lse", NO_FLAG), ("nsa, kmeans", "tree", NO_FLAG),
    ("lsh", "num_rounds bucket_length num_buckets", (*NO_INTEGER, 0, -1)),
    ("routing", "cluster_size", (*NO_INTEGER, None, 0, -1)),
    ("top_k", "top", (*NO_INTEGER, None, 0, -1)), ("bp", "step", (*NO_INTEGER, None, 0, -1)),
    ("nsa", "window num_initial num_local num_selected", (*NO_INTEGER, -1)),
    ("nsa", "block_size stride select_block", (*NO_INTEGER, 0, -1)),
    ("nsa, kmeans", "num_clusters num_top_clusters segment", (*NO_INTEGER, 0, -1)),
    ("nsa, kmeans", "iterations", (*NO_INTEGER, -1)),
    ("nsa, lsh", "num_candidates num_rounds", (*NO_INTEGER, 0, -1)),
    ("lsh;routing;nsa;nsa, kmeans;top_k;graph;bp", "scale", NO_REAL),
    ("lsh;routing;top_k;graph", "softcap", (*NO_REAL, 0, -1.0)),
    ("lsh;routing", "dropout", (*NO_REAL, None, -0.1, 1)), ("top_k", "threshold", NO_REAL),
    ("nsa, kmeans;nsa, lsh", "threshold duplicate_threshold", NO_REAL),
    ("gat", "negative_slope", (*NO_REAL, None)),
    ("lsh;routing;nsa, lsh", "rng", NO_SEED),
    ("lsh;routing;nsa;nsa, kmeans;nsa, lsh;top_k", "decisions", NO_DICT),
    ("nsa", "compression activation mode combine causal", (0, None, "x", [], np.zeros(3))),
    ("nsa, kmeans", "metric representative", (0, None, "x", [], np.zeros(3))),
    ("nsa, kmeans", "num_initial num_buckets stride", (7, "x", [], np.zeros(3), np.ones(1))))
    for case in cases.split(";") for name in names.split()]


@pytest.mark.parametrize(("case", "name", "values"), REFUSED, ids=lambda x: str(x)[:20])
def test_options_of_a_wrong_kind_are_refused(case, name, values):
    variant, names, options = CASES[case]
    arguments = drawn(names)
    for value in values:
        with pytest.raises(OptionError, match=f"{name}.* (must|may)"):
            getattr(pyattn, f"{variant}_attention")(*arguments, **options | {name: value})


@pytest.mark.parametrize("case", CASES)
def test_an_unknown_keyword_is_a_type_error(case):
    name, names, options = CASES[case]
    with pytest.raises(TypeError, match="colour"):
        getattr(pyattn, f"{name}_attention")(*drawn(names), **options, colour=1)


def test_weights_and_parameters_are_dicts():
    q, k, v, gates = drawn("q k v gates")
    for wrong in (q, "x", 3):
        with pytest.raises(DtypeError, match="k_weights must be a dict of arrays"):
            pyattn.nsa_attention(q, k, v, gates, k_weights=wrong)
        with pytest.raises(DtypeError, match="params must be a dict of arrays"):
            layers.nsa_layer(q[0], wrong, num_heads=4)
    params = layers.init_nsa_layer(0, 8, num_heads=4)
    for value in (0.0, -1.0, "1", np.inf):
        with pytest.raises(OptionError, match="rotary_base must"):
            layers.nsa_layer(q[0], params, num_heads=4, rotary_base=value)
    with pytest.raises(OptionError, match="interleaved must"):
        layers.nsa_layer(q[0], params, num_heads=4, rotary_base=1e4, interleaved=1)


@pytest.mark.parametrize("make", [
    lambda rng: layers.init_nsa_layer(rng, 8, num_heads=2),
    lambda rng: layers.init_transformer_block(rng, 8, num_heads=2),
    lambda rng: layers.init_swin_block(rng, 8, num_heads=2, window=2),
    lambda rng: layers.init_timesformer_block(rng, 8, num_heads=2),
    lambda rng: pyattn.masks.random_blocks(1, 2, rng=rng),
    lambda rng: pyattn.features.lsh_hash(np.ones((1, 4, 2)), num_buckets=2, num_rounds=1, rng=rng),
    lambda rng: pyattn.attention(*np.ones((3, 1, 4, 2)), dropout=0.5, rng=rng),
    lambda rng: pyattn.attention(*np.ones((3, 1, 4, 2)), rng=rng),
    lambda rng: pyattn.axial_attention(*np.ones((3, 1, 4, 2)), shape=(2, 2), rng=rng),
    lambda rng: pyattn.bigbird_attention(*np.ones((3, 1, 64, 2)), block_size=1, rng=rng),
    lambda rng: pyattn.random_attention(*np.ones((3, 1, 4, 2)), num_random=1, block_size=1,
                                        rng=rng)])
def test_what_is_no_seed_is_refused_everywhere(make):
    for wrong in NO_SEED:
        with pytest.raises(OptionError, match=r"rng must be"):
            make(wrong)
    make(0), make(np.random.default_rng(0))


def test_nsa_needs_gates():
    with pytest.raises(DtypeError, match="gates must be an array; got None"):
        pyattn.nsa_attention(*drawn("q k v"), None)


@pytest.mark.parametrize("mode", ["paper", "kmeans", "lsh"])
@pytest.mark.parametrize("name", ["k_compressed", "v_compressed", "k_window", "v_window"])
def test_branches_of_nsa_have_keys_and_values_alike(mode, name):
    q, k, v, gates = drawn("q k v gates")
    own = dict(zip(("k_compressed", "v_compressed", "k_window", "v_window"), (k, v, k, v),
                   strict=True))
    for wrong in (own[name][..., :-1], own[name][..., :-5, :], own[name][:, :1]):
        with pytest.raises(ShapeError, match=f"{name} must have the heads, tokens and width of"):
            pyattn.nsa_attention(q, k, v, gates, **own | {name: wrong}, mode=mode)


@pytest.mark.parametrize("mode", ["kmeans", "lsh"])
def test_modes_that_group_keys_need_equal_leading_axes(mode):
    q, k, v, gates = drawn("q k v gates")
    with pytest.raises(ShapeError, match="leading axes of q, k and v must be equal"):
        pyattn.nsa_attention(q, k[:1], v[:1], gates, mode=mode)
    with pytest.raises(ShapeError, match="k has width 7 but q has width 8"):
        pyattn.nsa_attention(q, k[..., :7], v, gates, mode=mode)


HUGE = 2**40


@pytest.mark.parametrize(("case", "huge", "enough"), [
    ("nsa", {"window": HUGE}, {"window": N}), ("nsa", {"num_selected": HUGE}, {"num_selected": 9}),
    ("nsa", {"select_block": HUGE}, {"select_block": N}), ("nsa", {"stride": HUGE}, {"stride": N}),
    ("nsa", {"block_size": HUGE}, {"block_size": N + 1}),
    ("nsa, kmeans", {"num_clusters": HUGE}, {"num_clusters": 16}),
    ("nsa, kmeans", {"segment": HUGE, "num_clusters": 3}, {"segment": N + 1, "num_clusters": 3}),
    ("nsa, kmeans", {"num_top_clusters": HUGE}, {"num_top_clusters": N}),
    ("nsa, lsh", {"num_candidates": HUGE}, {"num_candidates": N}),
    ("nsa, lsh", {"num_clusters": HUGE}, {"num_clusters": 16}),
    ("top_k", {"top": HUGE}, {"top": N}), ("bp", {"step": HUGE}, {"step": N}),
    ("lsh", {"bucket_length": HUGE}, {"bucket_length": N}),
    ("routing", {"cluster_size": HUGE}, {"cluster_size": N}),
    ("routing, top", {"cluster_size": HUGE}, {"cluster_size": N}),
])
def test_sizes_beyond_all_tokens_are_those_of_all(case, huge, enough):
    name, names, options = CASES[case]
    arguments = drawn(names)[:3] if name == "bp" else drawn(names)
    found, wanted = (getattr(pyattn, f"{name}_attention")(*arguments, **options | more)
                     for more in (huge, enough))
    np.testing.assert_array_equal(found, wanted)


def test_the_groups_of_hashes_are_as_many_as_asked_for():
    q, k, v, gates = drawn("q k v gates")
    for num_clusters, groups in ((None, 2), (2, 2), (6, 6), (7, 6), (100, 16)):
        _, saved = pyattn.nsa_attention.forward(q, k, v, gates, mode="lsh", segment=35, rng=0,
                                                num_clusters=num_clusters)
        assert saved.branches[0].saved.attended.k.shape[-2] == 2 * groups
        assert saved.decisions["clusters"].max() < 2 * groups
        assert saved.decisions["buckets"].max() > 7


def test_the_rounds_of_a_mask_are_drawn():
    qk = np.random.default_rng(0).standard_normal((1, 6, 4))
    _, saved = pyattn.lsh_attention.forward(
        qk, qk, num_rounds=1, bucket_length=6, causal=True,
        decisions={"buckets": np.array([[[0, 1, 0, 1, 1, 0]]])})
    assert saved.attended.mask.draw(6).split() == [
        "█·····", "·█····", "█·····", "·█····", "·█·█··", "█·█···"]
