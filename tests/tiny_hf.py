"""Writes a small folder of Hugging Face's format: a random Llama with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_gguf import CHATML, CONTEXT, CONTROL, EMBED, FFN, HEADS, KV_HEADS, LAYERS, MERGES, TOKENS


def write_folder(path: Path) -> Path:
    """Write a model of two layers and its tokenizer; weights are the same each time."""
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(TOKENS)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=CONTROL[0], eos_token=CONTROL[1], chat_template=CHATML
    ).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=EMBED,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=TOKENS.index(CONTROL[0]),
        eos_token_id=TOKENS.index(CONTROL[1]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path
