"""LSH and routing attention against code that nobody here wrote: forward and gradients.

reformer-pytorch and routing-transformer bring much that these tests do not need; ``.ci/run`` has
the command that installs them alone.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from public_code import close, module, torch_in_float64  # noqa: F401

import pyattn
from pyattn.features.hashing import lsh_hash

pytestmark = pytest.mark.peers

BACKENDS = ["cpu", "array_api"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# Hugging Face Reformer

BATCH, HEADS, HEAD_WIDTH, WIDTH = 2, 3, 6, 10
ROUGH = 1e-11
"""Their keys have an epsilon beside their length."""


def reformer_layer(torch, *, chunk, rounds, buckets, causal, monkeypatch):
    """A layer with large weights; its keys have unit length, not nearly so."""
    reformer = module("transformers.models.reformer.modeling_reformer")
    config = pytest.importorskip("transformers").ReformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_head_size=HEAD_WIDTH,
        lsh_attn_chunk_length=chunk, num_hashes=rounds, num_buckets=buckets, hash_seed=5,
        is_decoder=causal, lsh_attention_probs_dropout_prob=0.0)
    layer = reformer.LSHSelfAttention(config, layer_idx=0).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    monkeypatch.setattr(layer, "_len_norm", functools.partial(layer._len_norm, epsilon=0.0))
    return layer


def split(x):
    return np.swapaxes(x.reshape(*x.shape[:2], HEADS, HEAD_WIDTH), 1, 2)


def joined(x):
    return np.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def compare_with_reformer(torch, layer, n, buckets, dout, *, mask=None, **options):
    """Run the layer on given buckets, or with None on its own, and ours on what it returns."""
    x = draw(BATCH, n, WIDTH, seed=1)
    hidden = torch.tensor(x, requires_grad=True)
    want = layer(hidden, attention_mask=None if mask is None else torch.asarray(mask),
                 buckets=None if buckets is None else torch.asarray(buckets))
    want.hidden_states.backward(torch.asarray(dout))
    if n > layer.chunk_length:
        options["decisions"] = {"buckets": want.buckets.numpy()}

    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    qk, v = (split(x @ weights[f"{name}.weight"].T) for name in ("query_key", "value"))
    out, saved = pyattn.lsh_attention.forward(
        qk, v, num_rounds=layer.num_hashes, bucket_length=layer.chunk_length, reference=True,
        causal=layer.is_decoder, **options)
    dqk, dv = (joined(gradient) for gradient in saved.backward(split(dout)))
    real = np.ones((BATCH, n), bool) if mask is None else mask
    close(joined(out)[real], want.hidden_states[torch.asarray(real)], "out", ROUGH)
    close(dqk @ weights["query_key.weight"] + dv @ weights["value.weight"], hidden.grad, "x", ROUGH)
    for name, gradient in (("query_key", dqk), ("value", dv)):
        close(np.einsum("bno,bni->oi", gradient, x), getattr(layer, name).weight.grad, name,
              ROUGH)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "chunk", "rounds"), [
    (32, 16, 1), (48, 8, 1), (48, 8, 2), (96, 16, 3), (130, 65, 2), (60, 2, 4), (24, 64, 2)])
def test_reformer(torch, n, chunk, rounds, causal, backend, monkeypatch):
    """By buckets that are given to both; with n <= chunk the layer attends densely."""
    layer = reformer_layer(torch, chunk=chunk, rounds=rounds, buckets=8, causal=causal,
                           monkeypatch=monkeypatch)
    given = None
    if n > chunk:
        turn = 8 * np.arange(rounds)[:, None]
        given = np.random.default_rng(2).integers(0, 8, (BATCH, HEADS, rounds, n)) + turn
    with pyattn.use_backend(backend):
        compare_with_reformer(torch, layer, n, given, draw(BATCH, n, HEADS * HEAD_WIDTH))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("buckets", [6, [4, 6]], ids=str)
def test_reformer_hashes(torch, buckets, causal, monkeypatch):
    """By the buckets of the layer's own rotations, which ours find too."""
    layer = reformer_layer(torch, chunk=8, rounds=3, buckets=buckets, causal=causal,
                           monkeypatch=monkeypatch)
    n = 64
    x = torch.asarray(draw(BATCH, n, WIDTH, seed=1))
    theirs = layer(x).buckets.numpy()
    torch.manual_seed(5)
    half = np.sum(buckets) // 2
    rotations = torch.randn((HEADS, HEAD_WIDTH, 3, half)).numpy()
    qk = split((x @ layer.query_key.weight.T).detach().numpy())
    ours = lsh_hash(qk, num_rounds=3, rotations=rotations,
                    num_buckets=tuple(buckets) if isinstance(buckets, list) else buckets)
    np.testing.assert_array_equal(ours + np.prod(buckets) * np.arange(3)[:, None], theirs)
    compare_with_reformer(torch, layer, n, None, draw(BATCH, n, HEADS * HEAD_WIDTH))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_reformer_with_padding(torch, causal, backend, monkeypatch):
    """The layer sorts padding last, as here, but cuts its chunks over all n tokens.

    So there a round's last chunk, which the first of the next looks back to, may be all padding;
    here it is the last one with tokens, as if the item were alone. Less padding than a chunk makes
    no difference. The layer's outputs for padding, which are anything, are not compared.
    """
    n, lengths = 64, np.array([64, 59])
    layer = reformer_layer(torch, chunk=8, rounds=3, buckets=6, causal=causal,
                           monkeypatch=monkeypatch)
    mask = np.arange(n) < lengths[:, None]
    dout = draw(BATCH, n, HEADS * HEAD_WIDTH) * mask[..., None]
    with pyattn.use_backend(backend):
        compare_with_reformer(torch, layer, n, None, dout, mask=mask, kv_lengths=lengths)


# reformer-pytorch

def compare_with_lucidrains(torch, n, length, rounds, buckets, monkeypatch, *, causal=False,
                            across=True, duplicates=True, rehash=True, lengths=None, atol=1e-11):
    peer = module("reformer_pytorch.reformer_pytorch")
    layer = peer.LSHAttention(bucket_size=length, n_hashes=rounds, causal=causal,
                              attend_across_buckets=across, rehash_each_round=rehash,
                              allow_duplicate_attention=duplicates).eval()
    if buckets is not None:
        # buckets of different rounds have different numbers
        given = buckets + (buckets.max() + 1) * np.arange(rounds)[:, None]
        given = torch.asarray(given.reshape(len(given), -1))
        monkeypatch.setattr(layer, "hash_vectors", lambda n_buckets, vecs, **rest: given)
    qk, v, dout = draw(3, n, 6), draw(3, n, 6, seed=1), draw(3, n, 6, seed=2)
    real = np.arange(n) < np.reshape(n if lengths is None else lengths, (-1, 1))
    real = np.broadcast_to(real, (3, n))
    dout *= real[..., None]
    leaves = [torch.tensor(x, requires_grad=True) for x in (qk, v)]
    want, _, found = layer(*leaves, input_mask=None if lengths is None else torch.tensor(real))
    want.backward(torch.asarray(dout))
    if buckets is None:
        buckets = found.numpy().reshape(3, rounds, n)
    # their batch is our heads of as many items
    out, saved = pyattn.lsh_attention.forward(
        qk[:, None], v[:, None], num_rounds=rounds, bucket_length=length, causal=causal,
        reference=True, attend_across_buckets=across, deduplicate=not duplicates,
        scale=6**-0.5, kv_lengths=lengths, decisions={"buckets": buckets[:, None]})
    close(out[:, 0][real], want[torch.tensor(real)], "out", atol)
    for gradient, leaf in zip(saved.backward(dout[:, None]), leaves, strict=True):
        close(gradient[:, 0], leaf.grad, "gradient", atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("across", [True, False], ids=["across", "within"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "length", "rounds"), [
    (32, 16, 1), (48, 8, 2), (96, 8, 4), (256, 64, 2), (20, 1, 3)])
def test_reformer_pytorch(torch, n, length, rounds, causal, across, backend, monkeypatch):
    buckets = np.random.default_rng(3).integers(0, n // length, (3, rounds, n))
    with pyattn.use_backend(backend):
        compare_with_lucidrains(torch, n, length, rounds, buckets, monkeypatch, causal=causal,
                                across=across)


@pytest.mark.parametrize("rehash", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_reformer_pytorch_hashes(torch, causal, rehash, monkeypatch):
    """By the buckets that it finds, also if the rounds are a token's best buckets of one hash."""
    compare_with_lucidrains(torch, 96, 8, 3, None, monkeypatch, causal=causal, rehash=rehash)


@pytest.mark.parametrize("causal", [False, True])
def test_reformer_pytorch_with_padding(torch, causal, monkeypatch):
    """Less padding than a chunk, in the last bucket: as for Reformer above."""
    lengths = np.array([64, 60, 57])
    buckets = np.random.default_rng(3).integers(0, 8, (3, 3, 64))
    np.copyto(buckets, 8, where=(np.arange(64) >= lengths[:, None])[:, None])
    compare_with_lucidrains(torch, 64, 8, 3, buckets, monkeypatch, causal=causal, lengths=lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_reformer_pytorch_counts_a_key_once(torch, rounds, causal, backend, monkeypatch):
    """It divides a pair's weight by 1e-9 more than its count, hence the tolerance."""
    buckets = np.random.default_rng(3).integers(0, 6, (3, rounds, 48))
    with pyattn.use_backend(backend):
        compare_with_lucidrains(torch, 48, 8, rounds, buckets, monkeypatch, causal=causal,
                                across=False, duplicates=False, atol=2e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_reformer_pytorch_counts_a_key_of_any_bucket_once(torch, rounds, backend, monkeypatch):
    """Where its counts are right.

    It does not count the meetings of a round's first chunk with the last of the round before: a
    pair that meets there alone gets 1e9 times its weight. So here the first chunks hold early
    tokens and the last ones late tokens, which causal calls do not show them.
    """
    rng = np.random.default_rng(3)
    buckets = np.concatenate([rng.integers(0, 3, (3, rounds, 24)),
                              rng.integers(2, 6, (3, rounds, 24))], axis=-1)
    with pyattn.use_backend(backend):
        compare_with_lucidrains(torch, 48, 8, rounds, buckets, monkeypatch, causal=True,
                                duplicates=False, atol=2e-8)


# routing-transformer

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "clusters", "size"), [
    (48, 48, 4, 12), (40, 90, 3, 20), (150, 150, 5, 70), (16, 16, 1, 16)])
def test_routing_transformer(torch, n, m, clusters, size, causal, padded, backend, monkeypatch):
    """Its attention by clusters' best tokens, in its mode for a context.

    It takes q and k as they come, and unit-length copies of them to the clusters: here it gets them
    after torch's layer normalisation, as the paper has it. It divides by 1e-5 more than the number
    of a token's clusters, which is taken from it, and so is the key of its own that it shows every
    cluster of a causal call. Padding may be in a cluster, where it is masked. A query to which a
    cluster shows no key gets the mean of all its values from it, here nothing: such queries are not
    compared.
    """
    peer = module("routing_transformer.routing_transformer")
    monkeypatch.setattr(peer, "scatter_mean", functools.partial(peer.scatter_mean, eps=1e-300))
    listed = []
    distribution = peer.distribution

    def told(products, window):
        listed.append(distribution(products, window))
        return listed[-1]

    monkeypatch.setattr(peer, "distribution", told)
    heads, width = 2, 6
    layer = peer.KmeansAttention(clusters, size, heads, width, causal=causal,
                                 receives_context=True).eval()
    layer.num_mem_kv = 0
    for name in ("mem_key", "mem_value"):
        setattr(layer, name, torch.nn.Parameter(torch.zeros(heads, clusters, 0, width)))
    layer.kmeans.means.copy_(torch.asarray(draw(heads, clusters, width, seed=9)))
    layer.kmeans.initted.fill_(True)

    q, k, v, dout = (draw(BATCH, heads, length, width, seed=seed)
                     for seed, length in enumerate((n, m, m, n)))
    lengths = [np.array([x, x - x // 5 if padded else x]) for x in (n, m)]
    masks = [np.arange(x) < own[:, None] for x, own in zip((n, m), lengths, strict=True)]
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    normal = [torch.nn.functional.layer_norm(x, (width,)) for x in leaves[:2]]
    want, _ = layer(*normal, leaves[2], query_mask=torch.tensor(masks[0]),
                    key_mask=torch.tensor(masks[1]))

    lists = []
    for found, own in zip(listed, lengths, strict=True):
        found = found.numpy().reshape(BATCH, heads, clusters, size)
        past = found >= own[:, None, None, None]
        # padding is in no list, and none comes last
        lists.append(np.sort(np.where(past, n + m, found), axis=-1))
        lists[-1][lists[-1] == n + m] = -1
    if not padded:
        free = pyattn.routing_attention.forward(*(q, k, v), layer.kmeans.means.numpy(),
                                                cluster_size=size, mode="top")[1].decisions
        np.testing.assert_array_equal(free["clusters"], lists[0])
        np.testing.assert_array_equal(free["key_clusters"], lists[1])

    compared = np.broadcast_to(masks[0][:, None, :], (BATCH, heads, n)).copy()
    for b, h, c in np.ndindex(BATCH, heads, clusters):
        keys = lists[1][b, h, c]
        first = keys[0] if keys[0] >= 0 else m
        taken = lists[0][b, h, c]
        taken = taken[taken >= 0]
        compared[b, h, taken] &= (first <= taken) if causal else first < m
    assert compared.mean() > 0.7
    dout *= compared[..., None]
    want.backward(torch.asarray(dout))
    with pyattn.use_backend(backend):
        out, saved = pyattn.routing_attention.forward(
            q, k, v, layer.kmeans.means.numpy(), cluster_size=size, mode="top",
            causal="top_left" if causal else False, q_lengths=lengths[0], kv_lengths=lengths[1],
            decisions={"clusters": lists[0], "key_clusters": lists[1]})
        grads = saved.backward(dout)
    close(out[compared], want[torch.tensor(compared)], "out")
    for name, gradient, leaf in zip("qkv", grads[:3], leaves, strict=True):
        close(gradient, leaf.grad, name)
