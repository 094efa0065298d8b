"""Answer a file of prompts with sparse prefill in packed or padded batches: any torchtune decoder, any strategy.

python recipes/prefill_batch.py --config recipes/configs/prefill_batch.yaml input=prompts.jsonl output=answers.jsonl
PYTHONPATH=. tune run recipes/prefill_batch.py --config recipes/configs/prefill_batch.yaml input=prompts.jsonl

A line of the input is a JSON object with "prompt", a text, or "messages", a list of objects with "role" and "content",
and with an optional "id"; the default is the number of the line. A line of the output has "id", "answer",
"prompt_tokens", "density", the share of attention blocks that the prompt's prefill computed, "seconds", the time of the
prompt's whole batch, and "digest", of what the answer depends on: the prompt's tokens, the model's weights, the
strategy and the settings of sampling. Lines are written as soon as their batch is done, the longest prompts first. A
second run goes on where the first one was interrupted, and answers prompts that have changed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import pad
from torchtune import config
from torchtune.data import Message, Role
from torchtune.modules import TransformerDecoder

import sparse_prefill as sp
from sparse_prefill.cli.answer_file import Answer, answered, keep_lines, read_objects
from sparse_prefill.cli.recipe import DECODER, SAMPLING, START, build, check_sampling, load_decoder, parse, start
from sparse_prefill.core.files import check_output, read_text
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.models.torchtune import Generation, generate, generate_packed, sparsify
from sparse_prefill.packing import pack

FILES = ("input", "output", "system", "chat")
KEYS = {*DECODER, *START, *SAMPLING, "strategy", *FILES, "batching", "tokens_per_batch"}
BATCHING = ("packed", "padded")
INTERRUPTED = 130  # exit status, as shells have it


@dataclass(frozen=True)
class Question:
    """A prompt of the input."""

    id: str | int
    tokens: list[int]
    digest: str  # of the tokens and of the run's settings, by which a later run knows that the answer is still right


class PrefillBatchRecipe:
    """Loads a model, gives it sparse prefill, and answers the prompts of a file on one device.

    Args:
        cfg (DictConfig): see ``recipes/configs/prefill_batch.yaml``.

    Raises:
        ValueError: if ``batching`` is unknown, or input or output isn't named.
    """

    def __init__(self, cfg: DictConfig) -> None:
        if cfg.batching not in BATCHING:
            raise ValueError(f"batching must be one of {', '.join(BATCHING)}, got {cfg.batching!r}.")
        if not cfg.input or not cfg.output or Path(cfg.input).resolve() == Path(cfg.output).resolve():
            raise ValueError("There is nothing to answer, or no place for it: give input=... and another output=...")
        check_tokens("tokens_per_batch", cfg.tokens_per_batch, least=1)
        check_sampling(cfg)
        self._output = check_output(cfg.output, [cfg.input])
        self._device, self._logger = start(cfg)

    def setup(self, cfg: DictConfig) -> None:
        """Build the model and the tokenizer."""
        strategy = build(cfg, "strategy")
        model, self._tokenizer, self._stop_tokens = load_decoder(cfg)
        self._settings = [weights_digest(model), repr(strategy), self._stop_tokens, *sampling(cfg)]
        self._model = sparsify(model, strategy)  # sparse prefill in every layer

    def answer(self, cfg: DictConfig) -> int:
        """Answer the prompts that the output doesn't answer yet; return the exit status."""
        # 1. All prompts, as tokens
        questions = self._questions(cfg)

        # 2. Prompts without an answer of an earlier run
        output = self._output
        known = self._still_right(answered(output), questions, output)
        batches = self._batches([question for question in questions if question.id not in known], cfg)

        # 3. Batch by batch, a line for each prompt
        done = len(known)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        begin, tokens = time.perf_counter(), 0
        output.parent.mkdir(parents=True, exist_ok=True)
        keep_lines(output, [answer.line for answer in known.values()])
        with (
            output.open("a", encoding="utf-8") as lines,
            Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
        ):
            task = progress.add_task("prompts", completed=done, total=len(questions))
            try:
                for batch in batches:
                    lines.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._run(batch, cfg)))
                    lines.flush()
                    done += len(batch)
                    tokens += sum(len(question.tokens) for question in batch)
                    progress.update(task, completed=done)
            except KeyboardInterrupt:
                progress.stop()
                self._logger.info(
                    f"Interrupted: {output} answers {done} of {len(questions)} prompts. Run again to go on."
                )
                return INTERRUPTED

        # 4. Time and speed
        seconds = time.perf_counter() - begin
        speed = f", {tokens / seconds:.0f} prompt tokens/s" if tokens else ""
        self._logger.info(f"{output} answers {done} prompts; {seconds:.1f} s for {tokens} prompt tokens{speed}")
        return 0

    def _questions(self, cfg: DictConfig) -> list[Question]:
        """The prompts of the input; each must fit into the model."""
        found: dict[str | int, Question] = {}
        room = self._model.max_seq_len - cfg.max_new_tokens
        path = Path(cfg.input)
        for where, number, entry, _ in read_objects(path, read_text(path, "file of prompts")):
            id_ = entry.get("id", number)
            if isinstance(id_, bool) or not isinstance(id_, (str, int)) or id_ in found:
                raise ValueError(f"{where}: id must be a text or a whole number that no other line has, got {id_!r}.")
            try:
                tokens = self._encode(where, entry, cfg)
            except ValueError as error:  # also of the template, which doesn't know the line
                raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
            if len(tokens) > room:
                raise ValueError(
                    f"{where}: the prompt {id_!r} has {len(tokens)} tokens, and the model takes {room} in front of "
                    f"{cfg.max_new_tokens} new ones: shorten it, or leave it out."
                )
            found[id_] = Question(id_, tokens, digest_of([tokens, *self._settings]))
        return list(found.values())

    def _encode(self, where: str, entry: dict[str, Any], cfg: DictConfig) -> list[int]:
        text, messages = entry.get("prompt"), entry.get("messages")
        if (text is None) == (messages is None):
            raise ValueError(f"{where}: give prompt or messages, one of them.")
        if messages is None:
            if not isinstance(text, str) or not text:
                raise ValueError(f"{where}: prompt must be a text, got {text!r}.")
            if not cfg.chat:
                return self._tokenizer.encode(text, add_bos=True, add_eos=False)
            messages = [{"role": "user", "content": text}]
        if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
            raise ValueError(f"{where}: messages must be objects with role and content, both texts, got {messages!r}.")
        for one in messages:
            if one["role"] not in get_args(Role):
                roles = ", ".join(get_args(Role))
                raise ValueError(f"{where}: the role of a message must be one of {roles}, got {one['role']!r}.")
        if cfg.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": cfg.system}, *messages]
        chat = [Message(role=one["role"], content=one["content"]) for one in messages]
        chat.append(Message(role="assistant", content=""))
        return self._tokenizer({"messages": chat}, inference=True)["tokens"]

    def _still_right(
        self, known: dict[str | int, Answer], questions: list[Question], output: Path
    ) -> dict[str | int, Answer]:
        """The answers that this run would give, too. An output of other prompts or settings is refused, and stays."""
        asked = {question.id: question.digest for question in questions}
        right = {id_: answer for id_, answer in known.items() if asked.get(id_) == answer.digest}
        gone = [id_ for id_ in known if id_ not in asked]
        if gone or (known and not right):
            what = (
                f"a prompt {gone[0]!r}, which the input doesn't have" if gone else "none of these prompts as they are"
            )
            raise ValueError(
                f"{output} answers {what}: it was written for other prompts, or with another template, model, strategy "
                "or sampling. Name another output, or delete it."
            )
        if changed := len(known) - len(right):
            self._logger.info(f"{changed} prompts have changed since {output} answered them, and are answered again.")
        return right

    def _batches(self, questions: list[Question], cfg: DictConfig) -> list[list[Question]]:
        """Batches of prompts of similar length, the longest first, so that too large a batch fails at once."""
        batches: list[list[Question]] = []
        for question in sorted(questions, key=lambda question: -len(question.tokens)):
            if batches and self._fits([*batches[-1], question], cfg):
                batches[-1].append(question)
            else:
                batches.append([question])
        return batches

    def _fits(self, batch: list[Question], cfg: DictConfig) -> bool:
        slots = len(batch) * (len(batch[0].tokens) + cfg.max_new_tokens)  # of the cache, which decoding pads
        one_row = sum(len(question.tokens) for question in batch) <= self._model.max_seq_len
        return slots <= cfg.tokens_per_batch and (one_row or cfg.batching == "padded")

    def _run(self, batch: list[Question], cfg: DictConfig) -> list[dict[str, Any]]:
        """Lines of the output for one batch."""
        # 1. One sparse prefill, then token by token
        options = {
            "max_new_tokens": cfg.max_new_tokens,
            "stop_tokens": self._stop_tokens,
            "temperature": cfg.temperature,
            "top_k": cfg.top_k,
        }
        with sp.record() as calls:
            if cfg.batching == "packed":
                made, layout, places = self._packed(batch, options)
            else:
                made, layout, places = self._padded(batch, options)

        # 2. Tokens to text
        densities = self._densities(calls, layout, places)
        seconds = round(made.prefill_seconds + made.decode_seconds, 3)
        return [
            {
                "id": question.id,
                "answer": self._tokenizer.decode(self._until_stop(ids)),
                "prompt_tokens": len(question.tokens),
                "density": round(density, 4),
                "seconds": seconds,
                "digest": question.digest,
            }
            for question, ids, density in zip(batch, made.tokens.tolist(), densities, strict=True)
        ]

    # Both ways of batching return the generation, the prompt of the batch, and the row and the first token of each
    # question.

    def _packed(self, batch: list[Question], options: dict[str, Any]) -> tuple[Generation, sp.Prompt, list]:
        prompts = [question.tokens for question in batch]
        capacity = sum(map(len, prompts))  # one row, and no padding
        packed = pack(prompts, capacity=capacity)
        made = generate_packed(self._model, prompts, capacity=capacity, **options)
        return made, packed.prompt(), list(zip(packed.rows.tolist(), packed.starts.tolist(), strict=True))

    def _padded(self, batch: list[Question], options: dict[str, Any]) -> tuple[Generation, sp.Prompt, list]:
        longest = len(batch[0].tokens)
        padding = [longest - len(question.tokens) for question in batch]
        rows = [pad(torch.tensor(q.tokens), (n, 0)) for q, n in zip(batch, padding, strict=True)]
        made = generate(self._model, torch.stack(rows).to(self._device), left_padding=padding, **options)
        return made, sp.Prompt(longest, left_padding=padding), list(enumerate(padding))

    def _densities(self, calls: list[sp.Call], layout: sp.Prompt, places: Sequence[tuple[int, int]]) -> list[float]:
        """Share of the visible blocks that the prefill computed, for the question at each row and first token."""
        pieces = layout.split_sequences()  # each layer makes a call for each of them, in their order
        layers = len(self._model.layers)
        by_call = [call.density.mean(-1) for call in calls[: layers * len(pieces)]]  # of its rows
        found = []
        for row, first in places:
            i = next(i for i, p in enumerate(pieces) if p.keys.start == first and p.rows.start in (None, row))
            own = [density[row] if len(density) > 1 else density[0] for density in by_call[i :: len(pieces)]]
            found.append(float(torch.stack(own).mean()))
        return found

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self._stop_tokens), len(ids))
        return ids[:end]


def sampling(cfg: DictConfig) -> list[Any]:
    """The settings of sampling that change an answer."""
    return [cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.seed if cfg.temperature else None]


def weights_digest(model: TransformerDecoder) -> str:
    """A digest of the first 64 values of each parameter and buffer: of the model, wherever its file is."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return digest_of([[name, str(x.dtype), x.detach().flatten()[:64].tolist()] for name, x in tensors])


def digest_of(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


@parse(KEYS)
def main(cfg: DictConfig) -> int:
    config.log_config(recipe_name="PrefillBatchRecipe", cfg=cfg)
    recipe = PrefillBatchRecipe(cfg=cfg)
    recipe.setup(cfg=cfg)
    return recipe.answer(cfg=cfg)


if __name__ == "__main__":
    main()
