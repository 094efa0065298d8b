"""Writes a small folder in Hugging Face's format: a random Llama or Gemma 3 with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.tiny_gguf import CHATML, CONTEXT, CONTROL, EMBED, FFN, HEADS, KV_HEADS, LAYERS, MERGES, TOKENS


def write_folder(path: Path, window: int | None = None) -> Path:
    """Write a model of two layers and its tokenizer; weights are the same each time.

    With a window, the model is a Gemma 3 whose first layer has a sliding window and whose second has full attention.
    """
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(TOKENS)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=CONTROL[0], eos_token=CONTROL[1], chat_template=CHATML
    ).save_pretrained(path)
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": EMBED,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": TOKENS.index(CONTROL[0]),
        "eos_token_id": TOKENS.index(CONTROL[1]),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if window is None:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            dim = EMBED // HEADS
            types = ["sliding_attention", "full_attention"]
            windows = {"sliding_window": window, "layer_types": types, "head_dim": dim, "query_pre_attn_scalar": dim}
            model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **windows))
        model.save_pretrained(path)
    return path
