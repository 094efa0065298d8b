"""SeerAttention equals its formulas in plain loops over tokens before the rotary embedding, and loads its gates."""

import math
from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.estimators import AttentionGate, attention_gate
from sparse_prefill.strategy import as_strategy, to_config

BASE, DIM = 100.0, 16
FREQUENCIES = tuple(BASE ** (-2 * i / DIM) for i in range(DIM // 2))
PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
LAYER = sp.Layer(0, 2, sp.Rope("half_split", FREQUENCIES))


def seer(layer=LAYER, **options):
    strategy = sp.get_strategy("seer_attention", **{"last": 0, "block_size": 16, "min_length": 0, **options})
    return strategy if layer is None else strategy.for_layer(layer)


def rotated(x, positions, layout="half_split", base=BASE):
    """x [..., n, D] after the rotary embedding at ``positions`` [n], pair by pair in float64."""
    dim, out = x.shape[-1], x.double().clone()
    for i in range(dim // 2):
        a, b = (i, i + dim // 2) if layout == "half_split" else (2 * i, 2 * i + 1)
        angle = positions.double() * base ** (-2 * i / dim)
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return out


def inputs(left_padding=None, layout="half_split", **sizes):
    """Queries and keys before and after the rotary embedding, and their prompt."""
    q, k, _ = reference.random_qkv(dim=DIM, **sizes)
    prompt = sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)
    turned = []
    for x, offset in ((q, prompt.offset), (k, 0)):
        positions = [torch.arange(x.shape[2]) + offset - reference.padding_of(prompt, b) for b in range(len(x))]
        turned.append(torch.stack([rotated(x[b], positions[b], layout).float() for b in range(len(x))]))
    return (q, k), turned, prompt


def random_weights(heads, kv_heads, width=DIM, queries=False, seed=0):
    """Weights of the keys, and of the queries or None."""
    source = torch.Generator().manual_seed(seed)
    w_k = torch.randn(kv_heads if queries else heads, 3 * DIM, width, generator=source) / 4
    return w_k, torch.randn(heads, DIM, width, generator=source) / 4 if queries else None


def halves(x, layout):
    """The dimensions of a head in half-split order."""
    return x if layout == "half_split" else torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)


def gate_probabilities(q, k, prompt, w_k, w_q, layout="half_split", rope=True):
    """The gate's probabilities for queries and keys before the rotary embedding: float64 [B, Hq, n_q, n_k]."""
    q, k = halves(q, layout).double(), halves(k, layout).double()
    heads, group, width = q.shape[1], q.shape[1] // k.shape[1], w_k.shape[2]
    seen = reference.visible(prompt, len(q))
    out = torch.zeros(len(q), heads, prompt.n_q, prompt.n_k, dtype=torch.float64)

    def pooled(x, block, offset, b):
        real = [t for t in block if t + offset >= reference.padding_of(prompt, b)]
        place = torch.tensor(real[0] + offset - reference.padding_of(prompt, b)) if real else None
        return x[real], place

    def turned(x, place):
        return rotated(x[None], place[None])[0] if rope else x

    for b, h, i in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).tolist():
        columns = seen[b, 0, i].nonzero()[:, 0].tolist()
        if not columns:
            continue
        rows, place = pooled(q[b, h], reference.query_block(prompt, i), prompt.offset, b)
        query = rows.mean(0) if w_q is None else rows.mean(0) @ w_q[h].double()
        query = turned(query, place)
        logits = []
        for j in columns:
            tokens, place = pooled(k[b, h // group], reference.key_block(prompt, j), 0, b)
            pools = torch.cat([tokens.amax(0), tokens.amin(0), tokens.mean(0)])
            key = pools @ w_k[h if w_q is None else h // group].double()
            logits.append(query @ turned(key, place) / math.sqrt(width))
        out[b, h, i, columns] = torch.stack(logits).softmax(-1)
    return out


def save_gates(path, layers, **sizes):
    """Save random gates to a file and return their weights."""
    gates = [random_weights(**sizes, seed=seed) for seed in range(layers)]
    tensors = {"model.norm.weight": torch.ones(3)}
    for i, (w_k, w_q) in enumerate(gates):
        tensors[f"model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight"] = w_k
        if w_q is not None:
            tensors[f"model.layers.{i}.self_attn.attn_gate.mask_linear_q.weight"] = w_q
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return gates


# Against plain loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [False, True], ids=["keys", "queries and keys"])
@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@every_prompt
def test_the_gate_equals_plain_loops_over_tokens_before_the_rotary_embedding(sizes, layout, queries):
    (q, k), turned, prompt = inputs(layout=layout, **sizes)
    weights = random_weights(q.shape[1], k.shape[1], queries=queries)
    found = AttentionGate(*weights, rope=sp.Rope(layout, FREQUENCIES))(*turned, prompt).exp()
    seen = prompt.visible()
    assert not found[~seen.expand_as(found) & seen.any(-1, keepdim=True)].any()
    want = gate_probabilities(q, k, prompt, *weights, layout)
    torch.testing.assert_close(found.masked_fill(~seen, 0).double(), want, rtol=1e-3, atol=1e-6)


@every_prompt
def test_without_a_rotary_embedding_the_gate_uses_tokens_unchanged(sizes):
    (q, k), _, prompt = inputs(**sizes)
    weights = random_weights(q.shape[1], k.shape[1])
    found = AttentionGate(*weights)(q, k, prompt).exp().masked_fill(~prompt.visible(), 0)
    want = gate_probabilities(q, k, prompt, *weights, rope=False)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)


def test_a_gate_wider_than_the_heads_uses_the_rope_base_of_the_model():
    (q, k), turned, prompt = inputs(q_len=200)
    weights = random_weights(6, 2, width=24, queries=True)
    found = AttentionGate(*weights, rope=LAYER.rope)(*turned, prompt).exp()
    want = gate_probabilities(q, k, prompt, *weights)
    torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-6)
    for frequencies in ((1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01), FREQUENCIES[:4]):
        with pytest.raises(ValueError, match="take a gate as wide as the heads"):
            AttentionGate(*weights, rope=sp.Rope("half_split", frequencies))


@every_prompt
def test_an_untrained_gate_compares_means_and_keeps_blocks_that_reach_the_threshold(sizes):
    (q, k), turned, prompt = inputs(scale=8.0, **sizes)
    select_mean = torch.cat([torch.zeros(2 * DIM, DIM), torch.eye(DIM)]).expand(q.shape[1], -1, -1)
    want = gate_probabilities(q, k, prompt, select_mean, None)
    seen, own = reference.visible(prompt, len(q)), reference.diagonal(prompt, len(q))
    for threshold in (0.01, 0.1):
        keep = seer(threshold=threshold).keep(*turned, prompt)
        assert torch.equal(keep, (want >= threshold) & seen | own)
    strategy = seer()
    table = strategy.score_table(strategy.score(*turned, prompt), prompt)
    torch.testing.assert_close(table.double(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.001, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("tokens", [63, 129, 320])
def test_ratio_keeps_the_same_number_of_the_highest_blocks_in_each_row(tokens, ratio):
    (q, k), turned, prompt = inputs(q_len=tokens)
    select_mean = torch.cat([torch.zeros(2 * DIM, DIM), torch.eye(DIM)]).expand(6, -1, -1)
    probabilities = gate_probabilities(q, k, prompt, select_mean, None)
    count = max(1, int((1 - math.sqrt(1 - ratio)) * prompt.n_k))
    keep = seer(ratio=ratio).keep(*turned, prompt)
    for h, i in torch.cartesian_prod(torch.arange(6), torch.arange(prompt.n_q)).tolist():
        best = reference.largest(probabilities[0, h, i, : i + 1].tolist(), count)
        assert len(best) == min(i + 1, count)
        assert set(keep[0, h, i].nonzero()[:, 0].tolist()) == best | {i}


def test_ratio_of_a_chunk_is_a_share_of_the_whole_prompt_if_total_len_is_given():
    _, (q, k), _ = inputs(q_len=320)
    strategy = seer(ratio=0.3)
    assert seer().chunk_invariant
    assert not strategy.chunk_invariant
    whole = strategy.keep(q, k)
    part = strategy.keep(q[:, :, :160], k[:, :, :160], sp.Prompt(160, block_size=16, total_len=320))
    assert torch.equal(part, whole[:, :, :10, :10])
    assert not torch.equal(strategy.keep(q[:, :, :160], k[:, :, :160]), part)


# Properties -----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), block=st.integers(0, 12))
def test_the_order_of_tokens_inside_a_block_does_not_matter(seed, block):
    (q, k), _, prompt = inputs(q_len=200, seed=seed)
    gate = AttentionGate(*random_weights(6, 2))
    before = gate(q, k, prompt)
    order = torch.arange(200)
    tokens = order[block * 16 : block * 16 + 16].clone()
    order[block * 16 : block * 16 + 16] = tokens[torch.randperm(len(tokens))]
    torch.testing.assert_close(gate(q[:, :, order], k[:, :, order], prompt), before, rtol=1e-4, atol=1e-4)


@given(low=st.floats(0, 1), high=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_higher_threshold_keeps_a_subset_and_zero_keeps_all_blocks(low, high, seed):
    _, (q, k), prompt = inputs(q_len=200, scale=40.0, seed=seed)
    low, high = sorted((low, high))
    assert not (seer(threshold=high).keep(q, k) & ~seer(threshold=low).keep(q, k)).any()
    assert torch.equal(seer(threshold=0).keep(q, k), prompt.visible().expand(1, 6, -1, -1))


def test_a_row_without_a_probability_at_the_threshold_keeps_its_own_block():
    q, k, _ = reference.random_qkv(q_len=500)
    keep = seer(threshold=0.2).keep(torch.zeros_like(q), k)
    assert torch.equal(keep[:, :, 5:], sp.Prompt(500, block_size=16).diagonal().expand(1, 6, -1, -1)[:, :, 5:])


def test_a_partial_last_block_does_not_change_earlier_rows():
    _, turned, prompt = inputs(q_len=175)
    gate = AttentionGate(*random_weights(6, 2), rope=LAYER.rope)
    whole = gate(*(x[:, :, :160] for x in turned), sp.Prompt(160, block_size=16))
    torch.testing.assert_close(gate(*turned, prompt)[:, :, :10, :10], whole)


@pytest.mark.parametrize("tokens", [640, 600, 577, 576])
def test_the_default_makes_the_last_two_query_blocks_dense(tokens):
    q, k, _ = reference.random_qkv(heads=2, kv_heads=1, q_len=tokens)
    keep = sp.get_strategy("seer_attention", threshold=1).keep(q, k)
    prompt = sp.Prompt(tokens, block_size=64)
    dense = (keep.sum(-1) == prompt.visible().sum(-1)).all((0, 1))
    assert dense.nonzero()[:, 0].tolist() == [0, prompt.n_q - 2, prompt.n_q - 1]


@pytest.mark.parametrize("name", ["300", "padding", "padded chunk"])
def test_scores_do_not_depend_on_the_number_of_tokens_per_step(name, monkeypatch):
    _, turned, prompt = inputs(**PROMPTS[name])
    gate = AttentionGate(*random_weights(turned[0].shape[1], 0), rope=LAYER.rope)
    before = gate(*turned, prompt)
    for numbers in (1, 3 * turned[0].shape[0] * turned[0].shape[1] * 16 * DIM):
        monkeypatch.setattr(attention_gate, "MAX_ELEMENTS", numbers)
        torch.testing.assert_close(gate(*turned, prompt), before, rtol=1e-4, atol=1e-4)


def test_the_gate_compiles_to_one_graph():
    _, turned, prompt = inputs(**PROMPTS["padded chunk"])
    gate = AttentionGate(*random_weights(turned[0].shape[1], turned[1].shape[1], queries=True), rope=LAYER.rope)
    compiled = torch.compile(gate, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(*turned, prompt), gate(*turned, prompt), rtol=0, atol=0)


# Training -------------------------------------------------------------------------------------------------


def highest_shares(q, k, prompt):
    """The training target of gates: the highest probability of a token in each block, normalized by row."""
    p = reference.probabilities(q, k, reference.token_mask(prompt, len(q))[:, None])
    p = F.pad(p, (0, -prompt.kv_len % 16, 0, -prompt.q_len % 16))
    highest = p.unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).amax((3, 5))
    return highest / highest.sum(-1, keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("padding", [None, [40, 0]])
def test_gradient_steps_on_the_divergence_from_the_true_attention_reduce_it(padding):
    _, turned, prompt = inputs(q_len=150, batch=2, scale=4.0, left_padding=padding)
    target = highest_shares(*turned, prompt)
    assert ((target >= 0) & (target <= 1)).all()
    rows = prompt.visible().any(-1).expand(target.shape[:3])
    torch.testing.assert_close(target.sum(-1)[rows], torch.ones_like(target.sum(-1)[rows]))
    gate = AttentionGate.untrained(6, DIM, LAYER.rope)
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.kl_div(gate(*turned, prompt).double(), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        assert gate.mask_linear_k.weight.grad.isfinite().all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0
    assert losses[-1] < 0.7 * losses[0]


# Files of gates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_each_layer_gets_its_gate_from_the_file(suffix, queries, tmp_path):
    (q, k), turned, prompt = inputs(q_len=150)
    path = tmp_path / f"gates{suffix}"
    gates = save_gates(path, 2, heads=6, kv_heads=2, queries=queries)
    strategy = seer(layer=None, weights=path, threshold=0.05)
    for index in range(2):
        bound = strategy.for_layer(sp.Layer(index, 2, LAYER.rope))
        want = gate_probabilities(q, k, prompt, *gates[index])
        with torch.inference_mode():
            scores = bound.score(*turned, prompt)
        torch.testing.assert_close(scores.exp().double(), want, rtol=1e-3, atol=1e-6)
        assert torch.equal(bound.keep(*turned), (want >= 0.05) | prompt.diagonal())


def test_a_saved_gate_is_loaded_unchanged(tmp_path):
    _, turned, prompt = inputs(q_len=150)
    gate = AttentionGate(*random_weights(6, 2, queries=True), rope=LAYER.rope)
    prefix = "model.layers.1.self_attn.attn_gate."
    torch.save({prefix + name: weight for name, weight in gate.state_dict().items()}, tmp_path / "gates.pt")
    strategy = seer(sp.Layer(1, 2, LAYER.rope), weights=str(tmp_path / "gates.pt"))
    torch.testing.assert_close(strategy.score(*turned, prompt), gate(*turned, prompt), rtol=0, atol=0)


def test_a_strategy_with_weights_is_hashable_and_survives_its_configuration(tmp_path):
    strategy = seer(layer=None, weights=tmp_path / "gates.pth")
    assert as_strategy(to_config(strategy)) == strategy
    sp.Plan(default=strategy).save(tmp_path / "plan.yaml")
    plan = sp.Plan.load(tmp_path / "plan.yaml")
    assert plan.default == strategy
    assert plan.for_layer(LAYER) == strategy.for_layer(LAYER)
    assert len({strategy, plan.default, plan.for_layer(LAYER), plan.for_layer(sp.Layer(1, 2))}) == 3


def test_changing_an_option_of_a_bound_strategy_keeps_its_layer_and_the_layer_is_not_an_option():
    _, turned, prompt = inputs(q_len=150)
    changed = replace(seer(threshold=0.5), threshold=0.05)
    assert torch.equal(changed.score(*turned, prompt), seer(threshold=0.05).score(*turned, prompt))
    assert not torch.equal(changed.score(*turned, prompt), seer(layer=None).score(*turned, prompt))
    assert "layer" not in registry.strategies.options("seer_attention")
    assert "layer" not in to_config(seer(layer=None))
    with pytest.raises(ValueError, match="has no option 'layer'"):
        sp.get_strategy("seer_attention", layer=LAYER)


def test_errors_for_invalid_weights_name_the_fault(tmp_path):
    q, k, _ = reference.random_qkv(q_len=150, dim=DIM)
    save_gates(tmp_path / "gates.pth", 1, heads=6, kv_heads=2)
    save_gates(tmp_path / "empty.safetensors", 0)
    (tmp_path / "text.pth").write_text("not a file of weights")
    torch.save([1, 2], tmp_path / "list.pth")
    decode = {"model.layers.0.self_attn.attn_gate.attngate_linear_k.weight": torch.ones(2, 48, 16)}
    torch.save(decode, tmp_path / "decode.pth")
    for name, layer, message in (
        ("gates.pth", None, "for_layer"),
        ("gates.pth", sp.Layer(1, 2), r"no gate for the keys of layer 1. It has gates for \[0\]"),
        ("empty.safetensors", LAYER, "It holds model.norm.weight"),
        ("decode.pth", LAYER, "no prefill gates.*attngate_linear_k"),
        ("text.pth", LAYER, "can't be read"),
        ("list.pth", LAYER, "holds a list"),
        ("missing.pth", LAYER, "there is none at"),
    ):
        with pytest.raises(ValueError, match=message):
            seer(layer, weights=str(tmp_path / name)).keep(q, k)
    with pytest.raises(ValueError, match="made for other heads"):
        seer(weights=str(tmp_path / "gates.pth")).keep(q[:, :4], k)


@pytest.mark.parametrize(
    "shapes", [[(6, 48)], [(6, 48, 8)], [(6, 47, 16)], [(2, 48, 24), (6, 16, 16)], [(2, 48, 24), (6,)]]
)
def test_weights_that_do_not_fit_each_other_are_refused(shapes):
    with pytest.raises(ValueError, match="weights of a gate must be"):
        AttentionGate(*map(torch.zeros, shapes))


def test_options_and_documents_are_checked():
    for options, message in (
        ({"threshold": 1.5}, "threshold must be"),
        ({"threshold": -0.1}, "threshold must be"),
        ({"ratio": 0}, "ratio must be"),
        ({"ratio": 0.5, "threshold": 0.1}, "not both"),
        ({"weights": 3}, "weights must be the path"),
    ):
        with pytest.raises(ValueError, match=message):
            sp.get_strategy("seer_attention", **options)
    q, k, _ = reference.random_qkv(q_len=64)
    with pytest.raises(ValueError, match="cannot make one table for packed documents"):
        seer(None).keep(q, k, sp.Prompt(64, block_size=16, documents=[0] * 40 + [1] * 24))
