"""CUDA kernels of softmax attention: the launch code and the kernels' text, in the emulator.

What any backend is tested by (test_attention.py, test_gate_forms.py) is called here for this one.
A C++ compiler is needed, and without one all of it is skipped.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import oracle
import pytest
import test_attention as attention
import test_gate_forms as gate_forms
from pyattn.kernels.cuda import softmax, tilings
from table import BFLOAT16, CASES, EMPTY, SHAPES, Shape
from test_attention import BY_NAME, judge, run

import pyattn
from pyattn import masks

pytestmark = pytest.mark.gate

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]
NAMES = ["float16", "bfloat16", "float32", "float64"]
SMALL = SHAPES[5]
"""Lengths of several tiles that differ, shared heads, widths that fill no chunk."""

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.fixture(autouse=True)
def few_kernels(emulated):
    """One kernel for all score terms, unless a test is about those for some."""
    emulated.generic = True
    return emulated


# against the oracle


@every_case
def test_cases(case):
    """A dtype each; all of them with ``-m gate``."""
    drawn = case.make(SMALL, np.dtype(DTYPES[CASES.index(case) % 4]))
    judge(drawn, *run(drawn, "cuda"))


@every_case
@pytest.mark.parametrize("number", [0, 2, 3, 5, 7])
def test_all_cases(case, number, emulated):
    """In a dtype of 16 bits and in a wider one, not the same two for each case and shape."""
    emulated.seed = 1 + CASES.index(case) % 3
    for dtype in DTYPES[(CASES.index(case) + number // 2) % 2::2]:
        drawn = case.make(SHAPES[number], np.dtype(dtype))
        judge(drawn, *run(drawn, "cuda"))


WIDER = [SHAPES[4], SHAPES[6], Shape((1,), 2, 1, 65, 129, 128, 128),
         Shape((1,), 1, 1, 66, 70, 200, 136)]


@pytest.mark.parametrize("name", ["causal", "mask_full", "everything"])
@pytest.mark.parametrize(("shape", "dtype"), [
    (shape, dtype) for number, shape in enumerate(WIDER)
    # tilings are those of any 16 bits
    for dtype in (DTYPES[number % 2], *DTYPES[2:])], ids=str)
def test_wider(name, shape, dtype):
    drawn = BY_NAME[name].make(shape, np.dtype(dtype))
    judge(drawn, *run(drawn, "cuda"))


@pytest.mark.parametrize("name", ["softcap", "bias_full", "alibi", "gate_full", "bias_masks"])
def test_kernels_for_single_terms(name, emulated):
    emulated.generic = False
    drawn = BY_NAME[name].make(SHAPES[2], BFLOAT16)
    judge(drawn, *run(drawn, "cuda"))


@pytest.mark.parametrize("name", gate_forms.PARTS)
def test_gates_of_all_forms(name):
    gate_forms.judge(name, SHAPES[5], np.float64, "cuda")


@pytest.mark.parametrize("name", gate_forms.PARTS)
def test_gates_with_lengths(name):
    for alignment in ("bottom_right", "top_left"):
        gate_forms.test_causal_with_lengths_and_softcap(alignment, name, "cuda")
    gate_forms.judge(name, gate_forms.SHAPES[4], np.float32, "cuda")


@every_dtype
def test_masks_of_many_tiles(dtype):
    """Runs longer than one tile, full, partial and absent tiles, another layout for each head."""
    shape = Shape((1,), 4, 2, 330, 330, 16, 16)
    pattern = masks.per_head([masks.causal() & masks.window(200, 0), masks.random_blocks(2, 64, 0),
                              masks.global_tokens([0, 100]) | masks.window(3, 3),
                              masks.causal() & ~masks.window(70, 70)])
    blocks = pattern.compile(330, 330)
    drawn = BY_NAME["dense"].make(shape, np.dtype(dtype))
    dense = dataclasses.replace(drawn.dense, allowed=blocks.dense())
    drawn = dataclasses.replace(drawn, options={"mask": blocks}, dense=dense, again=None)
    judge(drawn, *run(drawn, "cuda"))


@every_dtype
def test_short_queries_share_a_block_and_split_the_keys(dtype, emulated):
    """All heads of a group in one block, and partial results of several blocks joined."""
    for name in ("causal", "sinks", "kv_lengths", "everything"):
        drawn = BY_NAME[name].make(Shape((2,), 8, 2, 3, 700, 16, 16), np.dtype(dtype))
        emulated.multiprocessors = 4
        whole = run(drawn, "cuda")
        judge(drawn, *whole)
        emulated.multiprocessors, emulated.launches = 64, []
        found = run(drawn, "cuda")
        judge(drawn, *found)
        assert "softmax_join" in [name for name, _ in emulated.launches]
        if name == "sinks":         # its keys are all seen, so more than one split has some
            assert not np.array_equal(found[0], whole[0])


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_axes(shape):
    for name in ("causal", "everything", "bias_full", "alibi"):
        attention.test_empty_axes(BY_NAME[name], shape, "cuda")


@pytest.mark.parametrize("lead", [((2, 1), (1, 3), (2, 3)), ((3,), (2, 1), ())], ids=str)
def test_leading_axes_broadcast(lead):
    attention.test_leading_axes_broadcast(lead, "cuda")


def test_huge_logits():
    for dtype in DTYPES:
        attention.test_huge_logits("cuda", np.dtype(dtype))


@pytest.mark.parametrize("name", ["causal", "sinks", "lengths_causal", "softcap"])
def test_a_hopper_takes_its_own_kernels_where_they_serve(name, emulated):
    emulated.capability = (9, 0)
    drawn = BY_NAME[name].make(Shape((1,), 2, 1, 130, 130, 64, 64), BFLOAT16)
    judge(drawn, *run(drawn, "cuda"))
    launched = {kernel.partition("_")[0] for kernel, _ in emulated.launches}
    assert ("hopper" in launched) == (name != "softcap")


# what is masked, and what is not a number


@pytest.mark.parametrize("name", ["causal", "window", "mask_full", "kv_lengths", "lengths_causal",
                                  "segments", "bias_masks", "everything"])
def test_what_is_masked_is_never_read(name):
    attention.test_what_is_masked_is_never_read(BY_NAME[name], SMALL, "cuda")


@every_dtype
def test_poison_reaches_those_who_see_it_and_no_one_else(dtype):
    shape = Shape((1,), 2, 1, 130, 130, 8, 8)
    drawn = BY_NAME["causal_window"].make(shape, np.dtype(dtype))
    clean = run(drawn, "cuda")
    for token, name, value in ((0, "v", np.nan), (63, "k", np.inf), (64, "v", -np.inf),
                               (100, "q", np.nan), (129, "k", np.nan), (70, "v", np.inf)):
        arrays = {key: x.copy() for key, x in drawn.arrays.items()}
        arrays[name][..., token, :] = value
        case = dataclasses.replace(drawn, arrays=arrays, dense=dataclasses.replace(
            drawn.dense, **{name: arrays[name]}))
        out, *_, grads = run(case, "cuda")
        with np.errstate(all="ignore"):
            want, _ = oracle.forward(case.dense, oracle.exact(np.dtype(dtype)))
        told = f"{name} {value} {token}"
        np.testing.assert_array_equal(np.isnan(out), np.isnan(want), err_msg=told)
        np.testing.assert_array_equal(np.isinf(out), np.isinf(want), err_msg=told)
        far = np.abs(np.arange(130) - token) > 3
        for got, before in zip((out, *grads), (clean[0], *clean[-1]), strict=True):
            # tiles of fp32 that are not finite are multiplied in another way
            atol = 1e-5 if dtype == np.float32 else 0
            np.testing.assert_allclose(*(x[..., far, :].astype("f8") for x in (got, before)),
                                       rtol=0, atol=atol, err_msg=told)


@every_dtype
def test_padded_queries_have_zeros_beside_tokens_that_are_not_finite(dtype):
    """In tiles without a mask, where no one looks for such values."""
    drawn = BY_NAME["dense"].make(Shape((1,), 1, 1, 70, 128, 16, 16), np.dtype(dtype))
    for name, more in (("v", {}), ("v", {"softcap": 2.0}), ("k", {}), ("k", {"softcap": 2.0})):
        arrays = drawn.arrays | {name: drawn.arrays[name].copy()}
        arrays[name][0, 0, 3] = np.nan
        with pyattn.use_backend("cuda"):
            out, saved = pyattn.attention.forward(**arrays, **more, q_lengths=58)
            dq = saved.backward(np.ones_like(out)).q
        for x in (out, dq):
            assert np.isnan(x[0, 0, :58]).all()
            assert not x[0, 0, 58:].any()


@every_dtype
def test_a_closed_gate_hides_what_is_not_finite_from_a_softcap(dtype):
    drawn = BY_NAME["dense"].make(Shape((1,), 1, 1, 70, 70, 16, 16), np.dtype(dtype))
    drawn.arrays["k"][0, 0, 5] = np.inf
    hidden = np.ones(70, np.float32)
    hidden[5] = 0
    for term in ({"gate": hidden}, {"bias": np.log(hidden, out=np.full(70, -np.inf, np.float32),
                                                   where=hidden > 0)}):
        with pyattn.use_backend("cuda"):
            out, saved = pyattn.attention.forward(**drawn.arrays, **term, softcap=2.0)
            grads = saved.backward(out)
        seen = np.arange(70) != 5
        assert all(np.isfinite(x.astype("f4")).all()
                   for x in (out, grads.q, grads.k[..., seen, :], grads.v))
        assert not grads.k[..., 5, :].any()


def test_a_query_that_is_not_a_number_has_such_an_lse_where_keys_are_split(emulated):
    emulated.multiprocessors = 64
    drawn = BY_NAME["dense"].make(Shape((1,), 1, 1, 3, 700, 16, 16), np.float32)
    drawn.arrays["q"][0, 0, 1] = np.nan
    out, lse, *_, grads = run(drawn, "cuda")
    assert "softmax_join" in [name for name, _ in emulated.launches]
    assert np.isnan(lse[0, 0]).tolist() == [False, True, False]
    assert np.isnan(out[0, 0]).all(-1).tolist() == [False, True, False]
    assert np.isnan(grads.k).all()


@every_dtype
def test_rows_without_a_finite_score(dtype):
    """They count as rows that see no key, among full tiles too, whatever else of them there is."""
    drawn = BY_NAME["dense"].make(Shape((1,), 2, 1, 70, 128, 16, 16), np.dtype(dtype))
    drawn.arrays["k"][..., 0] = 1
    drawn.arrays["q"][..., 5, 0] = -np.inf
    dout = np.ones((1, 2, 70, 16), dtype)
    dout[..., 5, :] = np.nan
    found = {}
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend):
            (out, lse), saved = pyattn.attention.forward(**drawn.arrays, return_lse=True)
            found[backend] = (out, *saved.backward(dout))
        assert (lse[..., 5] == -np.inf).all()
        assert not out[..., 5, :].any()
        assert not found[backend][1][..., 5, :].any()
    for x, y in zip(*found.values(), strict=True):
        np.testing.assert_allclose(x.astype("f8"), y.astype("f8"), atol=0.25, rtol=0.02)
        assert np.isfinite(y).all()
    drawn.arrays["v"][..., 3, :] = np.nan
    with pyattn.use_backend("cuda"):
        assert not pyattn.attention(**drawn.arrays)[..., 5, :].any()


@every_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["full", "partial"])
def test_inf_with_a_weight_of_0_is_nan(dtype, options):
    """Whether in full tiles, where the product says so, or in partial ones, where it is added."""
    drawn = BY_NAME["dense"].make(Shape((1,), 1, 1, 64, 64, 16, 16), np.dtype(dtype))
    drawn.arrays["q"][...], drawn.arrays["k"][..., 0] = 0, 0
    drawn.arrays["q"][..., 0] = 50
    drawn.arrays["k"][..., 10, 0] = -100
    drawn.arrays["v"][..., (10, 11), :2] = np.inf
    dout = np.ones((1, 1, 64, 16), dtype)
    dout[..., 30, :3] = np.inf
    found = {}
    for backend in ("cpu", "array_api", "cuda"):
        with pyattn.use_backend(backend), np.errstate(all="ignore"):
            out, saved = pyattn.attention.forward(**drawn.arrays, **options)
            found[backend] = (out, *saved.backward(dout))
    for name, arrays in found.items():
        for x, y in zip(arrays, found["cpu"], strict=True):
            np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=name)
    for name in ("out", "v"):
        got, want = ((x[0] if name == "out" else x[3]) for x in (found["cuda"], found["cpu"]))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want), err_msg=name)
        assert np.isnan(got).any()


# what does not change a bit, and what moves between backends


@every_dtype
def test_the_order_of_threads_and_blocks_changes_no_bit(dtype, emulated):
    drawn = BY_NAME["everything"].make(SMALL, np.dtype(dtype))
    found = []
    for seed in (0, 1, 2):
        emulated.seed = seed
        out, lse, *_, grads = run(drawn, "cuda")
        found.append([x.tobytes() for x in (out, lse, *grads)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("pair", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
@pytest.mark.parametrize("name", ["everything", "bias_heads", "alibi_lengths", "segments"])
def test_one_backends_saved_in_anothers_backward(name, pair):
    drawn = BY_NAME[name].make(SMALL, np.float32)
    with pyattn.use_backend(pair[0]):
        (out, lse), saved = pyattn.attention.forward(**drawn.arrays, **drawn.options,
                                                     return_lse=True)
    dout = np.random.default_rng(7).standard_normal(out.shape).astype(out.dtype)
    with pyattn.use_backend(pair[1]):
        grads = pickle.loads(pickle.dumps(saved)).backward(dout)
    judge(drawn, out, lse, dout, None, grads)


def test_dropout_is_that_of_all_backends():
    attention.test_dropout_forward_and_backward_with_its_decisions("cuda")
    q, k, v = (attention.draw(2, 2, n, 8, dtype="f8", seed=n) for n in (70, 90, 90))
    found = []
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend):
            out, saved = pyattn.attention.forward(q, k, v, dropout=0.4, causal=True,
                                                  decisions={"dropout_seed": 2**63 + 12345})
            found.append((out, *saved.backward(np.ones_like(out))))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_what_any_backend_keeps():
    attention.test_strided_and_read_only_views("cuda")
    attention.test_one_key_gives_its_value("cuda")
    attention.test_pooling_by_one_query("cuda")
    attention.test_causal_output_ignores_the_future("cuda")
    attention.test_packed_sequences_equal_separate_ones("cuda")
    attention.test_merge_of_disjoint_keys_is_the_whole("cuda")
    attention.test_calls_of_one_shape_do_not_mix_up_their_options("cuda")


def test_delta():
    for dtype in DTYPES:
        attention.test_delta("cuda", np.dtype(dtype))


def test_weights():
    drawn = BY_NAME["everything"].make(SHAPES[2], np.float32)
    found = []
    for backend in ("cuda", "array_api"):
        with pyattn.use_backend(backend):
            found.append(pyattn.attention(**drawn.arrays, **drawn.options, return_weights=True)[1])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-6)


# what a device has room for


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_tilings_fit(shared):
    """In every dtype and width there is a tiling, or it is said that there is none."""
    room = shared * 1024
    for name in NAMES:
        for width in tilings.WIDTHS:
            for terms in (0, tilings.ALL_TERMS):
                chunk = tilings.chunk_of_values(name, width)
                found = tilings.forward_tiling(name, width, chunk, terms, room)
                if found is not None:
                    assert tilings.forward_shared(name, found, width, chunk) <= room
                    assert found.load % found.step == 0
                parts = tilings.launches_of_keys(name, width, width, terms)
                assert sum(dk for dk, *_ in parts) == sum(dv for _, dv, *_ in parts) == width
    assert tilings.forward_tiling("bfloat16", 256, 256, 0, room) is not None
    assert tilings.forward_tiling("float32", 256, 256, 0, room) is not None


def test_a_device_with_little_shared_memory(emulated):
    emulated.shared_memory = 99 * 1024
    for dtype, width in ((BFLOAT16, 128), (np.float32, 128), (np.float64, 64)):
        drawn = BY_NAME["causal"].make(Shape((1,), 2, 1, 70, 66, width, width), np.dtype(dtype))
        judge(drawn, *run(drawn, "cuda"))


def test_short_queries_of_wide_heads_do_not_fit_one_block(emulated):
    """Blocks of 32 rows are what there is room for, and the heads of a group have 56 queries."""
    emulated.shared_memory = 163 * 1024
    drawn = BY_NAME["causal"].make(Shape((1,), 8, 1, 7, 40, 256, 16), np.float64)
    judge(drawn, *run(drawn, "cuda"))


def test_what_does_not_fit_is_told(emulated):
    q = np.ones((1, 4, 600), np.float32)
    with pyattn.use_backend("cuda"), pytest.raises(pyattn.BackendError, match="at most 512"):
        pyattn.attention(q, q, q)
    emulated.shared_memory = 99 * 1024
    q = np.ones((1, 4, 512), np.float64)
    with pyattn.use_backend("cuda"), pytest.raises(pyattn.BackendError, match="shared memory"):
        pyattn.attention(q, q, q)


def test_a_judge_that_must_fail(emulated, tmp_path):
    """Kernels with a mistake planted are refused: this file's tests can fail."""
    source = (softmax.__spec__.origin.rpartition("/")[0] + "/softmax_backward_keys.cu")
    text = Path(source).read_text()
    assert "pair.dscore * pair.slope * scale" in text
    (tmp_path / "softmax_backward_keys.cu").write_text(
        text.replace("pair.dscore * pair.slope * scale", "pair.dscore * scale"))
    emulated.folders = (tmp_path,)
    drawn = BY_NAME["softcap"].make(SMALL, np.float32)
    with pytest.raises(AssertionError, match="dk"):
        judge(drawn, *run(drawn, "cuda"))
