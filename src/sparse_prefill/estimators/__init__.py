"""Estimators: score each pair of a query block and a key block by its expected attention."""

from sparse_prefill.estimators.antidiagonal import Antidiagonal
from sparse_prefill.estimators.attention_gate import AttentionGate
from sparse_prefill.estimators.attention_mass import attention_mass
from sparse_prefill.estimators.block_means import key_means, query_means
from sparse_prefill.estimators.pooled import PooledAttention, group_product, pooled_attention
from sparse_prefill.estimators.proxy_heads import ProxyHeads
from sparse_prefill.estimators.representative import Representative, RepresentativeMass, by_diagonal
from sparse_prefill.estimators.sampled_mass import SampledMass, window_blocks
from sparse_prefill.estimators.self_similarity import dissimilar_blocks, key_similarity, query_similarity
from sparse_prefill.estimators.spectral_bands import Bands, SpectralBands
from sparse_prefill.estimators.token_block import TokenByMean
from sparse_prefill.estimators.token_votes import TokenVotes
from sparse_prefill.estimators.true_mass import TrueMass

__all__ = [
    "Antidiagonal",
    "AttentionGate",
    "Bands",
    "PooledAttention",
    "ProxyHeads",
    "Representative",
    "RepresentativeMass",
    "SampledMass",
    "SpectralBands",
    "TokenByMean",
    "TokenVotes",
    "TrueMass",
    "attention_mass",
    "by_diagonal",
    "dissimilar_blocks",
    "group_product",
    "key_means",
    "key_similarity",
    "pooled_attention",
    "query_means",
    "query_similarity",
    "window_blocks",
]
