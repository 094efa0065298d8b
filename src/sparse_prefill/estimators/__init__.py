"""Pattern estimators: what looks important."""

from sparse_prefill.estimators.antidiagonal import Antidiagonal
from sparse_prefill.estimators.attention_mass import attention_mass
from sparse_prefill.estimators.block_means import key_means, query_means
from sparse_prefill.estimators.pooled import PooledAttention, group_product, pooled_attention
from sparse_prefill.estimators.representative import Representative, RepresentativeMass
from sparse_prefill.estimators.token_block import TokenByMean
from sparse_prefill.estimators.true_mass import TrueMass

__all__ = [
    "Antidiagonal",
    "PooledAttention",
    "Representative",
    "RepresentativeMass",
    "TokenByMean",
    "TrueMass",
    "attention_mass",
    "group_product",
    "key_means",
    "pooled_attention",
    "query_means",
]
