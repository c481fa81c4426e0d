"""The script for a machine with a GPU: its arithmetic, and with ``-m gate`` a rehearsal."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.build import compiler
from pyattn.kernels.cuda import device

from bench import gpu
from pyattn import dispatch, masks


def test_operations_are_counted_by_pairs():
    dense = gpu.Row("", "float16", 128, 64, heads=3, batch=2)
    assert dense.flops(False) == 4 * 64 * 128 * 128 * 6
    assert dense.flops(True) == 2.5 * dense.flops(False)
    causal = gpu.Row("", "float16", 128, 64, heads=3, batch=2, causal=True)
    assert causal.flops(False) == dense.flops(False) / 2
    # tiles on the diagonal and one below
    window = gpu.Row("", "float16", 256, 64, heads=1, mask=masks.window(20, 0))
    assert window.flops(False) == 4 * 64 * 64 * 64 * 7


def test_every_block_sees_itself_and_others():
    table = gpu.chosen_blocks(64 * 40).dense(64 * 40, 64 * 40)[..., ::64, ::64].reshape(40, 40)
    assert np.diagonal(table).all()
    assert set(table.sum(1)) <= {15, 16}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.on_gpu, "unavailable", lambda: "there is none")
    assert gpu.main([]) == 2
    assert "there is none" in capsys.readouterr().err


def test_a_rival_that_breaks_does_not_end_the_run():
    def broken(row, backward, machine):
        raise ZeroDivisionError("so it goes")

    def refusing(row, backward, machine):
        raise gpu.Unsupported("not this")

    class Machine:
        def timed(self, call):
            return [0.5, 1.0, 2.0]

    results, notes = gpu.Results(end=float("inf")), {}
    row = gpu.Row("a row", "float16", 100, 50, heads=1)
    for rival, name, cell in ((broken, "torch", "error"), (refusing, "other", "")):
        assert gpu.timed_cell(Machine(), results, row, False, name, rival, notes) == (cell, 0.0)
    assert results.wrong == 0
    assert list(notes) == ["torch, a row: ZeroDivisionError: so it goes", "other: not this"]
    gpu.timed_cell(Machine(), results, row, False, "pyattn cuda", broken, notes)
    assert results.wrong == 1
    cell, rate = gpu.timed_cell(Machine(), results, row, False, "x", lambda *_: None, notes)
    assert rate == 4 * 50 * 100 * 100 / 1e12
    assert cell == "2e-06 (1e+03, 750 to 1.5e+03)"
    late = gpu.Results(end=0.0)
    assert gpu.timed_cell(Machine(), late, row, False, "x", broken, notes)[0] == "out of time"


@pytest.mark.gate
@pytest.mark.skipif(compiler() is None, reason="a C++ compiler builds kernels for the emulator")
def test_a_rehearsal_in_the_emulator(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dispatch.PREFERENCE, "numpy", dispatch.PREFERENCE["numpy"])
    try:
        assert gpu.main(["--emulated", "--output", str(tmp_path / "results.md")]) == 0
    finally:
        device.register("numpy", None)
    told = (tmp_path / "results.md").read_text()
    assert "| forward | causal D64" in told
    assert "race detector: nothing found" in told
    assert "error" not in told
    assert '"keys half 64": [1, 4, 64, ' in told
    for part in ("Machine", "Correctness", "compute-sanitizer", "Tuning", "Times"):
        assert f"## {part}" in told
