"""Small random torchtune decoders, the strategies and the inputs of the tests that run them."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torchtune.generation import generate as stock_generate
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import local_kv_cache

import sparse_prefill as sp
from sparse_prefill.models.torchtune import (
    LastTokenDecoder,
)

SIZES = {
    "vocab_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 256,
}
LLAMA = SIZES | {"scale_factor": 1}
LORA = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "lora_rank": 4, "lora_alpha": 8}
LENGTH, NEW = 203, 8
TOKENS = torch.randint(1, 128, (1, LENGTH), generator=torch.Generator().manual_seed(3))

EVERYTHING = sp.get_strategy("flex_prefill", gamma=1.0, tau=0.0, block_size=16, min_length=0)
HALF = sp.get_strategy("flex_prefill", gamma=0.5, tau=0.0, block_size=16, min_length=0)
DENSE = sp.get_strategy("dense", block_size=16)
SMALL = {"block_size": 16, "min_length": 0, "sink": 16, "local": 16}
FLASH = sp.get_strategy("flash_prefill", alpha=0.5, last=40, **SMALL)
SMALL_SHAPE = sp.get_strategy("a_shape", **SMALL)
MOBA = sp.get_strategy("moba", k=3, last=40, **SMALL)


def build(builder=llama3_2, **options) -> TransformerDecoder:
    """A random decoder with attention sharp enough for a selection to matter."""
    torch.manual_seed(0)
    model = builder(**options or LLAMA).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tok_embeddings" in name:
                parameter.mul_(0.3)
            elif "lora_b" in name:
                parameter.normal_(std=0.02)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(3)
    return model


def stock(model: TransformerDecoder, tokens: torch.Tensor = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens and the logits after the prompt, by torchtune."""
    everything, logits = stock_generate(model, tokens, max_generated_tokens=NEW, top_k=1, pad_id=-1)
    return everything[:, tokens.shape[1] :], logits[:, 0]


@contextmanager
def caches(model: LastTokenDecoder, batch: int = 1, slots: int = LENGTH):
    with local_kv_cache(
        model, batch_size=batch, device=torch.device("cpu"), dtype=torch.float32, decoder_max_seq_len=slots
    ):
        yield
