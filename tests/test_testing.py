"""The checker must pass what is right, and catch, locate and explain what is wrong."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import pyattn
from pyattn import reference, testing
from pyattn.checks import DtypeError, OptionError
from pyattn.testing import cases
from pyattn.testing.compare import ulp
from pyattn.testing.report import CaseResult, Report


class Kernel:
    """Dense attention in NumPy, float32 inside, with one planted mistake at a time."""

    def __init__(self, mistake=""):
        self.mistake = mistake

    def weights(self, q, k, causal, window, scale, mask):
        if isinstance(window, tuple):
            raise NotImplementedError("windows are symmetric")
        (h, n, d), (g, m) = q.shape[-3:], k.shape[-3:-1]
        group = np.arange(h) % g if self.mistake == "swapped groups" else np.arange(h) // (h // g)
        scale = 1 / np.sqrt(d) if scale is None else scale
        s = q.astype(np.float32) @ np.swapaxes(k, -1, -2).astype(np.float32)[..., group, :, :]
        s = s * np.float32(1 if self.mistake == "no scale" else scale)
        offset = 0 if (causal == "top_left") != (self.mistake == "alignment") else m - n
        ahead = np.arange(n)[:, None] + offset - np.arange(m)
        allowed = np.ones((n, m), bool) if mask is None else mask
        if causal:
            allowed = allowed & (ahead >= (-1 if self.mistake == "off by one" else 0))
        if window is not None:
            allowed = allowed & (abs(ahead) <= window)
        s = np.where(allowed, s, -np.inf)
        top = s.max(-1, keepdims=True, initial=-1e30)
        e = np.exp(s - top)
        total = e.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = np.where(total > 0, np.log(total) + top, -np.inf)[..., 0]
        return e / np.where(total > 0, total, 1), lse, group, scale

    def __call__(self, q, k, v, *, causal=False, window=None, scale=None, mask=None):
        p, lse, group, _ = self.weights(q, k, causal, window, scale, mask)
        values = v.astype(np.float32)
        if self.mistake != "leak":
            # this kernel is only given poison that no query sees
            values = np.where(np.isfinite(values), values, 0)
        with np.errstate(invalid="ignore"):
            out = p @ values[..., group, :, :]
        if self.mistake == "empty rows":
            mean = values.mean(-2, keepdims=True)[..., group, :, :]
            out = np.where(np.isinf(lse)[..., None], mean, out)
        if self.mistake == "one tile" and out.shape[-2] > 128:
            out[..., 1, 64:128, :] *= -1
        if self.mistake == "one row" and out.shape[-2] > 66:
            out[..., 0, 66, :] += 0.01
        if self.mistake == "noise":
            rng = np.random.default_rng(0)
            out = 0.09 * out + rng.standard_normal(out.shape) * out.std()
        if self.mistake == "base 2":
            lse = lse / np.log(2)
        dtype = np.float64 if self.mistake == "dtype" else q.dtype
        return out.astype(dtype), lse.astype(np.float32)

    def backward(self, q, k, v, out, lse, dout, *, causal=False, window=None, scale=None,
                 mask=None):
        p, _, group, scale = self.weights(q, k, causal, window, scale, mask)
        h, g = q.shape[-3], k.shape[-3]
        dp = dout @ np.swapaxes(v, -1, -2)[..., group, :, :]
        delta = (dout * out).sum(-1, keepdims=True)
        ds = p * (dp - (0 if self.mistake == "no delta" else delta))
        if self.mistake != "no scale in dq":
            ds = ds * np.float32(scale)
        dq = ds @ k[..., group, :, :]
        if self.mistake == "no scale in dq":
            ds = ds * np.float32(scale)
        dk, dv = np.swapaxes(ds, -1, -2) @ q, np.swapaxes(p, -1, -2) @ dout
        if self.mistake == "no group sum":
            return dq, dk[..., h // g - 1::h // g, :, :], dv[..., h // g - 1::h // g, :, :]
        grouped = (*q.shape[:-3], g, h // g)
        return (dq, dk.reshape(*grouped, *dk.shape[-2:]).sum(-3),
                dv.reshape(*grouped, *dv.shape[-2:]).sum(-3))


SHAPES = ("65 x 65", "113 x 203", "grouped heads", "causal*", "window", "boolean mask",
          "(B, N, H, D) memory", "no keys", "no queries", "one query*")


def judged(mistake, wanted=SHAPES, backward=True):
    kernel = Kernel(mistake)
    return testing.check(kernel, backward=kernel.backward if backward else None, cases=wanted,
                         name="kernel")


def test_a_right_kernel_passes():
    report = judged("")
    assert report.passed, str(report)
    assert report.count("ok") > 12
    assert {c.name for r in report.results for c in r.comparisons} == {"out", "lse", "dq", "dk",
                                                                       "dv"}


@pytest.mark.parametrize(("mistake", "case", "array", "hint", "place"), [
    ("off by one", "causal", "out", "off by one: j <= i + 1", "rows 0:64"),
    ("off by one", "causal, more queries", "out", "off by one: j <= i + 1", "rows 64:128"),
    ("off by one", "causal window", "out", "off by one: j <= i + 1", "rows 0:64"),
    ("off by one", "causal from the top left, more keys", "out", "shifted by one to later", ""),
    ("no scale", "65 x 65", "out", "the scale is missing", ""),
    ("alignment", "causal, more keys", "out", "aligned to the top left", "rows"),
    ("alignment", "causal from the top left, more keys", "out", "aligned to the bottom right", ""),
    ("swapped groups", "grouped heads", "out", "h % G", "head"),
    ("empty rows", "causal, more queries", "out", "mean of the values", "head"),
    ("one tile", "causal", "out", "", "head 1, rows 64:128"),
    ("one row", "113 x 203", "out", "", "head 0, rows 64:113"),
    ("noise", "113 x 203", "out", "", ""),
    ("dtype", "65 x 65", "out", "", ""),
    ("base 2", "65 x 65", "lse", "base 2", ""),
    ("no scale in dq", "65 x 65", "dq", "lacks the factor scale", ""),
    ("no delta", "65 x 65", "dq", "delta", ""),
    ("no group sum", "grouped heads", "dk", "last query head of each group", ""),
    ("leak", "NaN outside the window", "out", "masked pair", "head"),
])
def test_planted_mistakes_are_caught_located_and_explained(mistake, case, array, hint, place):
    report = judged(mistake, case, backward=mistake != "leak")
    assert not report
    result = report.failures[0]
    wrong = next(c for c in result.comparisons if not c)
    assert wrong.name == array
    assert hint in result.hint
    assert bool(hint) == bool(result.hint), result.hint
    assert place in wrong.where
    assert wrong.name in str(report)
    assert wrong.reason in str(report)


def test_reasons_name_the_row_the_dtype_and_the_correlation():
    def reason(mistake, case):
        return next(c.reason for r in judged(mistake, case).failures for c in r.comparisons
                    if not c)
    assert "rows are wrong: 66, in 2 of 4 heads" in reason("one row", "113 x 203")
    assert "dtype float64 where float32 is right" in reason("dtype", "65 x 65")
    noise = judged("noise", "113 x 203").failures[0].comparisons[0]
    assert noise.correlation < 0.15


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_plain_formulas_pass_their_own_check(dtype):
    def plain(q, k, v, **options):
        return reference.attention(q, k, v, precision=reference.plain(q.dtype), **options)

    report = testing.check(plain, dtypes=[dtype], name="plain", cases=[
        "113 x 203", "grouped heads", "no keys", "padded queries and keys, causal", "ALiBi",
        "packed sequences", "NaN that later queries see", "everything at once"])
    assert report.passed, str(report)


def exact_and_plain(shape=(2, 3, 150, 16), dtype=np.float32, seed=0):
    exact = np.random.default_rng(seed).standard_normal(shape)
    return exact, exact.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_compare_passes_rounding_and_fails_a_perturbed_row(dtype):
    exact, plain = exact_and_plain(dtype=dtype)
    assert testing.compare(plain, exact, plain)
    wrong = plain.copy()
    wrong[1, 2, 77] += np.asarray(8 * ulp(4.0, np.dtype(dtype))).astype(dtype)
    found = testing.compare(wrong, exact, plain, name="out")
    assert not found
    assert found.worst[:3] == (1, 2, 77)
    assert found.where == "batch 1, head 2, rows 64:128"
    assert "1 of 900 rows is wrong: 77, in 1 of 6 heads" in found.reason
    assert (found.heat > 1).sum() == 1
    assert found.heat[1, 2, 1, 0] > 1


def test_compare_locates_a_tile_in_rows_and_columns():
    exact, plain = exact_and_plain((130, 200))
    wrong = plain.copy()
    wrong[64:128, 128:192] = 0
    found = testing.compare(wrong, exact, plain)
    assert found.where == "rows 64:128, columns 128:192"
    np.testing.assert_array_equal(np.argwhere(found.heat > 1), [[1, 2]])


def test_compare_wants_nan_and_inf_where_they_belong():
    exact, plain = exact_and_plain()
    exact[0, 0, 3], exact[0, 1, 4], exact[0, 1, 5] = np.nan, np.inf, -np.inf
    plain = exact.astype(np.float32)
    assert testing.compare(plain, exact, plain).parity
    for index, value in (((0, 0, 3), 0), ((0, 1, 4), -np.inf), ((0, 1, 5), np.nan),
                         ((1, 2, 140), np.nan), ((1, 2, 140), np.inf)):
        wrong = plain.copy()
        wrong[(*index, 7)] = value
        found = testing.compare(wrong, exact, plain)
        assert not found
        assert not found.parity
        assert found.worst == (*index, 7)
        assert "not finite" in found.reason


def test_compare_wants_shape_and_dtype():
    exact, plain = exact_and_plain()
    assert "shape (2, 3, 150) where" in testing.compare(plain[..., 0], exact, plain).reason
    assert "dtype float16 where float32" in testing.compare(
        plain.astype(np.float16), exact, plain).reason
    assert "dtype float64" in testing.compare(exact, exact, plain).reason


def test_compare_sees_a_wrong_tile_of_small_values_below_the_bound():
    exact, plain = exact_and_plain((1, 130, 16))
    exact[:, :64] *= 1e4
    plain = exact.astype(ml_dtypes.bfloat16)
    wrong = plain.copy()
    wrong[:, 64:128] = -wrong[:, 64:128]
    found = testing.compare(wrong, exact, plain, name="dk", factor=3)
    assert found.error < found.bound
    assert not found
    assert "correlation -1.000 in 1 of 3 tiles" in found.reason


def test_compare_forgives_cancellation_only_up_to_the_floor():
    exact = np.zeros((1, 70, 8))
    plain = exact.astype(np.float32)
    noise = np.full_like(plain, 1e-7)
    assert not testing.compare(noise, exact, plain)
    assert testing.compare(noise, exact, plain, floor=2e-7)
    assert not testing.compare(3 * noise, exact, plain, floor=2e-7)


@pytest.mark.parametrize("shape", [(), (4,), (2, 0, 3), (0,), (2, 3, 65)])
def test_compare_takes_any_shape(shape):
    exact, plain = exact_and_plain(shape)
    found = testing.compare(np.asarray(plain), exact, plain, axes=1)
    assert found
    assert isinstance(str(found) + found.where, str)


def test_ulp_is_the_spacing():
    for dtype in (np.float16, np.float32, np.float64):
        for value in (1.0, 1.5, 3.999, 4.0, 0.1, 1000.0):
            assert ulp(value, np.dtype(dtype)) == np.spacing(np.asarray(value).astype(dtype))
    assert ulp(1.0, np.dtype(ml_dtypes.bfloat16)) == 2 ** -7


def test_what_a_candidate_cannot_do_is_skipped_and_said():
    def narrow(q, k, v, causal=False):
        if q.shape[-1] == 17:
            raise NotImplementedError("widths must be even")
        return Kernel()(q, k, v, causal=causal)[0]

    report = testing.check(narrow, cases=["odd widths", "scale by head", "3 x 3"])
    assert {r.case: r.status for r in report.results} == {
        "odd widths": "skipped", "scale by head": "skipped", "3 x 3": "ok"}
    messages = {r.case: r.message for r in report.results if r.status == "skipped"}
    assert messages["odd widths"] == "widths must be even"
    assert messages["scale by head"] == "it does not take scale"
    assert report.passed
    assert not testing.check(narrow, cases="odd widths").passed     # nothing was checked


def test_a_candidate_that_raises_or_writes_to_its_inputs_fails():
    def broken(q, k, v):
        raise RuntimeError("illegal memory access")

    def greedy(q, k, v):
        out, _ = Kernel()(q, k, v)
        k *= 2
        return out

    report = testing.check(broken, cases="3 x 3")
    assert report.failures[0].status == "ERROR"
    assert "illegal memory access" in str(report)
    report = testing.check(greedy, cases="3 x 3")
    assert report.failures[0].message == "it wrote to its input k"


def test_a_candidate_with_forward_and_saved_is_checked_with_dlse():
    def forward(q, k, v, *, return_lse=False, **options):
        precision = reference.plain(q.dtype)
        result = reference.attention(q, k, v, precision=precision, **options)

        def backward(dout, dlse=None):
            given = None if ignore else dlse
            return reference.attention_backward(q, k, v, dout, given, precision=precision,
                                                **options)
        return result, SimpleNamespace(backward=backward)

    ignore = False
    everything = ["everything at once", "113 x 203", "bias with -inf"]
    assert testing.check(SimpleNamespace(forward=forward), cases=everything)
    ignore = True
    report = testing.check(SimpleNamespace(forward=forward), cases="113 x 203")
    assert report.failures[0].hint == "dlse is ignored"


def test_bad_requests_are_refused():
    with pytest.raises(OptionError, match="kind must be one of"):
        testing.check(Kernel(), "convolution")
    with pytest.raises(OptionError, match="dtypes must be one of"):
        testing.check(Kernel(), dtypes=["int8"])
    with pytest.raises(OptionError, match="'nonsense'"):
        testing.check(Kernel(), cases="nonsense")
    with pytest.raises(OptionError, match="callable"):
        testing.check(3)
    with pytest.raises(OptionError, match="no right answer for dw"):
        testing.check(SimpleNamespace(forward=lambda q, k, v: (
            q, SimpleNamespace(backward=lambda dout: {"w": q}))), cases="3 x 3")


def test_cases_are_reproducible_and_told_apart():
    names = [case.name for case in cases.ATTENTION]
    assert len(set(names)) == len(names)
    a, b = (cases.select("everything at once")[0].inputs("float32") for _ in range(2))
    np.testing.assert_array_equal(a.q, b.q)
    np.testing.assert_array_equal(a.options["bias"], b.options["bias"])
    assert a.q.dtype == a.options["bias"].dtype == np.float32
    case = cases.select("(B, N, H, D) memory")[0]
    assert not case.inputs("float32").q.flags.c_contiguous
    poisoned = cases.select("NaN outside the window")[0].inputs("bfloat16")
    assert np.isnan(poisoned.k.astype(np.float32)).any()
    assert {c.family for c in cases.select("window")} == {"window"}
    assert set(cases.select("quick")) < set(cases.select())


class Page(HTMLParser):
    """Checks that tags are closed, and collects what a page refers to."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def test_the_html_report_is_well_formed_and_loads_nothing(tmp_path):
    report = judged("one tile", ["causal", "65 x 65", "sinks"])
    hostile = CaseResult("<script>alert(1)</script>", "float32", "ERROR",
                         message="<img src=http://example.com/x>")
    report = dataclasses.replace(report, results=(*report.results, hostile))
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert "img" not in page.tags
    for word in ("@import", "url("):
        assert word not in text
    assert page.tags.count("svg") > 3
    assert "head 1, rows 64:128" in text
    assert "it does not take sinks" in text


def test_reports_of_large_problems_stay_small(tmp_path):
    exact = np.zeros((2, 64, 20000, 1))
    comparison = testing.compare(exact.astype(np.float32), exact, exact.astype(np.float32))
    bias = np.zeros((3, 2000, 2000), np.float32)
    square = testing.compare(bias, bias.astype(np.float64), bias, name="dbias")
    report = Report("large", (CaseResult("dump", "float32", "ok", (comparison, square)),))
    report.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    assert max(map(len, str(report).splitlines())) < 200


def quadratic(wrong=()):
    """out = x * x @ w + params.b, with wrong gradients for some of them."""
    def forward(x, w, params, *, power=2, decisions=None):
        drawn = {"shift": np.asarray(0.5)} if decisions is None else decisions
        out = (x ** power) @ w + params["b"] + drawn["shift"]

        def backward(dout):
            grads = {"x": power * x ** (power - 1) * (dout @ w.T), "w": (x ** power).T @ dout,
                     "params": {"b": dout.sum(0)}}
            for name in wrong:
                if name == "b":
                    grads["params"]["b"] = grads["params"]["b"] * 1.0001
                else:
                    grads[name] = grads[name] * 1.0001
            return grads
        return out, SimpleNamespace(backward=backward, decisions=drawn)
    return SimpleNamespace(forward=forward, __name__="quadratic")


def arguments():
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 3)), rng.standard_normal((3, 2)), {"b": rng.standard_normal(2)}


def test_gradcheck_passes_what_is_right_and_names_what_is_wrong():
    assert testing.gradcheck(quadratic(), *arguments()).passed
    for wrong, named in (("x", "x"), ("w", "w"), ("b", "params.b")):
        with pytest.raises(testing.GradientError, match=f"the gradient of {named} is wrong"):
            testing.gradcheck(quadratic([wrong]), *arguments())
        result = testing.gradcheck(quadratic([wrong]), *arguments(), raise_on_failure=False)
        assert result.wrong == (named,)
        assert not result
    assert testing.gradcheck(quadratic(["x"]), *arguments(), wrt=["w", "params.b"])
    assert issubclass(testing.GradientError, AssertionError)


def test_gradcheck_refuses_what_it_cannot_check():
    x, w, params = arguments()
    with pytest.raises(DtypeError, match="w must be float64"):
        testing.gradcheck(quadratic(), x, w.astype(np.float32), params)
    with pytest.raises(OptionError, match=r"\.forward"):
        testing.gradcheck(np.add, x, x)
    with pytest.raises(OptionError, match="wrt must name"):
        testing.gradcheck(quadratic(), x, w, params, wrt=["y"])

    def partial(x, y):
        return x * y, SimpleNamespace(backward=lambda dout: {"x": dout * y})

    def bent(x):
        return x * x, SimpleNamespace(backward=lambda dout: {"x": (2 * x * dout).sum(0)})

    def coarse(x):
        return x * x, SimpleNamespace(backward=lambda dout: {"x": (2 * x * dout).astype("f4")})

    with pytest.raises(testing.GradientError, match="no gradient for it"):
        testing.gradcheck(SimpleNamespace(forward=partial), x, x, wrt=["x", "y"])
    with pytest.raises(testing.GradientError, match=r"shape \(3,\)"):
        testing.gradcheck(SimpleNamespace(forward=bent), x)
    with pytest.raises(testing.GradientError, match="float32"):
        testing.gradcheck(SimpleNamespace(forward=coarse), x)


def test_gradcheck_of_several_outputs_with_constants_among_them():
    def forward(x):
        def backward(dout, dother):
            return {"x": 2 * x * dout + np.where(x > 0, dother, 0)}
        return (x * x, np.where(x > 0, x, -np.inf)), SimpleNamespace(backward=backward)
    assert testing.gradcheck(SimpleNamespace(forward=forward), arguments()[0])


@pytest.mark.parametrize("backend", ["cpu", "array_api"])
def test_pyattn_passes(backend):
    with pyattn.use_backend(backend):
        report = testing.check(
            pyattn.attention, dtypes=["float32", "bfloat16"],
            cases=["everything at once", "NaN that later queries see", "causal, more queries"])
        q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
        assert testing.gradcheck(pyattn.attention, q, k, v, causal=True, return_lse=True,
                                 sinks=np.zeros(2), scale=np.full(2, 0.4),
                                 bias=np.ones((5, 5)), alibi_slopes=np.array([0.5, 0.25]))
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", ["cpu", "array_api"])
def test_pyattn_passes_every_case(backend, seed):
    with pyattn.use_backend(backend):
        report = testing.check(pyattn.attention, seed=seed,
                               dtypes=["float32", "float16", "bfloat16", "float64"])
    assert report.passed, str(report)
