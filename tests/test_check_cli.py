"""``python -m pyattn check``: dumps that are right, wrong, or hostile; and the installation."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import textwrap
import zipfile

import ml_dtypes
import numpy as np
import pytest

from pyattn import reference, testing
from pyattn.checks import OptionError
from pyattn.cli import check as check_command
from pyattn.cli import main
from pyattn.testing import examples, installation, tasks
from pyattn.testing.dump import DumpError
from pyattn.testing.report import CaseResult

EXTENSIONS = ("npz", "safetensors")


def entries(case="everything at once", dtype="float32"):
    """What a right kernel would dump: the plain formulas stand in for it."""
    x = testing.cases.select(case)[0].inputs(dtype)
    call = {"q": x.q, "k": x.k, "v": x.v, **x.options, "precision": reference.plain(x.q.dtype)}
    out, lse = reference.attention(**call)
    grads = reference.attention_backward(**call, dout=x.dout, dlse=x.dlse)
    optional = {} if x.dlse is None else {"dlse": x.dlse}
    return {"q": x.q, "k": x.k, "v": x.v, **x.options, "out": out, "lse": lse, "dout": x.dout,
            **optional, **{f"d{name}": g for name, g in grads.items()}}


def small(**changes):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 5, 4)).astype(np.float32)
    out, lse = reference.attention(q, k, v, precision=reference.plain(np.float32))
    return {"q": q, "k": k, "v": v, "out": out, "lse": lse, **changes}


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_right_dumps_pass_in_both_formats(tmp_path, capsys, extension, dtype):
    path = tmp_path / f"dump.{extension}"
    testing.write_dump(path, **entries(dtype=dtype))
    assert main(["check", str(path)]) == 0
    text = capsys.readouterr().out
    for name in ("out", "lse", "dq", "dk", "dv", "dbias", "dgate", "dscale", "dsinks",
                 "dalibi_slopes"):
        assert re.search(rf"^{name} .* ok ", text, re.MULTILINE), name
    assert "PASSED" in text
    assert "head 3 |" in text


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_dump_comes_back_as_it_was_written(tmp_path, extension):
    path = tmp_path / f"dump.{extension}"
    written = entries("packed sequences of their own lengths", "bfloat16")
    testing.write_dump(path, **written)
    dump = testing.read_dump(path)
    for name, x in dump.arrays.items():
        assert x.dtype == written[name].dtype
        np.testing.assert_array_equal(x, written[name])
    assert dump.options == {"segments": ((30, 0, 70), (80, 10, 50)), "causal": True}


@pytest.mark.parametrize(("mistake", "told"), [
    ({"causal": False}, "a causal mask is applied where none was asked for"),
    ({"causal": "top_left"},
     "the causal diagonal is aligned to the bottom right; it belongs to the top left"),
    ({"scale": 0.5}, "the scale that was given is ignored"),
])
def test_wrong_dumps_fail_with_the_tile_and_a_hint(tmp_path, capsys, mistake, told):
    path, page = tmp_path / "dump.npz", tmp_path / "page.html"
    testing.write_dump(path, **(entries("causal, more keys") | mistake))
    assert main(["check", str(path), "--report", str(page)]) == 1
    text = capsys.readouterr().out
    assert f"hint: {told}" in text
    assert re.search(r"^out .* FAILED .* rows 0:64$", text, re.MULTILINE)
    assert "out, error by tile" in text
    assert told in page.read_text()


def test_one_wrong_tile_is_drawn_where_it_is(tmp_path, capsys):
    path, dump = tmp_path / "dump.safetensors", entries("causal")
    dump["out"][1, 0, 64:128] += 1
    testing.write_dump(path, **dump)
    assert main(["check", str(path)]) == 1
    picture = capsys.readouterr().out.partition("out, error by tile")[2].splitlines()
    rows = dict(line.split(" |") for line in picture[1:5])
    assert re.fullmatch(r"[ .:=-][4-9][ .:=-]\|", rows["batch 1, head 0"])
    assert re.fullmatch(r"[ .:=-]{3}\|", rows["batch 0, head 1"])


def test_layouts_dtypes_and_options_of_their_own(tmp_path):
    """What other programs write: (B, N, H, D), bfloat16 as bits or void, options as 0-d arrays."""
    dump = entries("causal, more keys", "bfloat16")
    names = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    turned = {name: np.swapaxes(dump[name], 1, 2) for name in names} | {"lse": dump["lse"]}
    bits = {name: x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
            for name, x in turned.items()}
    np.savez(tmp_path / "bits.npz", causal=True, layout="bnhd", dtype="bfloat16", **bits)
    np.savez(tmp_path / "void.npz", **turned,
             options=np.frombuffer(b'{"causal": true, "layout": "bnhd"}', np.uint8))
    for name in ("bits.npz", "void.npz"):
        assert testing.check_dump(tmp_path / name).passed, name

    wide = {**entries("causal, more keys"), "scale": 0.3, "window": [3, None]}
    again = {"q": wide["q"], "k": wide["k"], "v": wide["v"], "causal": True, "scale": 0.3,
             "window": (3, None)}
    wide = {name: wide[name] for name in ("q", "k", "v", "causal", "scale", "window")}
    wide["out"], wide["lse"] = reference.attention(**again)
    testing.write_dump(tmp_path / "wide.npz", **wide)
    report = testing.check_dump(tmp_path / "wide.npz")
    assert "dtype float64 where float32" in str(report)
    testing.write_dump(tmp_path / "wide.npz", **wide, out_dtype="float64")
    assert testing.check_dump(tmp_path / "wide.npz").passed


def npz(**members):
    """A zip of raw bytes by name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(header, data=b"", version=b"\x01\x00"):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def claims(shape, descr="<f4"):
    return npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}")


def saved(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def pickled():
    file = io.BytesIO()
    np.savez(file, **small(), mask=np.array([{"a": 1}], dtype=object))
    return file.getvalue()


def safetensors(header, length=None, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f4(shape, start, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "an empty file": (b"", "neither"),
    "text": (b"q = 1\n" * 100, "neither"),
    "wrong magic": (b"PK\x05\x06" + bytes(18), "neither"),
    "a truncated npz": (saved(**small())[:-200], "damaged"),
    "an npz cut in the middle": (saved(**small())[:500], "damaged"),
    "a flipped byte": (bytes(b ^ (i == 300) for i, b in enumerate(saved(**small()))),
                       "damaged"),
    "pickled objects": (pickled(), "Python objects"),
    "a zip bomb's header": (npz(q=claims("(1000000, 1000000, 1000000)")), "over the limit"),
    "a claim that is not kept": (npz(q=claims("(1000, 1000, 8)")), "but holds 0"),
    "a negative shape": (npz(q=claims("(-1, 5, 4)")), "claims the shape"),
    "code in a header": (npz(q=npy("__import__('os').system('false')")), "damaged"),
    "an array that is no npy": (npz(q=b"hello"), "damaged"),
    "records": (npz(q=npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
                          bytes(4))), "records"),
    "an unknown name": (saved(**small(), dQ=np.zeros(3)), "'dQ' is not a name"),
    "a name that tries to escape": (npz(**{"../../etc/passwd": b""}), "is not a name"),
    "no v": (saved(q=np.zeros((1, 2, 3)), k=np.zeros((1, 2, 3)), out=np.zeros((1, 2, 3))),
             "has no v"),
    "nothing to check": (saved(q=np.zeros((1, 2, 3)), k=np.zeros((1, 2, 3)),
                               v=np.zeros((1, 2, 3))), "nothing to check"),
    "gradients without dout": (saved(**small(dq=np.zeros((2, 5, 4), "f4"))), "no dout"),
    "shapes that do not fit": (saved(**small(k=np.zeros((2, 5, 3), "f4"))), "must fit"),
    "heads that do not divide": (saved(**small(q=np.zeros((3, 5, 4), "f4"))), "multiple of G"),
    "too few axes": (saved(**small(q=np.zeros((5, 4), "f4"))), "must be (..., H, N, D)"),
    "integers": (saved(**small(q=np.zeros((2, 5, 4), "i4"))), "q must be one of float16"),
    "mixed dtypes": (saved(**small(q=np.zeros((2, 5, 4), "f8"))), "share one dtype"),
    "a mask that does not fit": (saved(**small(mask=np.ones((4, 5), bool))), "mask must broadcast"),
    "a sequence beyond a dense check": (saved(**small(
        q=np.zeros((1, 2 ** 13, 1), "f4"), k=np.zeros((1, 2 ** 13, 1), "f4"),
        v=np.zeros((1, 2 ** 13, 1), "f4"))), "dense"),
    "heads of nothing": (npz(q=claims("(1000000000, 5, 0)"), k=claims("(1000000000, 5, 0)"),
                             v=claims("(1000000000, 5, 0)"), out=claims("(1, 1, 0)")), "dense"),
    "a width of nothing": (npz(q=claims("(1, 0, 4)"), k=claims("(1, 0, 4)"),
                               v=claims("(1, 0, 1000000000000)"), out=claims("(1, 1, 0)")),
                           "width"),
    "options that are no JSON": (saved(**small(), options="{causal}"), "not JSON"),
    "deep options": (saved(**small(), options="[" * 100000), "not JSON"),
    "endless numbers": (saved(**small(), options='{"window": ' + "9" * 10000 + "}"), "damaged"),
    "an unknown option": (saved(**small(), options='{"casual": true}'), "'casual' is not"),
    "infinity in options": (saved(**small(), options='{"scale": Infinity}'), "finite"),
    "a window of three": (saved(**small(), window=[1, 2, 3]), "window must be"),
    "a word as causal": (saved(**small(), causal="sometimes"), "causal must be"),
    "lengths beyond the keys": (saved(**small(), kv_lengths=9), "do not fit"),
    "ragged lengths": (saved(**small(), options='{"kv_lengths": [[1], [2, 3]]}'), "kv_lengths"),
    "lengths as words": (saved(**small(), options='{"kv_lengths": "all"}'), "must be a number"),
    "segments and lengths": (saved(**small(), options='{"segments": [5], "kv_lengths": 3}'),
                             "exclude"),
    "a list as softcap": (saved(**small(), options='{"softcap": [1, 2]}'), "softcap"),
    "dropout without keep": (saved(**small(), dropout=0.1), "keep"),
    "a length beyond the file": (safetensors({}, length=2 ** 40), "header claims"),
    "a negative offset": (safetensors({"q": f4([2], -8, 0)}), "damaged"),
    "offsets beyond the file": (safetensors({"q": f4([1000, 1000, 10], 0, 40000000)}), "damaged"),
    "a shape that is not its bytes": (safetensors({"q": f4([2, 5, 4], 0, 8)}, data=bytes(8)),
                                      "damaged"),
    "a header that is no JSON": (safetensors(b"{" + b"x" * 50), "damaged"),
    "an unknown tensor": (safetensors({"weight": f4([1], 0, 4)}, data=bytes(4)), "is not a name"),
    "metadata that is no JSON": (safetensors({
        "__metadata__": {"options": "causal"}, "q": f4([1], 0, 4)}, data=bytes(4)), "not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_clear_line_and_status_2(tmp_path, capsys, name):
    content, told = HOSTILE[name]
    path = tmp_path / "dump"
    path.write_bytes(content)
    assert main(["check", str(path)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert told in found.err
    assert len(found.err.splitlines()) == 1
    assert "Traceback" not in found.err
    assert found.err.isprintable() or found.err.rstrip("\n").isprintable()


def test_a_bomb_is_not_unpacked(tmp_path, capsys):
    """Ten megabytes of zeros in ten kilobytes, over the limit that was asked for."""
    path = tmp_path / "dump.npz"
    np.savez_compressed(path, q=np.zeros((10, 1000, 250), "f4"))
    assert path.stat().st_size < 20000
    assert main(["check", str(path), "--max-bytes", "1000000"]) == 2
    assert "over the limit of 1000000" in capsys.readouterr().err


def test_missing_files_and_directories(tmp_path, capsys):
    for path in (tmp_path / "none.npz", tmp_path):
        assert main(["check", str(path)]) == 2
        assert "cannot be read" in capsys.readouterr().err


def test_duplicate_arrays_are_refused(tmp_path):
    path = tmp_path / "dump.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("q.npy", claims("(0, 5, 4)"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("q.npy", claims("(0, 5, 4)"))
    with pytest.raises(DumpError, match="twice"):
        testing.read_dump(path)


def test_writing_refuses_unknown_names(tmp_path):
    with pytest.raises(OptionError, match="tepid"):
        testing.write_dump(tmp_path / "dump.npz", tepid=1)
    with pytest.raises(OptionError, match=r"\.npz or \.safetensors"):
        testing.write_dump(tmp_path / "dump.bin", **small())


def recipe(title):
    """The three lines of a recipe in the help text."""
    lines = check_command._FORMAT.partition(f"\n  {title}\n")[2].splitlines()
    body = []
    for line in lines:
        if not line.startswith("    "):
            break
        body.append(line)
    return textwrap.dedent("\n".join(body))


def test_help_documents_the_format(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["check", "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for word in (*testing.dump.INPUTS, *testing.dump.RESULTS, *testing.dump.OPTIONS,
                 "torch", "JAX", "CUDA C++", "CuPy"):
        assert word in text, word


def test_the_recipe_for_torch_works(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 3, 70, 16, generator=generator) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.backward(dout)
    exec(recipe("torch"), {"q": q, "k": k, "v": v, "out": out, "dout": dout})
    report = testing.check_dump("dump.safetensors")
    assert report.passed, str(report)
    assert len(report.results[0].comparisons) == 4


def test_the_recipe_for_jax_works(tmp_path, monkeypatch):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    q, k, v, dout = (jax.numpy.asarray(rng.standard_normal((2, 20, 8)), "float32")
                     for _ in range(4))

    def attention(q, k, v):
        scores = q @ k.swapaxes(-1, -2) / 8 ** 0.5
        allowed = np.tril(np.ones((20, 20), bool))
        return jax.nn.softmax(jax.numpy.where(allowed, scores, -np.inf)) @ v

    exec(recipe("JAX"), {"jax": jax, "attention": attention, "q": q, "k": k, "v": v,
                         "dout": dout})
    assert testing.check_dump("dump.npz").passed


def a_task(function, status, message=""):
    exact = np.ones((1, 3, 2))
    comparison = testing.compare(exact * (1 if status == "ok" else 2), exact, exact)
    result = CaseResult("a case", "float64", status,
                        () if status == "skipped" else (comparison,), message=message)
    return tasks.Task(function, "cpu", "numpy", lambda: [result])


def test_the_installation_is_told_in_a_table(monkeypatch, capsys, tmp_path):
    good, bad = a_task("fine", "ok"), a_task("broken", "FAILED")
    absent = a_task("absent", "skipped", "not installed")
    page = tmp_path / "page.html"
    monkeypatch.setattr(installation, "tasks", lambda thorough: [good, absent])
    assert main(["check", "--report", str(page)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^fine +numpy +cpu +ok +1 +0 +0", text, re.MULTILINE)
    assert "skipped: absent on cpu, numpy arrays: not installed" in text
    assert "PASSED: 1 passed, 1 skipped" in text
    assert "fine on cpu" in page.read_text()

    monkeypatch.setattr(installation, "tasks", lambda thorough: [good, bad])
    assert main(["check"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^broken +numpy +cpu +FAILED +0 +1 +0", text, re.MULTILINE)
    assert "FAILED: 1 passed, 1 failed" in text
    monkeypatch.setattr(installation, "tasks", lambda thorough: [absent])
    assert main(["check"]) == 1         # nothing was checked


def test_a_task_that_breaks_does_not_hide_the_others():
    def broken():
        raise ZeroDivisionError("no")
    found = tasks.Task("f", "cpu", "numpy", broken).results()
    assert found[0].status == "ERROR"
    assert found[0].message == "ZeroDivisionError: no"


def test_every_public_function_has_a_check():
    """A new variant or layer without one shows here, and as skipped in the table."""
    import pyattn

    listed = {task.function for task in installation.tasks()}
    assert {*pyattn.VARIANTS, "merge"} <= listed
    unknown = [task.subject for task in installation.tasks() if task.library == "numpy"
               and task.function.startswith("layers.")
               and task.function.removeprefix("layers.") not in examples.LAYERS]
    assert unknown == []
    known = {"attention", "cross_modal_attention", *examples.PATTERNS, *examples.VARIANTS}
    assert known == set(pyattn.VARIANTS)


@pytest.mark.slow
def test_this_installation_passes(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pyattn", "check"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
