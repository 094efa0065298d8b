"""Answer a file of prompts in batches with sparse prefill, packed or padded: any torchtune decoder, any strategy.

python recipes/prefill_batch.py --config recipes/configs/prefill_batch.yaml input=prompts.jsonl output=answers.jsonl
PYTHONPATH=. tune run recipes/prefill_batch.py --config recipes/configs/prefill_batch.yaml input=prompts.jsonl

A line of the input is a JSON object with "prompt", a text, or "messages", a list of objects with "role" and "content",
and, if it should be known by more than the number of its line, an "id". A line of the output has "id", "answer",
"prompt_tokens", "density", the share of attention blocks that the prompt's prefill computed, and "seconds", the time
of the prompt's whole batch. It is written as soon as the batch is done. Lines come in the order of the batches,
the longest prompts first. Run again, the recipe goes on where it was interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import pad
from torchtune import config, training, utils
from torchtune.data import Message

import sparse_prefill as sp
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.models.torchtune import Generation, generate, generate_packed, sparsify
from sparse_prefill.packing import pack

BATCHING = ("packed", "padded")
INTERRUPTED = 130  # exit status, as shells have it


@dataclass(frozen=True)
class Question:
    """A prompt of the input, by its id."""

    id: str | int
    tokens: list[int]


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
        self._device = utils.get_device(device=cfg.device)
        self._dtype = training.get_dtype(dtype=cfg.dtype, device=self._device)
        self._logger = utils.get_logger(cfg.log_level)
        training.set_seed(seed=cfg.seed)
        # torchtune normalises in fp32 on purpose; torch notes that it has no fused kernel for that.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

    def setup(self, cfg: DictConfig) -> None:
        """Build the model and the tokenizer."""
        # 1. The model as torchtune builds it
        with training.set_default_dtype(self._dtype), self._device:
            model = config.instantiate(cfg.model)
        checkpoint = config.instantiate(cfg.checkpointer).load_checkpoint()
        model.load_state_dict(checkpoint[training.MODEL_KEY])

        # 2. Sparse prefill in every layer
        self._model = sparsify(model.eval(), config.instantiate(cfg.strategy))

        # 3. The tokenizer
        self._tokenizer = config.instantiate(cfg.tokenizer)
        self._stop_tokens = getattr(self._tokenizer, "stop_tokens", [self._tokenizer.eos_id])

    def answer(self, cfg: DictConfig) -> int:
        """Answer what the output doesn't answer yet; return the exit status."""
        # 1. All prompts, as tokens
        questions = self._questions(cfg)

        # 2. Those that are left from earlier runs
        output = Path(cfg.output)
        known = answered(output)
        self._check_known(known, questions, output)
        batches = self._batches([question for question in questions if question.id not in known], cfg)

        # 3. Batch by batch, a line for each prompt
        done = len(known)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        begin, tokens = time.perf_counter(), 0
        output.parent.mkdir(parents=True, exist_ok=True)
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

        # 4. What it took
        seconds = time.perf_counter() - begin
        speed = f", {tokens / seconds:.0f} prompt tokens/s" if tokens else ""
        self._logger.info(f"{output} answers {done} prompts; {seconds:.1f} s for {tokens} prompt tokens{speed}")
        return 0

    def _questions(self, cfg: DictConfig) -> list[Question]:
        """The prompts of the input; each must fit into the model."""
        found: dict[str | int, Question] = {}
        room = self._model.max_seq_len - cfg.max_new_tokens
        path = Path(cfg.input)
        for where, number, entry in read_objects(path, path.read_text(encoding="utf-8")):
            id_ = entry.get("id", number)
            if isinstance(id_, bool) or not isinstance(id_, (str, int)) or id_ in found:
                raise ValueError(f"{where}: id must be a text or a whole number that no other line has, got {id_!r}.")
            tokens = self._encode(where, entry, cfg)
            if len(tokens) > room:
                raise ValueError(
                    f"{where}: the prompt {id_!r} has {len(tokens)} tokens, and the model takes {room} in front of "
                    f"{cfg.max_new_tokens} new ones: shorten it, or leave it out."
                )
            found[id_] = Question(id_, tokens)
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
        if cfg.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": cfg.system}, *messages]
        chat = [Message(role=one["role"], content=one["content"]) for one in messages]
        chat.append(Message(role="assistant", content=""))
        return self._tokenizer({"messages": chat}, inference=True)["tokens"]

    def _check_known(self, known: dict[str | int, int], questions: list[Question], output: Path) -> None:
        """An output of other prompts would hide that these are unanswered."""
        lengths = {question.id: len(question.tokens) for question in questions}
        for id_, length in known.items():
            if lengths.get(id_) != length:
                asked = f"has {lengths[id_]} tokens here" if id_ in lengths else "the input doesn't have"
                raise ValueError(
                    f"{output} answers a prompt {id_!r} of {length} tokens, which {asked}: it is of other prompts or "
                    "another template. Name another output."
                )

    def _batches(self, questions: list[Question], cfg: DictConfig) -> list[list[Question]]:
        """Prompts of like length together, the longest first, so that what doesn't fit into memory fails at once."""
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
            }
            for question, ids, density in zip(batch, made.tokens.tolist(), densities, strict=True)
        ]

    # Either way of batching returns what was made, the prompt of the batch, and the row and the first token of each
    # question in it.

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
        for row, start in places:
            i = next(i for i, p in enumerate(pieces) if p.keys.start == start and p.rows.start in (None, row))
            own = [density[row] if len(density) > 1 else density[0] for density in by_call[i :: len(pieces)]]
            found.append(float(torch.stack(own).mean()))
        return found

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self._stop_tokens), len(ids))
        return ids[:end]


def read_objects(path: Path, text: str) -> list[tuple[str, int, dict[str, Any]]]:
    """The JSON objects of a file's lines: a name of the line for messages, its number from 1 on, and the object."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is no JSON: {error}.") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{where} must be an object, got {line[:40]!r}.")
            found.append((where, number, entry))
    return found


def answered(output: Path) -> dict[str | int, int]:
    """Ids that the output answers, with the tokens of their prompts. Half a line at its end is cut off."""
    if not output.exists():
        return {}
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found: dict[str | int, int] = {}
    for where, _, entry in read_objects(output, whole.decode()):
        known = {"id", "answer", "prompt_tokens"} <= entry.keys() and isinstance(entry["id"], (str, int))
        if not known or entry["id"] in found:
            raise ValueError(f"{where} is no answer, or the second one to its prompt: name another output.")
        found[entry["id"]] = entry["prompt_tokens"]
    if len(whole) < len(content):
        os.truncate(output, len(whole))
    return found


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


@config.parse
def main(cfg: DictConfig) -> int:
    config.log_config(recipe_name="PrefillBatchRecipe", cfg=cfg)
    recipe = PrefillBatchRecipe(cfg=cfg)
    recipe.setup(cfg=cfg)
    return recipe.answer(cfg=cfg)


if __name__ == "__main__":
    sys.exit(main())
