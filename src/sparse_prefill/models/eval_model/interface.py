"""The interface of a model to evaluate: encode, read, write, and look at its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.eval_model.layer_inputs import LayerInputs, Observer
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, get_strategy

Choice = Strategy | Plan | str
Visit = Callable[[int, Tensor, Tensor, Tensor, Prompt], None]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class AnswerLikelihood:
    """The likelihood of the last tokens of a text, computed inside one sparse prefill.

    Args:
        nll (Tensor): negative log-likelihood of each token in nats, given all tokens before it, fp32 [1, last].
        greedy (Tensor): the likeliest token at each place, int64 [1, last].
        log_probs (Tensor): log-probabilities of the whole vocabulary at the requested places, fp32 [1, places, v].
    """

    nll: Tensor
    greedy: Tensor
    log_probs: Tensor


class EvalModel(ABC):
    """A decoder with its tokenizer; :func:`load` makes one.

    Attributes:
        name (str): name of its file, folder or package.
        device (torch.device): device of its weights.
        dtype (torch.dtype): dtype of its weights.
        layers (int): number of layers.
        heads (int): query heads of a layer.
        kv_heads (int): key heads of a layer.
        max_tokens (int): the longest text that it takes, in tokens.
        vocab_size (int): number of token ids that it embeds.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    layers: int
    heads: int
    kv_heads: int
    max_tokens: int
    vocab_size: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Text to token ids, without tokens that begin or end a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, without special tokens."""

    @abstractmethod
    def chat(self, text: str) -> list[int]:
        """A user's message to token ids, up to the start of the answer; plain text if there is no chat template."""

    @abstractmethod
    def prefill(self, strategy: Choice, tokens: Tensor) -> None:
        """Prefill a prompt, int64 [1, s]; run it inside :func:`~sparse_prefill.record` to see its calls."""

    @abstractmethod
    def generate(self, strategy: Choice, tokens: Tensor, max_new_tokens: int) -> list[int]:
        """Continue a prompt, int64 [1, s], greedily: sparse prefill, then dense decoding up to a stop token."""

    def likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: Sequence[int] = ()) -> AnswerLikelihood:
        """The likelihood of the last tokens of a text, computed inside one sparse prefill.

        Args:
            strategy (Strategy | Plan | str): the attention of the prefill.
            tokens (Tensor): token ids, int64 [1, s].
            last (int): number of tokens to predict, at least 1 and fewer than s.
            at (Sequence[int]): places among the last tokens, from 0, whose log-probabilities are returned for the whole
                vocabulary. Default: none.

        Returns:
            AnswerLikelihood: the likelihood of each of the last tokens.

        Raises:
            ValueError: if tokens, last or the places don't fit each other or the model.
        """
        tokens = self.check(tokens)
        check_tokens("last", last, least=1)
        if last >= tokens.shape[1]:
            raise ValueError(f"last must leave a token to predict from, got last={last} of {tokens.shape[1]} tokens.")
        if outside := [place for place in at if not isinstance(place, int) or not 0 <= place < last]:
            raise ValueError(f"Places must be whole numbers in [0, {last - 1}], got {outside[0]}.")
        return self._likelihood(strategy, tokens, last, list(at))

    def capture(self, tokens: Tensor, visit: Visit, every: int = 1) -> None:
        """Pass the queries, keys and values of a dense run to a function, one layer after the other.

        Args:
            tokens (Tensor): token ids, int64 [1, s].
            visit (Callable): called as ``visit(layer, q, k, v, prompt)``. q is [1, Hq, s, D] and contains the scale of
                the logits, k is [1, Hkv, s, D] and v [1, Hkv, s, Dv]; the prompt has the layer's sliding window. The
                tensors are freed after the call unless it keeps them.
            every (int): visit one layer in this many, from the first on. Default: 1.
        """
        check_tokens("every", every, least=1)

        def look(inputs: LayerInputs) -> None:
            visit(inputs.layer, inputs.q, inputs.k, inputs.v, inputs.prompt)

        self.prefill(Observer(of=get_strategy("dense"), look=look, every=every), tokens)

    @abstractmethod
    def _likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: list[int]) -> AnswerLikelihood: ...

    def check(self, tokens: Tensor) -> Tensor:
        """Token ids [1, s] as int64 on the model's device; ValueError if the model can't take them."""
        if not isinstance(tokens, Tensor):
            raise ValueError(f"tokens must be a tensor of whole numbers [1, tokens], got a {type(tokens).__name__}.")
        if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0 or tokens.dtype not in INTEGERS:
            raise ValueError(f"tokens must be whole numbers [1, tokens], got {tokens.dtype} {list(tokens.shape)}.")
        if tokens.shape[1] > self.max_tokens:
            raise ValueError(f"{self.name} takes {self.max_tokens} tokens, got {tokens.shape[1]}: shorten the text.")
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= self.vocab_size:
            wrong = least if least < 0 else most
            raise ValueError(
                f"Token ids of {self.name} lie in [0, {self.vocab_size - 1}], got {wrong}: encode texts with its own "
                "tokenizer."
            )
        return tokens.to(self.device, torch.int64)

    def check_room(self, tokens: Tensor, max_new_tokens: int) -> None:
        """Raise ValueError unless the prompt and its continuation fit into the model."""
        check_tokens("max_new_tokens", max_new_tokens, least=1)
        if tokens.shape[1] + max_new_tokens > self.max_tokens:
            raise ValueError(
                f"A prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones don't fit into the model's "
                f"{self.max_tokens}: shorten the prompt or ask for fewer."
            )


def as_choice(strategy: Choice) -> Strategy | Plan:
    """A strategy by its name; strategies and plans as they are."""
    return get_strategy(strategy) if isinstance(strategy, str) else strategy


def check_text(text: str) -> str:
    """The text; ValueError if it isn't a string, or holds half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(text, str):
        raise ValueError(f"A text must be a string, got a {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The text isn't Unicode: {error.reason} at {error.start}. Replace that character.") from None
    return text


def before_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids up to the first of the stop tokens."""
    end = next((place for place, one in enumerate(ids) if one in stops), len(ids))
    return ids[:end]
