"""Scores of tasks, compared with counts by hand, and the conditions under which tasks are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill import tasks
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.run_tasks import measure_tasks
from sparse_prefill.models.eval_model import EvalModel, load
from sparse_prefill.plan import with_options
from sparse_prefill.strategy import to_config
from tests.tiny_gguf import HEADS, KV_HEADS, LAYERS, write_gguf

SPARSE = sp.get_strategy("a_shape", sink=16, local=32, block_size=16)
# Computes the last rows densely; tests use it directly, in a plan and in a wrapper.
GENEROUS = sp.get_strategy("tri_shape", sink=16, local=32, last=64, block_size=16)


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> EvalModel:
    path = tmp_path_factory.mktemp("tasks") / "tiny.gguf"
    return load(write_gguf(path, fields={"llama.context_length": 4096}))


def make(subject: EvalModel, name: str = "niah_multiquery", length: int = 1600, **options) -> tasks.Task:
    return tasks.make(name, length=length, encode=subject.encode, **options)


def answers(expected: list[str], any_answer: bool = False) -> tasks.Task:
    plain = {"name": "x", "length": 9, "index": 0, "seed": 0, "depth": None, "text": "", "prefix": "", "prompt": ()}
    return tasks.Task(**plain, answers=tuple(expected), any_answer=any_answer, answer=(), spans=(), max_new_tokens=9)


@pytest.mark.parametrize(
    ("expected", "any_answer", "text", "score"),
    [
        (["Ab1", "cd2"], False, "is aB1 and CD2.", 1.0),
        (["Ab1", "cd2", "ef3", "gh4"], False, "cd2 gh", 0.25),
        (["Ab1", "cd2"], False, "", 0.0),
        (["Ab1", "cd2"], True, "only cD2", 1.0),
        (["Ab1", "cd2"], True, "cd", 0.0),
    ],
)
def test_containment_is_the_share_of_answers_ignoring_case(expected, any_answer, text, score):
    assert tasks.containment(answers(expected, any_answer), text) == score


def test_answers_are_scored_within_the_sparse_prefill(subject):
    task = make(subject)
    (result,) = tasks.score(subject, SPARSE, [task], generate=False)
    assert {key: result[key] for key in ("task", "length", "index", "seed", "depth", "strategy")} == {
        "task": "niah_multiquery", "length": 1600, "index": 0, "seed": 42, "depth": task.depth, "strategy": "a_shape"
    }  # fmt: skip

    # By hand: only the values, without the commas between them. min_length=0, as so few tokens would run dense.
    tokens = torch.tensor([[*task.prompt, *task.answer]])
    with sp.record() as calls:
        found = subject.likelihood(replace(SPARSE, min_length=0), tokens, len(task.answer))
    assert [call.dense for call in calls] == [None] * LAYERS
    assert result["density"] == pytest.approx(sum(float(call.density.mean()) for call in calls) / LAYERS)
    assert result["density"] < 0.2
    places = [i for span in task.spans for i in span]
    assert len(places) == len(task.answer) - 3
    assert result["nll"] == pytest.approx(float(found.nll[0, places].mean()))
    assert result["exact"] == 0
    (dense,) = tasks.score(subject, "dense", [task], generate=False)
    assert dense["density"] == 1
    assert dense["nll"] != pytest.approx(result["nll"], abs=1e-3)


@pytest.mark.parametrize("strategy", [GENEROUS, sp.Plan(default=GENEROUS), sp.get_strategy("gqa_union", of=GENEROUS)])
def test_dense_last_rows_are_turned_off(subject, strategy):
    task = make(subject)
    (generous,) = tasks.score(subject, strategy, [task], generate=False)
    (strict,) = tasks.score(subject, replace(GENEROUS, last=0), [task], generate=False)
    assert (generous["nll"], generous["density"]) == (strict["nll"], strict["density"])


def test_options_change_within_wrappers_and_other_options_stay():
    wrapped = sp.get_strategy("by_head", of=GENEROUS, heads={1: SPARSE, 2: sp.get_strategy("dense", block_size=16)})
    new = with_options(wrapped, last=0, min_length=7)
    before, after = to_config(wrapped), to_config(new)
    before["of"] |= {"last": 0, "min_length": 7}
    for one in before["heads"].values():
        one |= {"last": 0, "min_length": 7}
    assert after == before
    assert wrapped.of.last == 64


@dataclass
class PartlyRight:
    """A model whose greedy tokens are right for every second answer, and which generates the first answer."""

    task: tasks.Task
    device = torch.device("cpu")

    def likelihood(self, strategy, tokens, last):
        q, k = torch.randn(1, HEADS, tokens.shape[1], 16), torch.randn(1, KV_HEADS, tokens.shape[1], 16)
        sp.sparse_attention(q, k, k, strategy)
        greedy = tokens[:, -last:].clone()
        for span in self.task.spans[1::2]:
            greedy[0, span[-1]] += 1
        nll = torch.full((1, last), 9.0)
        for i, span in enumerate(self.task.spans):
            nll[0, span.start : span.stop] = float(i)
        return type("Reading", (), {"nll": nll, "greedy": greedy})

    def generate(self, strategy, tokens, max_new_tokens):
        assert tokens.tolist() == [list(self.task.prompt)]
        assert max_new_tokens == self.task.max_new_tokens
        assert strategy.last == 64, "generation uses the strategy as given"
        return list(self.task.answer[: self.task.spans[0].stop])

    def decode(self, ids):
        return bytes(ids).decode().upper()


@pytest.mark.parametrize("name", ["niah_multivalue", "vt", "qa_1"])
def test_exact_and_accuracy_are_shares_of_the_answers(name):
    task = tasks.make(name, length=4000, encode=lambda text: list(text.encode()))
    (result,) = tasks.score(PartlyRight(task), GENEROUS, [task])
    count = len(task.spans)
    assert result["exact"] == {4: 2 / 4, 5: 3 / 5, 1: 1}[count]
    tokens = [i for i, span in enumerate(task.spans) for _ in span]
    assert result["nll"] == pytest.approx(sum(tokens) / len(tokens))
    assert result["accuracy"] == (1 if name == "qa_1" else 1 / count)
    assert result["text"] == f" {task.answers[0]}".upper()


def test_results_are_yielded_one_by_one(subject):
    def endless():
        yield make(subject, "niah_single_1", 1300)
        raise KeyboardInterrupt

    results = tasks.score(subject, SPARSE, endless(), generate=False)
    assert next(results)["task"] == "niah_single_1"
    with pytest.raises(KeyboardInterrupt):
        next(results)


def test_generated_answers_are_scored(subject):
    (result,) = tasks.score(subject, SPARSE, [replace(make(subject, "niah_single_1", 1300), max_new_tokens=3)])
    assert result["accuracy"] == 0
    assert isinstance(result["text"], str)


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_of_an_evaluation_use_the_chat_template_or_plain_text(subject, tmp_path, chat):
    results = Results(tmp_path / "tasks.json", {}, {})
    options = {"lengths": [1300], "generate": False, "chat": chat}
    assert measure_tasks(subject, {"window": SPARSE}, ["niah_single_1"], results, **options) == {}
    task = tasks.make("niah_single_1", length=1300, encode=subject.encode, chat=subject.chat if chat else None)
    (expected,) = tasks.score(subject, SPARSE, [task], generate=False)
    (found,) = (one for one in results.content["tasks"]["results"] if one["strategy"] == "window")
    assert found["nll"] == expected["nll"]


def test_prompts_that_cannot_run_sparse_are_refused(subject):
    task = replace(make(subject, "niah_single_1", 1300), prompt=(5,))
    with pytest.raises(ValueError, match=r"niah_single_1 ran dense \(one block\): take longer prompts"):
        list(tasks.score(subject, "a_shape", [task], generate=False))


def test_prompts_longer_than_the_model_allows_are_refused(subject):
    with pytest.raises(ValueError, match="takes 4096 tokens"):
        list(tasks.score(subject, SPARSE, [make(subject, length=5000)], generate=False))


def test_predictions_that_are_nan_are_refused():
    task = tasks.make("vt", length=4000, encode=lambda text: list(text.encode()))
    model = PartlyRight(task)
    likelihood = model.likelihood

    def broken(*args, **options):
        found = likelihood(*args, **options)
        found.nll[0, 1] = float("nan")
        return found

    model.likelihood = broken
    with pytest.raises(ValueError, match="aren't finite: try another dtype"):
        list(tasks.score(model, GENEROUS, [task], generate=False))


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        ([], {"lengths": [1300]}, r"at least one task and one length, got \[\]"),
        (["vt"], {"lengths": []}, r"at least one task and one length, got \['vt'\] and \[\]"),
        (["vt"], {"lengths": [1300], "samples": 0}, "samples must be"),
    ],
)
def test_an_evaluation_without_tasks_lengths_or_samples_is_refused(subject, tmp_path, names, options, match):
    with pytest.raises(ValueError, match=match):
        measure_tasks(subject, {}, names, Results(tmp_path / "tasks.json", {}, {}), **options)


def row(task: str, strategy: str, accuracy: float | None, nll: float = 1.0, length: int = 2048) -> dict:
    scores = {"nll": nll, "exact": 0.5, "density": 0.25} | ({} if accuracy is None else {"accuracy": accuracy})
    return {"task": task, "length": length, "strategy": strategy, **scores}


def test_the_summary_includes_dense_scores_and_marks_tasks_beyond_the_model():
    results = [
        *(row("vt", "dense", 0.4), row("vt", "dense", 0.5), row("vt", "a_shape", 1.0)),
        *(row("qa_1", "a_shape", 0.25, nll=2.0), row("qa_1", "a_shape", 0.75, nll=3.0), row("qa_1", "dense", 0.5)),
    ]
    rows = {(one["task"], one["strategy"]): one for one in tasks.summary(results)}
    assert rows["qa_1", "a_shape"] == {
        "task": "qa_1", "length": 2048, "strategy": "a_shape", "samples": 2, "accuracy": 0.5, "exact": 0.5, "nll": 2.5,
        "density": 0.25, "dense_accuracy": 0.5, "dense_exact": 0.5,
        "beyond_model": False,
    }  # fmt: skip
    assert rows["vt", "a_shape"]["dense_accuracy"] == pytest.approx(0.45)
    assert rows["vt", "a_shape"]["beyond_model"] is True
    assert rows["vt", "dense"]["beyond_model"] is True


def test_without_generation_dense_exact_matches_decide_what_is_beyond_the_model():
    (silent,) = tasks.summary([row("vt", "dense", None)])
    assert silent["accuracy"] is silent["dense_accuracy"] is None
    assert (silent["dense_exact"], silent["beyond_model"]) == (0.5, False)
    (wrong,) = tasks.summary([row("vt", "dense", None) | {"exact": 0.4}])
    assert wrong["beyond_model"] is True


def test_a_summary_without_dense_results_is_refused():
    with pytest.raises(ValueError, match="no dense results of vt at 4096 tokens: score 'dense' as well"):
        tasks.summary([row("vt", "dense", 1.0), row("vt", "a_shape", 1.0, length=4096)])
