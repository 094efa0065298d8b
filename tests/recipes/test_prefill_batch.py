"""The batch recipe end to end on a tiny GGUF file: answers, batches, interruption and resumption."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from tiny_gguf import write_gguf

import sparse_prefill as sp
from sparse_prefill.models.gguf import GGUFCheckpointer, gguf_decoder
from sparse_prefill.models.gguf.tokenizer import GGUFTokenizer
from sparse_prefill.models.torchtune import generate, sparsify

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "configs" / "prefill_batch.yaml"
STRATEGY = {"name": "flex_prefill", "gamma": 0.5, "tau": 0.0, "block_size": 16, "min_length": 0}
NEW = 6
TEXTS = {i: f"{i} weathered heathens, the other 12 " * n for i, n in zip("abcdef", (3, 1, 9, 5, 2, 7), strict=True)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("recipe") / "tiny.gguf")


@pytest.fixture(scope="module")
def tokenizer(path):
    return GGUFTokenizer(path)


@pytest.fixture(scope="module")
def single(path, tokenizer) -> dict[str, str]:
    """The answer to each prompt when it runs separately."""
    model = gguf_decoder(path).eval()
    model.load_state_dict(GGUFCheckpointer(path).load_checkpoint()["model"])
    model = sparsify(model, sp.get_strategy(**STRATEGY))
    found = {}
    for id_, text in TEXTS.items():
        tokens = torch.tensor([tokenizer.encode(text)])
        ids = generate(model, tokens, max_new_tokens=NEW, stop_tokens=tokenizer.stop_tokens).tokens[0].tolist()
        ends = [i for i, token in enumerate(ids) if token in tokenizer.stop_tokens]
        found[id_] = tokenizer.decode(ids[: ends[0]] if ends else ids)
    return found


@pytest.fixture
def job(path, tmp_path):
    """Input, output and arguments of a run."""
    job = Job(path, tmp_path / "prompts.jsonl", tmp_path / "out" / "answers.jsonl")
    job.ask([{"id": id_, "prompt": text} for id_, text in TEXTS.items()])
    return job


class Job:
    def __init__(self, path: Path, prompts: Path, output: Path) -> None:
        self.path, self.prompts, self.output = path, prompts, output
        self.config = CONFIG

    def ask(self, entries: list) -> None:
        self.prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def arguments(self, *overrides: str) -> list[str]:
        strategy = [f"strategy.{key}={value}" for key, value in STRATEGY.items()]
        shared = [f"path={self.path}", f"input={self.prompts}", f"output={self.output}", "dtype=fp32", "chat=False"]
        shared += [f"max_new_tokens={NEW}", "tokens_per_batch=600"]
        return ["--config", str(self.config), *shared, *strategy, *overrides]

    def run(self, monkeypatch, *overrides: str, stop_at: int | None = None) -> int:
        """Run the recipe in this process, interrupted in one of its batches; return its exit status."""
        spec = importlib.util.spec_from_file_location("prefill_batch", ROOT / "recipes" / "prefill_batch.py")
        recipe = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "prefill_batch", recipe)
        spec.loader.exec_module(recipe)
        self.batches: list[int] = []
        for name in ("generate", "generate_packed"):
            monkeypatch.setattr(recipe, name, self.counted(getattr(recipe, name), stop_at))
        monkeypatch.setattr(sys, "argv", ["prefill_batch.py", *self.arguments(*overrides)])
        with pytest.raises(SystemExit) as end:
            recipe.main()
        return end.value.code

    def refused(self, monkeypatch, capsys, *overrides: str) -> str:
        """The one line that a run is refused with."""
        capsys.readouterr()
        assert self.run(monkeypatch, *overrides) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefill_batch.py: ")]
        return line

    def counted(self, function, stop_at):
        def call(model, prompts, **options):
            if len(self.batches) == stop_at:
                raise KeyboardInterrupt
            self.batches.append(len(prompts))
            return function(model, prompts, **options)

        return call

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def answers(self) -> dict:
        lines = self.lines()
        assert len({line["id"] for line in lines}) == len(lines)
        return {line["id"]: line["answer"] for line in lines}


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_every_prompt_gets_the_answer_of_a_single_run(batching, job, single, tokenizer, monkeypatch):
    assert job.run(monkeypatch, f"batching={batching}") == 0
    assert job.answers() == single
    assert sum(job.batches) == len(TEXTS)
    assert 1 < len(job.batches) < len(TEXTS)
    for line in job.lines():
        assert list(line) == ["id", "answer", "prompt_tokens", "density", "seconds", "digest"]
        assert line["prompt_tokens"] == len(tokenizer.encode(TEXTS[line["id"]]))
        assert 0 < line["density"] <= 1
        assert line["seconds"] > 0
    assert [line["id"] for line in job.lines()] == ["c", "f", "d", "a", "e", "b"]  # longest first


def test_padded_and_packed_batches_have_equal_densities(job, monkeypatch):
    found = []
    for batching in ("packed", "padded"):
        job.output.unlink(missing_ok=True)
        job.run(monkeypatch, f"batching={batching}")
        found.append({line["id"]: line["density"] for line in job.lines()})
    assert found[0] == found[1]
    assert len(set(found[0].values())) > 3
    assert min(found[0].values()) < 0.8


def test_an_interrupted_run_is_resumed_without_loss_or_repetition(job, single, monkeypatch, capsys):
    assert job.run(monkeypatch, stop_at=1) == 130
    first = job.output.read_text()
    assert 0 < len(job.lines()) < len(TEXTS)
    assert job.run(monkeypatch, stop_at=0) == 130  # interrupted before the first batch
    assert job.output.read_text() == first

    with job.output.open("a") as file:
        file.write('{"id": "b", "answer": "half a li')
    left = len(TEXTS) - first.count("\n")
    assert job.run(monkeypatch) == 0
    assert sum(job.batches) == left
    assert job.output.read_text().startswith(first)
    assert job.answers() == single

    assert job.run(monkeypatch) == 0
    assert job.batches == []
    assert job.answers() == single


@pytest.mark.parametrize(
    "tail",
    [b"", b"\n", b"\0" * 40, b'{"id": "b", "answer": "sch\xc3', b'{"id": "b"\0\0\0', b'{"i'],
    ids=["none", "a line", "zeros", "half a character", "zeros after half a line", "the first letters"],
)
def test_a_broken_last_line_after_a_crash_loses_no_answer(tail, job, single, monkeypatch):
    job.run(monkeypatch)
    before = job.output.read_bytes()
    job.output.write_bytes((before[:-1] if tail in (b"", b"\0" * 40) else before) + tail)
    assert job.run(monkeypatch) == 0
    assert job.batches == []
    assert job.answers() == single
    assert job.output.read_bytes().replace(b"\n\n", b"\n") == before


@pytest.mark.parametrize(
    "content", [b"notes", b"notes\nand more", b'{"id": 1}', b'{"i', b"[1]", "schön\n".encode("latin-1")]
)
def test_a_file_without_answers_is_never_changed(content, job, monkeypatch, capsys):
    job.output.parent.mkdir()
    job.output.write_bytes(content)
    if content == b'{"i':  # may be the start of an answer
        job.run(monkeypatch, stop_at=0)
    else:
        assert "name another output" in job.refused(monkeypatch, capsys)
        assert job.output.read_bytes() == content


def test_a_changed_prompt_is_answered_again(job, single, monkeypatch):
    assert job.run(monkeypatch) == 0
    changed = TEXTS["d"].replace("12", "21")  # same number of tokens
    job.ask([{"id": id_, "prompt": changed if id_ == "d" else text} for id_, text in TEXTS.items()])
    assert job.run(monkeypatch, stop_at=0) == 130
    assert job.run(monkeypatch) == 0
    assert job.batches == [1]
    answers = job.answers()
    new = answers.pop("d")
    assert answers == {id_: answer for id_, answer in single.items() if id_ != "d"}
    job.output.unlink()
    assert job.run(monkeypatch) == 0
    assert job.answers()["d"] == new


def test_the_recipe_runs_as_a_script(job, single):
    command = [sys.executable, "recipes/prefill_batch.py", *job.arguments()]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "answers 6 prompts" in done.stderr
    assert job.answers() == single


def test_messages_use_the_chat_template_and_line_numbers_replace_missing_ids(job, tokenizer, monkeypatch):
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "12"}]
    messages.append({"role": "user", "content": "other"})
    job.ask([{"messages": messages}, {"id": "x", "prompt": "the"}])
    given = []
    chat = GGUFTokenizer.chat
    monkeypatch.setattr(
        GGUFTokenizer, "chat", lambda self, messages, answer: given.append(messages) or chat(self, messages)
    )
    job.run(monkeypatch, "chat=True", "system=short")
    system = {"role": "system", "content": "short"}
    assert given == [[system, *messages], [system, messages[0]]]
    assert set(job.answers()) == {1, "x"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], r"line 2: id must be .* no other line has, got 'a'"),
        ([{"id": 1.5, "prompt": "x"}], "line 1: id must be a text or a whole number"),
        ([{"id": "a"}], "line 1: give prompt or messages"),
        ([{"prompt": ""}], "line 1: prompt must be a text"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages must be objects with role and content"),
        (
            [{"messages": [{"role": "bot", "content": "x"}]}],
            "line 1: the role of a message must be one of system, user",
        ),
        ([{"prompt": "\ud83d"}], "line 1 isn't JSON: its JSON holds half of a surrogate pair"),
        ([[1]], "line 1 must be an object"),
        ([{"id": "long", "prompt": "1" * 600}], "the prompt 'long' has 600 tokens, and the model takes 506"),
    ],
)
def test_invalid_lines_are_refused_before_any_prompt_runs(entries, message, job, monkeypatch, capsys):
    job.ask(entries)
    assert re.search(message, job.refused(monkeypatch, capsys))
    assert not job.output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batching=rows"], "batching must be one of packed, padded, got 'rows'"),
        (["input=null"], "give input="),
        (["output=${input}"], "give input="),
        (["tokens_per_batch=0"], "tokens_per_batch must be a whole number, 1 or more"),
        (["max_new_tokens=0"], "max_new_tokens must be a whole number, 1 or more"),
        (["tokens_per_batc=3"], "unknown keys: tokens_per_batc"),
        (["~system"], "lacks the keys system"),
        (["input=nowhere.jsonl"], "There is no file of prompts at nowhere.jsonl"),
        (["input=."], "it is a folder"),
        (["output=/dev/null"], "is no regular file"),
        (["output=${input}/answers.jsonl"], "is a file, and no folder"),
        (["path=nowhere.gguf"], "There is no file 'nowhere.gguf'"),
        (["strategy.gama=3"], "has no option 'gama'"),
        (["model.width=3"], "model of the config can't be built: .*width"),
        (["strategy._component_=sparse_prefill.nothing"], "strategy|nothing"),
        (["dtype=fp3"], "fp3"),
        (["stray"], "'stray' isn't a setting: write KEY=VALUE"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message, job, monkeypatch, capsys):
    assert re.search(message, job.refused(monkeypatch, capsys, *settings))
    assert not job.output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": \n', "line 1 isn't JSON"),
        (b'{"prompt": "x", "prompt": "y"}', "line 1 isn't JSON: it gives the key 'prompt' twice"),
        ('{"prompt": "schön"}'.encode("latin-1"), "isn't text in UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "isn't text in UTF-8"),
    ],
)
def test_broken_inputs_are_refused_in_one_line(content, message, job, monkeypatch, capsys):
    job.prompts.write_bytes(content)
    assert message in job.refused(monkeypatch, capsys)


@pytest.mark.parametrize("content", [b"", b"[]", b"a: 1\na: 2", b"a: [", "# schön\na: 1".encode("latin-1"), b"1: 2"])
def test_broken_configs_are_refused_in_one_line(content, job, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_bytes(content)
    job.config = tmp_path / "config.yaml"
    assert re.search(r"config\.yaml is(n't a| no) config", job.refused(monkeypatch, capsys))


def test_a_byte_order_mark_is_skipped(job, single, monkeypatch):
    job.prompts.write_bytes(b"\xef\xbb\xbf" + job.prompts.read_bytes())
    assert job.run(monkeypatch) == 0
    assert job.answers() == single


@pytest.mark.parametrize("override", ["strategy.gamma=0.6", "max_new_tokens=5", "temperature=0.5", "dtype=bf16"])
def test_an_output_of_other_settings_is_refused(override, job, monkeypatch, capsys):
    job.run(monkeypatch)
    before = job.output.read_text()
    assert "none of these prompts as they are" in job.refused(monkeypatch, capsys, override)
    assert job.output.read_text() == before


def test_an_output_of_another_model_is_refused_and_one_of_a_moved_model_is_accepted(job, tmp_path, monkeypatch, capsys):
    job.run(monkeypatch)
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(job.path.read_bytes())
    assert job.run(monkeypatch, f"path={moved}", "batching=padded", "seed=5") == 0
    assert job.batches == []
    other = write_gguf(tmp_path / "other.gguf", quantization=GGMLQuantizationType.Q8_0)
    assert "none of these prompts as they are" in job.refused(monkeypatch, capsys, f"path={other}")


def test_an_output_of_other_prompts_is_refused(job, monkeypatch, capsys):
    job.run(monkeypatch)
    before = job.output.read_text()
    for prompts in ([{"id": "a", "prompt": "other"}], [{"id": i, "prompt": f"{i} other"} for i in TEXTS]):
        job.ask(prompts)
        assert "Name another output" in job.refused(monkeypatch, capsys)
        assert job.output.read_text() == before
    job.output.write_text('{"answer": 1}\n' + before)
    assert "line 1 isn't an answer" in job.refused(monkeypatch, capsys)
