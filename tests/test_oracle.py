"""The judge is judged: its gradients by finite differences, its comparison by planted errors."""

import numpy as np
import oracle
import pytest
from table import CASES, Shape

SMALL = Shape((2,), 4, 2, 5, 7, 3, 4)
EXACT = oracle.Arithmetic(np.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients_by_finite_differences(case):
    drawn = case.make(SMALL, np.float64)
    rng = np.random.default_rng(1)
    out, lse = oracle.forward(drawn.dense, EXACT)
    dout = rng.standard_normal(out.shape)
    dlse = np.where(np.isfinite(lse), rng.standard_normal(lse.shape), 0)
    grads = oracle.backward(drawn.dense, dout, dlse, EXACT)

    def loss(problem):
        out, lse = oracle.forward(problem, EXACT)
        return (out * dout).sum() + (np.where(np.isfinite(lse), lse, 0) * dlse).sum()

    for name, field in (
        ("q", "q"),
        ("k", "k"),
        ("v", "v"),
        ("bias", "bias"),
        ("gate", "gate"),
        ("scale", "scale"),
        ("sinks", "sinks"),
        ("alibi_slopes", "slopes"),
    ):
        x = getattr(drawn.dense, field)
        if x is None:
            continue
        x = x.astype(np.float64)
        step = rng.standard_normal(x.shape)
        if name == "gate":  # a gate of exactly 0 is a corner: the row's maximum leaves it out
            step = np.where(x == 0, 0, step)
        slope = [
            loss(oracle.dataclasses.replace(drawn.dense, **{field: x + h * step}))
            for h in (1e-6, -1e-6)
        ]
        numeric = (slope[0] - slope[1]) / 2e-6
        analytic = float((grads[name] * step).sum())
        assert abs(numeric - analytic) <= 1e-6 * max(1.0, abs(numeric), abs(analytic)), name


def test_comparison_fails_on_a_perturbed_row():
    rng = np.random.default_rng(0)
    want = rng.standard_normal((2, 8, 4))
    rough = want + 1e-6 * rng.standard_normal(want.shape)
    oracle.assert_close(want.astype("f"), want, rough, factor=2, name="out")
    wrong = want.copy()
    wrong[1, 3] += 1e-4
    with pytest.raises(AssertionError, match=r"out: error 0.0001 at \(1, 3"):
        oracle.assert_close(wrong.astype("f"), want, rough, factor=2, name="out")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.astype("f8"),
        lambda x: x[:, :-1],
        lambda x: np.where(x > 2, np.nan, x).astype("f"),
        lambda x: np.where(x > 2, np.inf, x).astype("f"),
    ],
)
def test_comparison_fails_on_dtype_shape_nan_and_inf(spoil):
    want = np.arange(12.0).reshape(3, 4)
    with pytest.raises(AssertionError):
        oracle.assert_close(spoil(want.astype("f")), want, want, factor=2, name="out", dtype="f4")
