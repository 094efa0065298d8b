"""A model that runs attention on given queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

import sparse_prefill as sp
from sparse_prefill.models.eval_model import EvalModel
from sparse_prefill.models.eval_model.interface import as_choice


class Replay(EvalModel):
    """For a text of n tokens, uses the tensors given for that length: one (q, k, v) for each layer."""

    name, device, dtype, max_tokens = "replay", torch.device("cpu"), torch.float32, 10**6

    def __init__(self, *texts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.texts = {layers[0][0].shape[2]: layers for layers in texts}
        q, k, _ = texts[0][0]
        self.layers, self.heads, self.kv_heads = len(texts[0]), q.shape[1], k.shape[1]
        self.outputs: list[Tensor] = []

    @property
    def ids(self) -> list[list[int]]:
        """Token ids for all texts; only their lengths matter."""
        return [[0] * length for length in self.texts]

    def prefill(self, strategy, tokens: Tensor) -> None:
        self.outputs = []
        for index, (q, k, v) in enumerate(self.texts[tokens.shape[1]]):
            bound = as_choice(strategy).for_layer(sp.Layer(index, self.layers))
            self.outputs.append(sp.sparse_attention(q, k, v, bound))

    def encode(self, text): ...
    def decode(self, ids): ...
    def chat(self, text): ...
    def generate(self, strategy, tokens, max_new_tokens): ...
    def _likelihood(self, strategy, tokens, last, at): ...
