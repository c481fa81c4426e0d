"""The recall task asks what it says, costs are counted, and every variant is trained."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bench import recall


def flat(params):
    """The arrays of nested dicts, in order."""
    return [leaf for name in sorted(params) for leaf in (
        flat(params[name]) if isinstance(params[name], dict) else [params[name]])]


@pytest.mark.parametrize("length", [64, 256, 4096])
def test_answers_stand_behind_their_keys_and_far_before_the_questions(length):
    asked = recall.draw(np.random.default_rng(0), 5, length)
    pairs = asked.places.shape[1]
    assert pairs == min(32, max(2, length // 32))
    for tokens, places, answers in zip(asked.tokens, asked.places, asked.answers, strict=True):
        assert np.unique(places).size == pairs
        for place, number in zip(places, answers, strict=True):
            told, again = np.flatnonzero(tokens == tokens[place])
            assert again == place
            assert tokens[told + 1] == recall.KEYS + number
            assert place - (told + 1) >= 5 * length // 8
        assert np.count_nonzero(tokens < recall.KEYS + recall.VALUES) == 3 * pairs


def test_the_window_is_shorter_than_any_way_back():
    window = recall.variants()["window"].options["window"]
    assert window < 2500 < 5 * 4096 // 8


def test_whoever_guesses_is_right_as_often_as_there_are_values():
    rng = np.random.default_rng(0)
    asked = recall.draw(rng, 200, 1024)
    share = recall.right(rng.standard_normal((*asked.answers.shape, recall.VALUES)), asked)
    assert abs(share - 1 / recall.VALUES) < 4 * np.sqrt(1 / recall.VALUES / asked.answers.size)


@pytest.mark.parametrize("name", recall.variants())
def test_the_same_seed_trains_the_same_model(name, monkeypatch):
    monkeypatch.setattr(recall, "TOKENS", 256)
    first, again, other = (recall.train(recall.variants()[name], length=128, steps=2, seed=seed)
                           for seed in (3, 3, 4))
    assert first.steps == 2
    assert all(map(np.array_equal, flat(first.params), flat(again.params)))
    assert not all(map(np.array_equal, flat(first.params), flat(other.params)))


def mapped(function, params):
    """Nested dicts of `function` of the arrays."""
    return {name: mapped(function, x) if isinstance(x, dict) else function(x)
            for name, x in params.items()}


def changed(params, path, change):
    """Nested dicts whose array at `path` is another by `change`."""
    first, *rest = path
    return params | {first: changed(params[first], rest, change) if rest
                     else params[first] + change}


def paths(params):
    """Where the arrays of nested dicts are."""
    return [(name, *rest) for name, x in params.items()
            for rest in (paths(x) if isinstance(x, dict) else [()])]


@pytest.mark.parametrize("name", recall.variants())
def test_gradients_are_those_of_the_loss(name):
    """Of every array, along one direction; steps are so small that decisions stay."""
    layer = recall.variants()[name]
    params = mapped(lambda x: x.astype(np.float64), recall.init(layer, 0))
    rng = np.random.default_rng(1)
    asked = recall.draw(rng, 1, 192)
    recall.answer(layer, params, asked, turn=5, learn=True)     # routing's centroids

    def loss(params):
        scores, backward, _ = recall.answer(layer, params, asked, turn=5)
        value, saved = recall.cross_entropy.forward(scores, asked.answers)
        return float(value), lambda: backward(saved.backward().logits)

    grads = loss(params)[1]()
    for path in paths(params):
        grad = grads
        for key in path:
            grad = grad[key]
        direction = rng.standard_normal(grad.shape)
        ends = [loss(changed(params, path, h * direction))[0] for h in (1e-6, -1e-6)]
        assert np.sum(grad * direction) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4,
                                                         abs=1e-8), path


def test_keys_read_are_counted():
    for name, expected in (("dense", (256 + 1) / 2), ("window", (256 + 1) / 2)):
        layer = recall.variants()[name]
        found = recall.ask(layer, recall.init(layer, 0), length=256, sequences=1)
        assert found.keys == expected
    layer = recall.Separate(recall.pyattn.attention, window=15)
    found = recall.ask(layer, recall.init(layer, 0), length=256, sequences=2)
    assert found.keys == 16 - 16 * 15 / 2 / 256


def test_nobody_reads_more_than_the_window_where_it_counts():
    """At the last token of 4096, by the options: the window is given at least as many keys."""
    made = recall.variants()
    window = made["window"].options["window"] + 1
    paper = made["nsa paper"].options
    most = {"nsa paper": (4096 - paper["block_size"]) // paper["stride"] + 1
            + paper["num_selected"] * paper["select_block"] + paper["window"] + 1,
            "lsh": made["lsh"].options["num_rounds"] * made["lsh"].options["bucket_length"],
            "routing": made["routing"].options["cluster_size"]}
    for name in ("nsa kmeans", "nsa lsh"):
        options = made[name].options
        most[name] = (4096 // options["segment"] * options.get("num_clusters", 8)
                      + options["num_selected"] + options["window"] + 1)
    assert max(most.values()) <= window


def test_longer_sequences_follow_when_answers_are_known(monkeypatch):
    monkeypatch.setattr(recall, "TOKENS", 256)
    monkeypatch.setattr(recall, "PASSED", -1.0)
    trained = recall.train(recall.variants()["dense"], length=256, steps=3)
    assert trained.reached == {64: 0, 128: 1, 256: 2}
    assert trained.length == 256


def test_training_stops_when_time_is_over():
    assert recall.train(recall.variants()["dense"], length=64, steps=9, seconds=0.0).steps == 0


def test_a_table_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recall, "TOKENS", 256)
    path = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["recall", "--variants", "window", "nsa paper", "--length",
                                      "64", "--steps", "1", "--sequences", "2", "--output",
                                      str(path)])
    assert recall.main() == 0
    lines = path.read_text().splitlines()
    assert capsys.readouterr().out == path.read_text()
    assert lines[0].startswith("| variant | right, N = 64 | keys read | right, N = 128 |")
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| window", "| nsa paper"]
    assert "Chance is 1.6%" in lines[-1]
