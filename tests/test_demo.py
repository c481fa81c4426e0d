"""The demo: its text, its bar, training, saving and loading, and what its exit status says."""

import csv
import dataclasses
import functools
import json
import math

import numpy as np
import pytest

from pyattn import cli, layers
from pyattn.checks import OptionError
from pyattn.cli import catalogue, demo, trained

SMALL = functools.partial(demo.Model, width=16, num_heads=2, depth=1, context=16)


@pytest.fixture(scope="module")
def texts():
    return demo.read_text()


@pytest.fixture
def small(monkeypatch, texts):
    text, training, held_out = texts
    monkeypatch.setattr(demo, "Model", SMALL)
    monkeypatch.setattr(demo, "SAMPLE", 40)
    monkeypatch.setattr(demo, "read_text", lambda: (text, training, held_out[:1000]))


def model_of(text, **options):
    return SMALL("".join(sorted(set(text))), **options)


def test_entropies_of_texts_that_can_be_counted_by_hand():
    assert demo.entropies("ab" * 50 + "a") == pytest.approx((math.log(2), 0.0))
    # after a: b, c, b, c; after b and c: a
    alone, pair = demo.entropies("abac" * 25 + "a")
    assert alone == pytest.approx(1.5 * math.log(2))
    assert pair == pytest.approx(0.5 * math.log(2))


def test_the_text_is_split_by_topics_and_shares_no_paragraph(texts):
    text, training, held_out = texts
    assert demo.read_text() == texts
    assert len(held_out) > 20_000
    assert len(training) > 10 * len(held_out)
    shared = set(training.split("\n\n")) & set(held_out.split("\n\n"))
    assert not shared
    unigram, bigram = demo.entropies(text)
    assert 2.2 < bigram < 2.7 < unigram < math.log(len(set(text)))


def test_training_lowers_the_loss_and_the_seed_decides_everything(texts):
    text, training, held_out = texts
    model = model_of(text)
    data = model.encode(training), model.encode(held_out[:1000])
    params, curve = demo.train(model, *data, steps=30, seed=1, batch=4, learning_rate=3e-2)
    losses = [loss for _, loss, _ in curve]
    assert abs(losses[0] - math.log(len(model.alphabet))) < 0.2
    assert losses[-1] < losses[0] - 0.8
    assert curve[-1][2] == demo.held_out_loss(model, params, data[1], 4)
    assert demo.held_out_loss(model, params, data[1], 7) == pytest.approx(curve[-1][2], rel=1e-5)
    again, same = demo.train(model, *data, steps=30, seed=1, batch=4, learning_rate=3e-2)
    assert same == curve
    assert np.array_equal(again["blocks"][0]["w_qkv"], params["blocks"][0]["w_qkv"])
    _, other = demo.train(model, *data, steps=2, seed=2, batch=4)
    assert other[0][1] != curve[0][1]


def test_seconds_end_the_training_early(texts):
    text, training, held_out = texts
    model = model_of(text)
    _, curve = demo.train(model, model.encode(training), model.encode(held_out[:500]),
                          steps=10_000, seed=0, seconds=0.2, batch=2)
    assert len(curve) < 10_000
    assert curve[-1][2] is not None


def test_ablated_models_look_at_one_character_at_a_time(texts):
    text, _, held_out = texts
    tokens = model_of(text).encode(held_out[:16])
    changed = tokens.copy()
    changed[0] += 1
    for ablate in (False, True):
        model = model_of(text, ablate=ablate)
        params = model.parameters(np.random.default_rng(0))
        before, after = (layers.language_model(x, params, **model.arguments)
                         for x in (tokens, changed))
        assert np.array_equal(before[1:], after[1:]) is ablate
    _, saved = layers.language_model.forward(tokens, params, **model.arguments)
    grads = saved.backward(np.ones_like(before)).params["blocks"][0]
    assert not grads["w_qkv"].any()
    assert grads["w1"].any()


def test_saved_weights_give_the_same_logits_bit_for_bit(texts, tmp_path):
    text, training, _ = texts
    model = model_of(text, options={"window": 5, "softcap": 30.0})
    params = model.parameters(np.random.default_rng(3))
    path = tmp_path / "weights.safetensors"
    demo.save(path, model, params)
    loaded, same = demo.load(path)
    assert dataclasses.asdict(loaded) == dataclasses.asdict(model)
    tokens = model.encode(training[:16])
    assert np.array_equal(layers.language_model(tokens, params, **model.arguments),
                          layers.language_model(tokens, same, **loaded.arguments))
    assert demo.sample(loaded, same, "abc", 20, 0) == demo.sample(model, params, "abc", 20, 0)


def test_a_run_tells_and_writes_what_it_found(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["demo", "--steps", "3", "--out", str(out), "--option", "window=4"]) == 0
    printed = capsys.readouterr().out
    for piece in ("bigram entropy", "before training", "after training", "NOT below", "held-out"):
        assert piece in printed
    with (out / "loss.csv").open(encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0] == ["step", "loss", "held_out_loss"]
    assert [row[0] for row in table[1:]] == ["1", "2", "3"]
    assert f"held-out loss {float(table[-1][2]):.3f}" in printed
    weights = str(out / "weights.safetensors")
    samples = []
    for seed in ("0", "0", "1"):
        assert cli.main(["demo", "--load", weights, "--seed", seed]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1] != samples[2]
    assert samples[0].strip() in printed


@pytest.mark.parametrize("name", sorted(catalogue.EXAMPLES | catalogue.LEARNED))
def test_every_variant_of_sequences_can_be_trained(small, texts, tmp_path, capsys, name):
    assert cli.main(["demo", "--attention", name, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert f"2 heads of {name}" in capsys.readouterr().out
    model, params = demo.load(tmp_path / "weights.safetensors")
    assert model.attention == name
    assert model.options == (catalogue.EXAMPLES | catalogue.LEARNED)[name]
    tokens = model.encode(texts[2][:16])
    before = layers.language_model(tokens, params, **model.arguments)
    for place in (4, 15):
        changed = np.where(np.arange(16) == place, tokens - 1, tokens)
        after = layers.language_model(changed, params, **model.arguments)
        np.testing.assert_allclose(before[:place], after[:place], rtol=0, atol=1e-6)
        assert (before[place] != after[place]).any()


@pytest.mark.parametrize(("name", "options", "extra"), [
    ("nsa_attention", {}, {"w_q", "w_kv", "w_o", "w_gate", "b_gate"}),
    ("nsa_attention", {"compression": "conv", "block_size": 4, "stride": 2},
     {"k_kernel", "v_pe", "w_gate"}),
    ("nsa_attention", {"mode": "kmeans", "window": 3, "segment": 4}, {"w_gate"}),
    ("nsa_attention", {"mode": "lsh", "window": 3, "segment": 4, "rng": 0}, {"w_gate"}),
    ("adaptive_span_attention", {"ramp": 5.0, "max_span": 20.0}, {"span_share", "w_qkv"}),
    ("routing_attention", {"cluster_size": 3}, {"centroids", "w_qkv", "b_o"}),
    ("dynamic_convolution", {}, {"w_in", "w_kernel", "w_out"}),
    ("lightweight_convolution", {}, {"w_in", "kernel_logits", "b_out"}),
    ("additive_attention", {}, {"w_score", "b", "w_qkv"}),
    ("dynamic_span_attention", {"ramp": 5.0, "max_span": 20.0}, {"w_span", "b_span"}),
    ("gated_attention", {"block_size": 4}, {"gate_logits"}),
    ("sparsebert_attention", {"rng": 0}, {"alpha"}),
    ("talking_heads_attention", {}, {"w_pre", "w_post"})])
def test_layers_are_trained_saved_and_loaded(texts, tmp_path, name, options, extra):
    text, training, held_out = texts
    model = model_of(text, attention=name, options=options)
    data = model.encode(training), model.encode(held_out[:200])
    params, _ = demo.train(model, *data, steps=3, seed=0, batch=2)
    fresh = model.parameters(np.random.default_rng(0))
    own = params["blocks"][0]["attention"]
    assert extra <= own.keys()
    for key, w in own.items():
        assert (w != fresh["blocks"][0]["attention"][key]).any(), key
    path = tmp_path / "weights.safetensors"
    demo.save(path, model, params)
    loaded, same = demo.load(path)
    assert same["blocks"][0]["attention"].keys() == own.keys()
    tokens = data[0][:16]
    found, wanted = (layers.language_model(tokens, weights, **which.arguments)
                     for which, weights in ((loaded, same), (model, params)))
    assert np.array_equal(found, wanted)
    ablated = dataclasses.replace(model, ablate=True)
    assert "attention" not in ablated.parameters(np.random.default_rng(0))["blocks"][0]


def test_centroids_follow_the_tokens_of_their_clusters(texts):
    text, training, _ = texts
    model = model_of(text, attention="routing_attention", options={"cluster_size": 3})
    params = model.parameters(np.random.default_rng(0))
    _, saved = layers.language_model.forward(model.encode(training[:16]), params,
                                             **model.arguments)
    before = params["blocks"][0]["attention"]["centroids"].copy()
    after = trained.moved_centroids(params["blocks"], saved.blocks)[0]["attention"]["centroids"]
    assert np.array_equal(params["blocks"][0]["attention"]["centroids"], before)
    record = saved.blocks.blocks[0].attended.heads.heads.attended
    for head in range(2):
        x = np.concatenate([side.x[head] for side in (record.normal_q, record.normal_k)])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        own = np.concatenate([record.clusters[head], record.key_clusters[head]])
        for cluster, (old, new) in enumerate(zip(before[head], after[head], strict=True)):
            total = x[own == cluster].sum(0)
            want = old if not (own == cluster).any() else (
                0.9 * old + 0.1 * total / np.linalg.norm(total))
            np.testing.assert_allclose(new, want, atol=1e-5)
    grads = saved.backward(np.ones((16, len(model.alphabet)), np.float32)).params
    assert not grads["blocks"][0]["attention"]["centroids"].any()


def test_a_longer_context_has_fewer_texts_to_a_step(small, texts, tmp_path, capsys):
    assert demo.Model("ab").batch == 128
    assert dataclasses.replace(demo.Model("ab"), context=1024).batch == 2
    assert dataclasses.replace(demo.Model("ab"), context=4096).batch == 1
    assert cli.main(["demo", "--attention", "nsa", "--context", "100", "--steps", "1", "--out",
                     str(tmp_path)]) == 0
    assert "context 100" in capsys.readouterr().out
    assert demo.load(tmp_path / "weights.safetensors")[0].context == 100


def test_a_short_name_and_some_options_are_enough(small, tmp_path, capsys):
    assert cli.main(["demo", "--attention", "longformer", "--steps", "1", "--out", str(tmp_path),
                     "--option", "window=3"]) == 0
    assert "longformer_attention (window=3, global_index=[0])" in capsys.readouterr().out


def test_the_loss_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    written = demo.draw_curve(tmp_path, [(1, 4.0, None), (2, 3.0, 3.5)], 2.5, "attention")
    assert [path.name for path in written] == ["loss.csv", "loss.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_only_a_full_run_above_the_bigram_entropy_fails(small, tmp_path, monkeypatch):
    arguments = ["demo", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    monkeypatch.setattr(demo, "STEPS", 2)
    assert cli.main(arguments) == 1
    assert cli.main([*arguments, "--ablate"]) == 0
    monkeypatch.setattr(demo, "entropies", lambda text: (9.0, 9.0))
    assert cli.main(arguments) == 0


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--attention", "nothing"], "--attention must be one of adaptive_span_attention, "),
    (["--attention", "cross_modal_attention"], "which can be causal"),
    (["--attention", "axial"], "which can be causal; got 'axial_attention'"),
    (["--attention", "longformer", "--option", "bias=3"],
     "--option of longformer_attention must be one of window, global_index"),
    (["--option", "wndow=3"], "--option of attention must be one of mask, bias"),
    (["--option", "causal=False"], "got 'causal'"),
    (["--option", "window"], "--option must be KEY=VALUE; got 'window'"),
    (["--option", "window=-1"], "window must be at least 0; got -1"),
    (["--steps", "0"], "must be positive"),
    (["--seconds", "nan"], "must be positive"),
    (["--context", "0"], "--context must be at least 1; got 0"),
    (["--context", "1000"], "--context must be less than the 1,000 characters held out"),
    (["--attention", "lsh", "--option", "reference=True"], "got 'reference'"),
    (["--attention", "routing", "--option", "mode=top"], "got 'mode'"),
    (["--attention", "nsa", "--option", "mode=kmeans", "--option", "stride=3"],
     "stride must be left out: it is of mode 'paper', not 'kmeans'"),
    (["--attention", "gat"], "which can be causal; got 'gat_attention'"),
    (["--seed", "-1"], "--seed not negative; got 400, inf and -1"),
    (["--load", "missing.safetensors"], "missing.safetensors"),
])
def test_what_cannot_be_done_is_said_in_one_line(small, tmp_path, monkeypatch, capsys, arguments,
                                                 complaint):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_files_that_the_demo_has_not_written_are_refused(texts, tmp_path):
    from safetensors.numpy import save_file

    model = model_of(texts[0])
    path = tmp_path / "weights.safetensors"
    demo.save(path, model, model.parameters(np.random.default_rng(0)))
    good = path.read_bytes()
    w = np.ones(3, np.float32)

    def described(**changes):
        return {"pyattn.demo": json.dumps(dataclasses.asdict(model) | changes)}

    def write(metadata):
        save_file({"w": w}, path, metadata=metadata)

    for damage in (lambda: path.write_bytes(good[:-10]), lambda: path.write_bytes(good[:5]),
                   lambda: path.write_bytes(b""), lambda: path.write_bytes(b"\xff" * 100),
                   lambda: write(None), lambda: write({"pyattn.demo": "{"}),
                   lambda: write({"pyattn.demo": "[]"}), lambda: write(described()),
                   lambda: write(described(extra=1)), lambda: write(described(depth=10**12)),
                   lambda: write(described(width="wide"))):
        damage()
        with pytest.raises(OptionError, match="does not hold weights that the demo has saved"):
            demo.load(path)
