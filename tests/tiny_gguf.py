"""Writes small GGUF files with random weights and a byte-level vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ċ", "Ġ"), ("Ġ", "Ġ"), ("1", "2")]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|eot|>"]
TOKENS = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES), *CONTROL, "<think>"]
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ bos_token + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
EMBED, FFN, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 512


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    tied: bool = True,
    pre: str = "smollm",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write a model of two layers. ``fields`` and ``tensors`` replace or add to its own; a field of None is omitted."""
    writer = GGUFWriter(path, architecture)
    values = {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": CONTEXT,
        f"{architecture}.embedding_length": EMBED,
        f"{architecture}.feed_forward_length": FFN,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 50_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3 if t in CONTROL else 4 if t == "<think>" else 1 for t in TOKENS],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": TOKENS.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": TOKENS.index("<|im_end|>"),
        "tokenizer.ggml.eot_token_id": TOKENS.index("<|eot|>"),
        "tokenizer.chat_template": CHATML,
    }
    for name, value in (values | (fields or {})).items():
        if value is None:
            continue
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(name, value)
    for name, array in (_weights(architecture, tied) | (tensors or {})).items():
        if array.ndim == 2:
            writer.add_tensor(name, quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(architecture: str, tied: bool) -> dict[str, np.ndarray]:
    """Random weights, with queries and keys large enough for attention to be sharp."""
    random = np.random.default_rng(0)

    def matrix(out: int, width: int, scale: float = 1.0) -> np.ndarray:
        return (scale * random.standard_normal((out, width)) / width**0.5).astype(np.float32)

    def vector(size: int, mean: float = 0.0) -> np.ndarray:
        return (mean + 0.2 * random.standard_normal(size)).astype(np.float32)

    kv = EMBED // HEADS * KV_HEADS
    weights = {"token_embd.weight": matrix(len(TOKENS), EMBED), "output_norm.weight": vector(EMBED, 1.0)}
    if not tied:
        weights["output.weight"] = matrix(len(TOKENS), EMBED)
    for i in range(LAYERS):
        weights |= {
            f"blk.{i}.attn_norm.weight": vector(EMBED, 1.0),
            f"blk.{i}.attn_q.weight": matrix(EMBED, EMBED, 2.0),
            f"blk.{i}.attn_k.weight": matrix(kv, EMBED, 2.0),
            f"blk.{i}.attn_v.weight": matrix(kv, EMBED),
            f"blk.{i}.attn_output.weight": matrix(EMBED, EMBED),
            f"blk.{i}.ffn_norm.weight": vector(EMBED, 1.0),
            f"blk.{i}.ffn_gate.weight": matrix(FFN, EMBED),
            f"blk.{i}.ffn_up.weight": matrix(FFN, EMBED),
            f"blk.{i}.ffn_down.weight": matrix(EMBED, FFN),
        }
        if architecture == "qwen2":
            for name, size in (("q", EMBED), ("k", kv), ("v", kv)):
                weights[f"blk.{i}.attn_{name}.bias"] = vector(size)
    return weights
