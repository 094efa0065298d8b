"""A model to evaluate has the same interface whether loaded from a GGUF file or a folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_prefill as sp
from sparse_prefill.models.eval_model import EvalModel, load
from tests.tiny_gguf import CONTEXT, HEADS, KV_HEADS, LAYERS, write_gguf
from tests.tiny_hf import write_folder

SPARSE = sp.get_strategy("a_shape", sink=16, local=32, block_size=16, min_length=0)


@pytest.fixture(scope="module", params=["gguf", "folder"])
def subject(request, tmp_path_factory) -> EvalModel:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gguf":
        return load(write_gguf(folder / "tiny.gguf"))
    return load(write_folder(folder))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 250, (1, 200), generator=torch.Generator().manual_seed(0))


def test_a_model_has_its_sizes_and_its_tokenizer(subject):
    assert (subject.layers, subject.heads, subject.kv_heads, subject.max_tokens) == (LAYERS, HEADS, KV_HEADS, CONTEXT)
    assert subject.decode(subject.encode("the 12 bells")) == "the 12 bells"
    assert len(subject.chat("the 12 bells")) > len(subject.encode("the 12 bells"))


def test_likelihood_runs_a_sparse_prefill(subject, tokens):
    with sp.record() as calls:
        sparse = subject.likelihood(SPARSE, tokens, 40, at=[0, 39])
    assert [call.dense for call in calls] == [None] * LAYERS
    assert all(float(call.density.max()) < 0.7 for call in calls)
    dense = subject.likelihood("dense", tokens, 40)
    assert sparse.nll.shape == sparse.greedy.shape == (1, 40)
    assert not torch.allclose(sparse.nll, dense.nll, atol=1e-3)
    places = tokens[:, -40:][:, [0, 39]][..., None]
    torch.testing.assert_close(-sparse.log_probs.gather(-1, places)[..., 0], sparse.nll[:, [0, 39]])


def test_greedy_tokens_of_likelihood_equal_those_of_dense_generation(subject, tokens):
    new = subject.generate("dense", tokens, 5)
    assert 1 <= len(new) <= 5
    text = torch.cat([tokens, torch.tensor([new])], dim=1)
    assert subject.likelihood("dense", text, len(new)).greedy[0].tolist() == new


def test_generation_starts_with_a_sparse_prefill(subject, tokens):
    with sp.record() as calls:
        subject.generate(SPARSE, tokens, 2)
    assert [call.dense for call in calls[:LAYERS]] == [None] * LAYERS


def test_captured_tensors_are_those_of_attention(subject, tokens):
    seen = {}
    subject.capture(tokens, lambda layer, q, k, v, prompt: seen.__setitem__(layer, (q, k, v)), every=LAYERS)
    assert list(seen) == [0]
    q, k, v = seen[0]
    assert q.shape == (1, HEADS, 200, q.shape[3])
    assert k.shape == v.shape == (1, KV_HEADS, 200, q.shape[3])
    found = []

    def compare(call, inputs, prompt):
        found.append((inputs.q, inputs.k, inputs.v))

    with sp.record(inspect=compare):
        subject.prefill(SPARSE, tokens)
    for one, other in zip(seen[0], found[0], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("tokens", "last", "at", "match"),
    [
        (torch.zeros(2, 8, dtype=torch.long), 2, [], r"\[1, tokens\]"),
        (torch.zeros(1, CONTEXT + 1, dtype=torch.long), 2, [], f"takes {CONTEXT} tokens"),
        (torch.zeros(1, 8, dtype=torch.long), 8, [], "leave a token"),
        ([1, 2, 3], 2, [], "tensor of whole numbers .* got a list"),
        (torch.zeros(1, 8, dtype=torch.bool), 2, [], r"torch.bool \[1, 8\]"),
        (torch.zeros(1, 0, dtype=torch.long), 2, [], r"\[1, 0\]"),
        (torch.tensor([[1, 2, 10**6]]), 2, [], r"lie in \[0, \d+\], got 1000000"),
        (torch.tensor([[1, -2, 3]]), 2, [], "got -2"),
        (torch.zeros(1, 8, dtype=torch.long), 2, [0.5], "got 0.5"),
        (torch.zeros(1, 8, dtype=torch.long), 2, [2], r"\[0, 1\], got 2"),
    ],
)
def test_likelihood_refuses_wrong_tokens_and_positions(subject, tokens, last, at, match):
    with pytest.raises(ValueError, match=match):
        subject.likelihood("dense", tokens, last, at)


def test_token_ids_may_have_any_integer_dtype(subject, tokens):
    expected = subject.likelihood(SPARSE, tokens, 3).nll
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(subject.likelihood(SPARSE, tokens.to(dtype), 3).nll, expected)


@pytest.mark.parametrize(("new", "match"), [(0, "max_new_tokens must be"), (CONTEXT, f"model's {CONTEXT}: shorten")])
def test_generation_beyond_the_length_of_the_model_is_refused(subject, tokens, new, match):
    with pytest.raises(ValueError, match=match):
        subject.generate(SPARSE, tokens, new)


@pytest.mark.parametrize(("text", "match"), [("a\ud800", "isn't Unicode: .* at 1"), (b"a", "a string, got a bytes")])
def test_encode_and_chat_refuse_invalid_text(subject, text, match):
    for read in (subject.encode, subject.chat):
        with pytest.raises(ValueError, match=match):
            read(text)


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weights: weights.pop(WEIGHT), f"lack {WEIGHT}: complete the folder"),
        (lambda weights: weights.update({WEIGHT: torch.zeros(3, 5)}), f"have the wrong shape for {WEIGHT}: complete"),
        (lambda weights: weights.clear(), "lack .*, .*, .* and [0-9]+ more: complete"),
    ],
    ids=["missing", "wrong shape", "none"],
)
def test_a_folder_with_incomplete_weights_is_refused(tmp_path, change, match):
    path = write_folder(tmp_path) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


def test_tied_weights_are_not_missing(tmp_path):
    write_folder(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    assert load(tmp_path).layers == LAYERS


@pytest.mark.parametrize("share", [0, 0.001, 0.5])
def test_a_truncated_file_of_weights_is_refused_in_one_line(tmp_path, share):
    path = write_folder(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"can't be loaded as a folder of Hugging Face's format: .*header") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_with_a_value_of_the_wrong_type_is_refused(tmp_path):
    config = write_folder(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": "x"}))
    with pytest.raises(ValueError, match=r"can't be loaded as a folder .*num_hidden_layers"):
        load(tmp_path)


def test_errors_of_load_name_the_allowed_models_dtypes_and_devices(tmp_path):
    with pytest.raises(ValueError, match="GGUF file, a folder"):
        load("no-such-model-anywhere")
    with pytest.raises(ValueError, match="can't be loaded as a folder"):
        load(tmp_path)
    for dtype in ("int4", torch.int8):
        with pytest.raises(ValueError, match="There are: fp32"):
            load(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="no device 'tpu'"):
        load(tmp_path, device="tpu")
    with pytest.raises(ValueError, match="is empty"):
        load("")
