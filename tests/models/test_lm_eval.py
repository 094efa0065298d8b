"""Tasks of lm-evaluation-harness on a sparse model, compared with direct calls of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_prefill as sp
from sparse_prefill.models.transformers import sparse
from tests.tiny_gguf import LAYERS
from tests.tiny_hf import write_folder

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm_eval isn't installed")
from lm_eval.tasks import TaskManager  # noqa: E402

from sparse_prefill.models.lm_eval import SparseLM  # noqa: E402

SPARSE = sp.get_strategy("flex_prefill", block_size=16, min_length=0)
TEXTS = ["The ship is in the harbour. " * n for n in (7, 11, 5)]
CHOICES = (" yes", " no, it is not")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def evaluate(tmp_path: Path):
    """Runs a task of three documents from local files."""
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "documents.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{text}}Is it?",
    }

    def run(model: SparseLM, **more) -> dict:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task | more))
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return lm_eval.simple_evaluate(model, tasks=["tiny"], task_manager=manager, bootstrap_iters=0)

    return run


CHOOSING = {
    "output_type": "multiple_choice",
    "doc_to_choice": [choice.strip() for choice in CHOICES],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}],
}


def log_likelihood(model, tokenizer, text: str, answer: str) -> float:
    ids = tokenizer.encode(f"{text}Is it?", add_special_tokens=False)
    end = tokenizer.encode(answer, add_special_tokens=False)
    with torch.no_grad():
        log_probs = model(torch.tensor([[*ids, *end[:-1]]])).logits[0, -len(end) :].log_softmax(-1)
    return float(log_probs[range(len(end)), end].sum())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_equal_those_of_separate_sparse_prefills(evaluate, model, tokenizer, batch_size):
    lm = SparseLM(model, SPARSE, tokenizer=tokenizer, batch_size=batch_size)
    results = evaluate(lm, **CHOOSING)
    with sparse(model, SPARSE):
        expected = [[log_likelihood(model, tokenizer, text, choice) for choice in CHOICES] for text in TEXTS]
    dense = [[log_likelihood(model, tokenizer, text, choice) for choice in CHOICES] for text in TEXTS]
    samples = sorted(results["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-3, rtol=0)
    assert not torch.allclose(torch.tensor(found), torch.tensor(dense), atol=1e-2), "blocks were skipped"
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(sum(yes > no for yes, no in expected) / 3)

    assert sorted(lm.stats.layers) == list(range(LAYERS))
    assert all(len(layer.calls) == 6 and not layer.dense for layer in lm.stats.layers.values())
    assert 0.1 < lm.stats.density < 0.9
    assert results["config"]["sparse_prefill"] == {"strategy": str(SPARSE), "density": lm.stats.density, "dense": {}}


def test_answers_are_generated_after_a_sparse_prefill(evaluate, model, tokenizer):
    lm = SparseLM(model, SPARSE, tokenizer=tokenizer, batch_size=3)
    results = evaluate(
        lm,
        output_type="generate_until",
        doc_to_target="yes",
        generation_kwargs={"max_gen_toks": 5, "until": ["\n\n"], "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    with sparse(model, SPARSE), torch.no_grad():
        expected = []
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(f"{text}Is it?", add_special_tokens=False)])
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            expected.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
    samples = sorted(results["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == expected
    assert all(not layer.dense for layer in lm.stats.layers.values())
    assert lm.stats.density < 0.9


def test_the_model_is_dense_again_afterwards(evaluate, model, tokenizer):
    evaluate(SparseLM(model, SPARSE, tokenizer=tokenizer), **CHOOSING)
    with sp.record() as calls, torch.no_grad():
        model(torch.ones(1, 64, dtype=torch.long))
    assert calls == []


def test_a_warning_is_given_if_every_prompt_ran_dense(evaluate, model, tokenizer):
    lm = SparseLM(model, "flex_prefill", tokenizer=tokenizer)
    with pytest.warns(UserWarning, match=r"All prompts ran dense \(min_length\): if they are short"):
        results = evaluate(lm, **CHOOSING)
    assert results["config"]["sparse_prefill"]["dense"] == {"min_length": 6 * LAYERS}


def test_an_unknown_strategy_is_named_before_anything_runs(model, tokenizer):
    with pytest.raises(ValueError, match="Unknown strategy 'sparse'"):
        SparseLM(model, "sparse", tokenizer=tokenizer)


def test_models_are_loaded_from_folders(folder):
    lm = SparseLM(str(folder), SPARSE, device="cpu", dtype="float32")
    ids = lm.tok_encode(TEXTS[1])
    assert len(lm._loglikelihood_tokens([(("", ""), ids, ids[:4])], disable_tqdm=True)) == 1
    assert lm.stats.density < 1


def test_mixed_precision_gives_the_likelihoods_of_the_sparse_model_under_autocast(evaluate, model, tokenizer):
    lm = SparseLM(model, SPARSE, tokenizer=tokenizer, mixed_precision_dtype="bfloat16")
    results = evaluate(lm, **CHOOSING)
    with sparse(model, SPARSE), torch.autocast("cpu", torch.bfloat16):
        expected = [[log_likelihood(model, tokenizer, text, choice) for choice in CHOICES] for text in TEXTS]
    samples = sorted(results["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=0.02, rtol=0.01)
    assert 0.1 < lm.stats.density < 0.9
