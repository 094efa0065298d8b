"""A model to evaluate from a folder of Hugging Face's format, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.models.eval_model.interface import (
    AnswerLikelihood,
    Choice,
    EvalModel,
    as_choice,
    before_stop,
    check_text,
)

MAX_POSITIONS_FP32 = 256  # positions whose logits are held in fp32 at once


class FolderModel(EvalModel):
    """A model and a tokenizer of transformers."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        from sparse_prefill.models import transformers

        self.model, self.tokenizer = _read_folder(path, dtype)
        self.model.eval().to(device)
        config = self.model.config.get_text_config()
        self.name, self.dtype, self.device = path.resolve().name, dtype, device
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        # Models without learned positions may still give the length that they were trained with.
        self.max_tokens = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        embeddings: Any = self.model.get_input_embeddings()
        self.vocab_size = embeddings.weight.shape[0]
        self._transformers = transformers

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(check_text(text), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(check_text(text))
        messages = [{"role": "user", "content": check_text(text)}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def prefill(self, strategy: Choice, tokens: Tensor) -> None:
        self._logits(strategy, self.check(tokens), 1)

    def generate(self, strategy: Choice, tokens: Tensor, max_new_tokens: int) -> list[int]:
        tokens, ends = self.check(tokens), self.model.generation_config.eos_token_id
        self.check_room(tokens, max_new_tokens)
        stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
        with self._transformers.sparse(self.model, as_choice(strategy), stats=False):
            found = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False
            )
        return before_stop(found[0, tokens.shape[1] :].tolist(), stops)

    def _likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: list[int]) -> AnswerLikelihood:
        logits, targets = self._logits(strategy, tokens[:, :-1], last), tokens[:, -last:]  # [1, last, v]
        nll, greedy = [], []
        for part, target in zip(logits.split(MAX_POSITIONS_FP32, 1), targets.split(MAX_POSITIONS_FP32, 1), strict=True):
            nll.append(F.cross_entropy(part[0].float(), target[0], reduction="none")[None])
            greedy.append(part.argmax(-1))
        return AnswerLikelihood(torch.cat(nll, 1), torch.cat(greedy, 1), logits[:, at].float().log_softmax(-1))

    def _logits(self, strategy: Choice, tokens: Tensor, last: int) -> Tensor:
        with torch.inference_mode(), self._transformers.sparse(self.model, as_choice(strategy), stats=False):
            return self.model(tokens, use_cache=False, logits_to_keep=last).logits


def _read_folder(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder; ValueError if one can't be read or the weights are incomplete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # safetensors, pickle, JSON and the checks of configs raise errors of many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} can't be loaded as a folder of Hugging Face's format: {reason}") from error
    # transformers gives such weights random values and goes on.
    for problem, keys in (("lack", info["missing_keys"]), ("have the wrong shape for", info["mismatched_keys"])):
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"The weights in {path} {problem} {shown}: complete the folder, or correct its config.json."
            )
    return model, tokenizer
