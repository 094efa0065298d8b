"""A GGUF model to evaluate, through torchtune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.models.eval_model.interface import AnswerLikelihood, Choice, EvalModel, before_stop, check_text


class GGUFModel(EvalModel):
    """A decoder of torchtune with the weights and the tokenizer of a GGUF file."""

    def __init__(self, source: dict[str, Any], name: str, dtype: torch.dtype, device: torch.device) -> None:
        from torchtune.training import set_default_dtype

        from sparse_prefill.models import torchtune
        from sparse_prefill.models.gguf import GGUFCheckpointer, gguf_decoder
        from sparse_prefill.models.gguf.file import GGUFFile
        from sparse_prefill.models.gguf.tokenizer import GGUFTokenizer

        config = GGUFFile(**source).config
        self.name, self.dtype, self.device = name, dtype, device
        self.layers, self.heads, self.kv_heads = config.num_layers, config.num_heads, config.num_kv_heads
        self.max_tokens = config.max_seq_len
        with set_default_dtype(dtype), device:
            self.model = gguf_decoder(**source)
        self.vocab_size = self.model.tok_embeddings.num_embeddings
        self.model.load_state_dict(GGUFCheckpointer(**source, dtype=dtype).load_checkpoint()["model"])
        self.model.eval()
        self.tokenizer = GGUFTokenizer(**source)
        self._torchtune = torchtune

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(check_text(text), add_bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def chat(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(check_text(text))
        return self.tokenizer.chat([{"role": "user", "content": check_text(text)}])

    def prefill(self, strategy: Choice, tokens: Tensor) -> None:
        tokens = self.check(tokens)
        self._torchtune.prefill(self._torchtune.sparsify(self.model, strategy), tokens)

    def generate(self, strategy: Choice, tokens: Tensor, max_new_tokens: int) -> list[int]:
        tokens = self.check(tokens)
        self.check_room(tokens, max_new_tokens)
        model, stops = self._torchtune.sparsify(self.model, strategy), self.tokenizer.stop_tokens
        found = self._torchtune.generate(model, tokens, max_new_tokens=max_new_tokens, stop_tokens=stops).tokens[0]
        return before_stop(found.tolist(), stops)

    def _likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: list[int]) -> AnswerLikelihood:
        model = self._torchtune.sparsify(self.model, strategy)
        found = self._torchtune.likelihood(model, tokens, last=last)
        with torch.inference_mode():
            log_probs = model.output(found.hidden[:, at]).float().log_softmax(-1)
        return AnswerLikelihood(found.nll, found.greedy, log_probs)
