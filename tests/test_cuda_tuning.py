"""The table of the CUDA kernels: how it is measured, kept, passed over, and that it is obeyed."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
from emulator.device import EmulatedDevice
from pyattn.kernels.cuda import device as devices
from pyattn.kernels.cuda import hopper, tilings, tuning
from table import BFLOAT16, Shape
from test_attention import BY_NAME, judge, run

import pyattn
from bench import gpu_sass
from pyattn import cli, dispatch, masks
from pyattn.cli import tune_gpu

pytestmark = pytest.mark.gate

@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No table has been read yet, and none is at its usual place."""
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setenv("PYATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_tables", {})


class Recorder(EmulatedDevice):
    """Notes what is launched and executes nothing: results are zeros, times are by `cost`."""

    def __init__(self, capability=(8, 0)):
        super().__init__(capability=capability)
        self.noted = []
        self.cost = lambda kernel, grid: 1.0

    def launch(self, kernel, grid, arguments, shared):
        assert shared <= self.shared_memory
        self.noted.append((kernel, grid))

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    def seconds(self, call):
        self.noted = []
        call()
        return sum(self.cost(kernel, grid) for kernel, grid in self.noted)


@pytest.fixture
def recorder(monkeypatch):
    return stand_in(monkeypatch, Recorder())


def stand_in(monkeypatch, made):
    monkeypatch.setitem(dispatch.PREFERENCE, "numpy", ("cuda",))
    monkeypatch.setitem(devices._factories, "numpy", lambda array: made)
    return made


def macros(kernel):
    return dict(kernel.macros)


def keep(device, choices, changes=()):
    """Store a table as if it had been measured; `changes` are to what it was made for."""
    content = json.loads(tuning.text(device, choices, {}))
    content["made for"] |= dict(changes)
    assert tuning.save(device, json.dumps(content)) == tuning.file(device)


# what is measured


def test_the_fastest_of_each_class_is_found(monkeypatch):
    """By a clock that likes steps of 16, one warp for short queries, and unsettled waits."""
    recorder = stand_in(monkeypatch, Recorder((9, 0)))

    def cost(kernel, grid):
        found = macros(kernel)
        if kernel.name.startswith("hopper"):
            # in a backward mma.sync is faster
            return (10.0 if "backward" in kernel.name else 0.1) + 0.05 * found["SETTLE"] + (
                0.01 * found["STAGES"])
        if kernel.name not in tilings.FILES.values():
            return 0.0
        if found.get("PACKED"):
            return 1.0 + found["WARPS"] + 1 / grid[1]
        return 1.0 - 0.1 * (found["WARPS"] == 8) + 0.01 * found["STEP"]

    recorder.cost = cost
    asked = []
    found = tune_gpu.measure(np.asarray, asked.append, tokens=1024)
    assert not found.wrong
    assert set(asked) == set(found.choices)
    assert found.choices["forward half 64 dense"] == (2, 4, 64, 32, 2)
    assert found.choices["forward half 128 sparse"] == (2, 4, 64, 16, 2)
    assert found.choices["queries half 128"] == (2, 2, 64, 16, 4)
    assert found.choices["packed half 128 16"] == (1, 1, 64, 64, 3)
    assert found.choices["packed half 128 32"] == (1, 2, 64, 64, 3)
    assert "packed half 128 64" not in found.choices, "there is nothing to choose from"
    assert found.choices["split half 64"] == (4, 4)
    assert found.choices["hopper_forward 64"] == (4, 0)
    assert found.choices["hopper_backward_keys 64"] == (4, 1)
    assert found.choices["hopper forward 128"] == 0.0
    assert found.choices["hopper backward 128"] == hopper.NEVER
    assert found.choices["hopper few 64"] is True
    asked = [question.name for question in tune_gpu.questions(Recorder((8, 0)), 1024)]
    assert "keys half 64" in asked
    assert not any(name.startswith("hopper") for name in asked)


def test_small_gains_leave_the_rule(recorder):
    recorder.cost = lambda kernel, grid: 1.0 + 0.0002 * macros(kernel).get("STEP", 0)
    found = tune_gpu.measure(np.asarray, tokens=256, only=lambda name: name.startswith("queries"))
    assert found.choices["queries half 64"] == (1, 4, 64, 64, 2)
    assert found.seconds["queries half 64"].keys() == {"1 4 64 64 2", "1 4 64 32 3"}


def test_candidates_that_fail_or_are_wrong_are_not_chosen(recorder, monkeypatch):
    launch = recorder.launch

    def failing(kernel, grid, arguments, shared):
        launch(kernel, grid, arguments, shared)
        if macros(kernel).get("WARPS") == 8:
            raise RuntimeError("too many resources requested")

    monkeypatch.setattr(recorder, "launch", failing)
    recorder.cost = lambda kernel, grid: float(macros(kernel).get("STEP", 0))
    monkeypatch.setattr(recorder, "empty", lambda shape, dtype: np.full(
        shape, 1.0 if recorder.noted else 2.0, dtype))
    found = tune_gpu.measure(np.asarray, tokens=256,
                             only=lambda name: name == "forward half 64 dense")
    assert found.choices == {"forward half 64 dense": (2, 4, 64, 64, 2)}
    assert "too many resources" in "".join(found.wrong)
    assert "results differ from the rule's by 0.5" in "".join(found.wrong)


def test_candidates_take_turns(recorder):
    noted = []
    recorder.seconds = lambda call: noted.append(dict(tuning.table(recorder))) or 1.0
    tune_gpu.measure(np.asarray, tokens=128, only=lambda name: name == "keys half 64")
    chosen = [choices["keys half 64"] for choices in noted]
    assert chosen == [(1, 4, 64, 64, 2), (1, 4, 64, 32, 2)] * tune_gpu.TURNS


def test_every_candidate_is_compiled_and_read_by_the_gate():
    gate = {(x.kernel.name, x.kernel.macros) for x in gpu_sass.subjects().values()}
    for device in (Recorder(), Recorder((9, 0))):
        for question in tune_gpu.questions(device, 256):
            part, kind, width = (*question.name.split(), "", "")[:3]
            for candidate in question.candidates:
                if part in tilings.FILES:
                    made = {"forward": {"PACKED": 0}, "packed": {"PACKED": 1},
                            "keys": {"DK": int(width), "DV": int(width)},
                            "queries": {"DQ": int(width)}}[part]
                    kernel = tilings.kernel("bfloat16" if kind == "half" else kind,
                                            tilings.FILES[part], candidate, int(width), int(width),
                                            0, **made)
                elif part in hopper.NAMES:
                    kernel = hopper._kernel(part, int(kind), "bfloat16", candidate)
                else:
                    assert part in ("split", "hopper")
                    continue
                assert (kernel.name, kernel.macros) in gate, question.name


# what is kept


def test_a_table_is_kept_and_read_once(recorder):
    choices = {"keys half 64": tilings.Tiling(1, 4, 64, 32, 2), "hopper few 64": True}
    written = tuning.text(recorder, choices, {"keys half 64": {"1 4 64 32 2": 1e-3}})
    assert json.loads(written)["microseconds"] == {"keys half 64": {"1 4 64 32 2": 1000.0}}
    assert ' "keys half 64": [1, 4, 64, 32, 2],\n' in written
    assert tuning.table(recorder) == {}
    path = tuning.save(recorder, written)
    assert path.name == "tuning-emulator-8.0.json"
    assert tuning.table(recorder) == {}, "the choices of a process are fixed"
    tuning._tables.clear()
    assert tuning.table(recorder) == {"keys half 64": (1, 4, 64, 32, 2), "hopper few 64": True}


@pytest.mark.parametrize("change", [{"device": "another"}, {"capability": "9.0"},
                                    {"compiler": "NVRTC 99.0"}, {"sources": "0"}], ids=str)
def test_a_table_made_for_something_else_is_passed_over(recorder, change):
    keep(recorder, {"keys half 64": (1, 4, 64, 32, 2)}, change)
    assert tuning.table(recorder) == {}


def test_a_source_that_changes_makes_a_table_stale(recorder, tmp_path, monkeypatch):
    keep(recorder, {"keys half 64": (1, 4, 64, 32, 2)})
    assert tuning.table(recorder)
    for path in tuning.compile.SOURCES.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "walk.cuh").write_text((tmp_path / "walk.cuh").read_text() + "// changed\n")
    monkeypatch.setattr(tuning.compile, "SOURCES", tmp_path)
    tuning._sources.cache_clear()
    tuning._tables.clear()
    try:
        assert tuning.table(recorder) == {}
    finally:
        tuning._sources.cache_clear()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"made for": 3}'])
def test_a_damaged_table_is_passed_over(recorder, content):
    keep(recorder, {"keys half 64": (1, 4, 64, 32, 2)})
    tuning.file(recorder).write_bytes(content)
    assert tuning.table(recorder) == {}


def test_a_table_that_others_may_write_to_is_passed_over(recorder):
    keep(recorder, {"keys half 64": (1, 4, 64, 32, 2)})
    tuning.file(recorder).chmod(0o666)
    assert tuning.table(recorder) == {}


@pytest.mark.parametrize("choice", [(1, 4, 64, 128, 2), (1, 4), "4", None, {"a": 1}, 7, []],
                         ids=str)
def test_only_candidates_are_chosen(recorder, choice):
    keep(recorder, {"keys half 64": choice})
    rule = tilings.Tiling(1, 4, 64, 64, 2)
    found = tilings.candidates("keys", "bfloat16", 64, 64, 0, 2**18, 0, rule)
    assert tuning.chosen(recorder, "keys half 64", found) == rule


def test_the_variable_turns_tables_off(recorder, monkeypatch):
    keep(recorder, {"keys half 64": (1, 4, 64, 32, 2)})
    monkeypatch.setenv(tuning.VARIABLE, "default")
    assert tuning.table(recorder) == {}


def test_nowhere_to_keep_a_table(recorder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYATTN_CACHE_DIR", str(tmp_path / "file"))
    assert tuning.save(recorder, "{}") is None
    assert tuning.table(recorder) == {}


# what is launched


def test_a_table_is_obeyed(recorder):
    choices = {"forward half 64 causal": (2, 4, 64, 32, 2), "keys half 64": (1, 4, 64, 32, 2),
               "queries half 64": (1, 4, 64, 32, 3), "forward half 64 dense": (2, 8, 64, 64, 1)}
    keep(recorder, choices)
    q = np.ones((1, 2, 300, 64), BFLOAT16)
    for options, part in (({"causal": True}, "forward half 64 causal"),
                          ({}, "forward half 64 dense")):
        recorder.noted = []
        out, saved = pyattn.attention.forward(q, q, q, **options)
        saved.backward(out)
        used = {kernel.name: tuple(macros(kernel)[name] for name in (
            "SLICES", "WARPS", "LOAD", "STEP", "BLOCKS")) for kernel, _ in recorder.noted
            if kernel.name in tilings.FILES.values()}
        assert used == {"softmax_forward": choices[part],
                        "softmax_backward_keys": choices["keys half 64"],
                        "softmax_backward_queries": choices["queries half 64"]}
    # no class: another width, score terms, a mask of another kind
    for options, width in (({}, 32), ({"softcap": 2.0}, 64), ({"window": 3}, 64)):
        recorder.noted = []
        pyattn.attention(*[np.ones((1, 1, 900, width), BFLOAT16)] * 3, **options)
        with tuning.trial({}):
            pyattn.attention(*[np.ones((1, 1, 900, width), BFLOAT16)] * 3, **options)
        assert len({kernel for kernel, _ in recorder.noted}) == 1


def test_splits_and_packed_rows_by_a_table(recorder):
    recorder.multiprocessors = 64
    q, k = np.ones((1, 4, 3, 64), BFLOAT16), np.ones((1, 1, 2048, 64), BFLOAT16)
    found = {}
    for choices in ({}, {"split half 64": (2, 2), "packed half 64 16": (1, 1, 64, 64, 4)}):
        recorder.noted = []
        with tuning.trial(choices):
            pyattn.attention(q, k, k)
        [(kernel, grid)] = [x for x in recorder.noted if x[0].name == "softmax_forward"]
        found[bool(choices)] = macros(kernel)["WARPS"], grid
    assert found == {False: (4, (1, 8, 1)), True: (1, (1, 16, 1))}
    # more rows than that tiling has
    recorder.noted = []
    with tuning.trial({"packed half 64 32": (1, 1, 64, 64, 4)}):
        pyattn.attention(np.ones((1, 4, 6, 64), BFLOAT16), k, k)
    assert macros(recorder.noted[0][0])["WARPS"] == 4


def test_a_hopper_by_a_table(monkeypatch):
    recorder = stand_in(monkeypatch, Recorder((9, 0)))
    q = np.ones((1, 2, 300, 64), BFLOAT16)
    pair = np.ones((1, 2, 16, 64), BFLOAT16)

    def kernels(choices, q=q, **options):
        recorder.noted = []
        with tuning.trial(choices):
            out, saved = pyattn.attention.forward(q, q, q, **options)
            saved.backward(out)
        return {kernel.name: macros(kernel) for kernel, _ in recorder.noted}

    found = kernels({"hopper_forward 64": (2, 1), "hopper_backward_queries 64": (4, 0)})
    assert found["hopper_forward"]["STAGES"] == 2
    assert found["hopper_backward_queries"]["SETTLE"] == 0
    assert found["hopper_backward_keys"]["STAGES"] == 4
    found = kernels({"hopper forward 64": hopper.NEVER})
    assert "softmax_forward" in found
    assert "hopper_backward_keys" in found
    diagonal = {"mask": masks.blocks(np.eye(10, dtype=bool), 64)}
    q = np.ones((1, 2, 640, 64), BFLOAT16)
    assert "hopper_forward" not in kernels({}, q, **diagonal)
    assert "hopper_forward" in kernels({"hopper forward 64": 0.5}, q, **diagonal)
    assert "softmax_forward" in kernels({}, pair)
    assert "hopper_forward" in kernels({"hopper few 64": True}, pair)


def test_tables_change_results_by_rounding_alone(emulated):
    """Kernels of another tiling, executed."""
    drawn = BY_NAME["causal"].make(Shape((1,), 2, 1, 70, 130, 64, 64), BFLOAT16)
    choices = {"forward half 64 dense": (2, 4, 64, 32, 2), "queries half 64": (1, 4, 64, 32, 3)}
    launched = []
    launch = emulated.launch
    emulated.launch = lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest))
    with tuning.trial(choices):
        judge(drawn, *run(drawn, "cuda"))
    used = {kernel.name: macros(kernel) for kernel in launched}
    assert used["softmax_forward"]["STEP"] == 32
    assert used["softmax_backward_queries"]["STEP"] == 32


@pytest.mark.parametrize("part", tilings.FURTHER, ids=str)
def test_every_candidate_computes_the_same(part, emulated):
    """On lengths beside tiles, with masked pairs; short queries for what packs them."""
    what, kind, width = part
    dtype = BFLOAT16 if kind == "half" else np.dtype(kind)
    shape = (Shape((1,), 4, 1, 4, 150, width, width) if what == "packed"
             else Shape((1,), 1, 1, 130, 140, width, width))
    drawn = BY_NAME["causal"].make(shape, dtype)
    kinds = {"forward": ["causal", "dense"], "packed": ["16"]}.get(what, [""])
    for tiling in tilings.FURTHER[part]:
        with tuning.trial({f"{what} {kind} {width} {x}".strip(): tiling for x in kinds}):
            judge(drawn, *run(drawn, "cuda"))


@pytest.mark.parametrize(("name", "width"), [key for key, builds in hopper.BUILDS.items()
                                             if len({x.stages for x in builds}) > 1], ids=str)
def test_fewer_stages_compute_the_same(name, width, emulated):
    emulated.capability = (9, 0)
    emulated.multiprocessors = 2
    drawn = BY_NAME["causal"].make(Shape((1,), 2, 1, 330, 330, width, width), BFLOAT16)
    with tuning.trial({f"{name} {width}": hopper.BUILDS[name, width][-1]}):
        judge(drawn, *run(drawn, "cuda"))


# the command


def test_warmup_keeps_what_it_measures_on_a_gpu(monkeypatch, capsys, recorder):
    stand_in_cupy = types.SimpleNamespace(zeros=np.zeros, asarray=np.asarray)
    monkeypatch.setitem(sys.modules, "cupy", stand_in_cupy)
    monkeypatch.setattr(devices, "unavailable", lambda: None)
    choices = {"keys half 64": (1, 4, 64, 32, 2)}
    monkeypatch.setattr(tune_gpu, "measure", lambda asarray, advance: tune_gpu.Measured(
        choices, {"keys half 64": {"1 4 64 32 2": 1e-3}}))
    assert cli.main(["warmup", "--gpu"]) == 0
    assert f"kept in {tuning.file(recorder)}" in capsys.readouterr().out
    assert tuning.table(recorder) == choices
    monkeypatch.setattr(tune_gpu, "measure", lambda asarray, advance: tune_gpu.Measured(
        wrong=["keys half 64: results differ"]))
    assert cli.main(["warmup", "--gpu"]) == 1
    assert "wrong: keys half 64" in capsys.readouterr().out


def test_warmup_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(devices, "unavailable", lambda: "there is none")
    assert cli.main(["warmup", "--gpu"]) == 2
    assert "there is none" in capsys.readouterr().err


def test_a_gpu_is_kept_busy_until_what_is_timed_begins():
    order = []

    class Event:
        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

    filled = types.SimpleNamespace(fill=lambda value: order.append("fill"))
    gpu = object.__new__(devices.CupyDevice)
    gpu._cupy = types.SimpleNamespace(
        empty=lambda shape, dtype: filled,
        cuda=types.SimpleNamespace(Event=Event, get_elapsed_time=lambda start, stop: 2.5))
    assert gpu.seconds(lambda: order.append("call")) == 2.5e-3
    assert order == ["fill"] * devices.BUSY_TIMES + ["record", "call", "record", "synchronize"]
