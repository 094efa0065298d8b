"""Every public path resolves: exports of the package, and names used in pages, recipes and their settings."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter

import pytest

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.tasks.prompt_template import registry as tasks

PUBLIC = {
    "sparse_prefill": (
        "AttentionInputs Call "
        "ComposedStrategy CudaGraphs KeyState Layer Logits Plan Plan.load Prompt Rope Segment Strategy Wrapper "
        "block_sparse_attention dense_attention estimators get_estimator get_selector get_strategy kernel_options "
        "list_strategies list_wrappers record register_estimator register_selector register_strategy register_wrapper "
        "selectors sparse_attention strategies warmup wrappers"
    ),
    "sparse_prefill.block_mask": "BlockTables block_tables to_block_mask",
    "sparse_prefill.calibration": (
        "Calibration Curves Fitted LengthError LengthLaw Verification calibrate estimate_head_table fit_length_law "
        "length_error measure search_patterns verify with_knob knob_of tunable_options tunable_option_of"
    ),
    "sparse_prefill.cli.evaluate": "print_report",
    "sparse_prefill.cli.progress": "Progress",
    "sparse_prefill.estimators": (
        "Antidiagonal AttentionGate Bands PooledAttention ProxyHeads Representative RepresentativeMass SampledMass "
        "SpectralBands TokenByMean TokenVotes TrueMass attention_mass by_diagonal dissimilar_blocks group_product "
        "key_means key_similarity pooled_attention query_means query_similarity window_blocks"
    ),
    "sparse_prefill.evaluation": (
        "Collector density kl_divergence oracle_density oracle_density_by_head oracle_gap output_error overlap "
        "overlap_by_head perplexity_ratio recall spread_blocks squared_error true_mass worst"
    ),
    "sparse_prefill.evaluation.floors": "Work kernel_work least_work",
    "sparse_prefill.evaluation.profiling": "ceilings growth peak_bytes profile_attention",
    "sparse_prefill.evaluation.roofline": "Work kernel_work least_work",
    "sparse_prefill.evaluation.results": "Results machine origin",
    "sparse_prefill.evaluation.run": "measure_texts saved_head_table text_with_facts without_dense_rows",
    "sparse_prefill.evaluation.run_frontier": "measure_frontier",
    "sparse_prefill.evaluation.run_tasks": "measure_tasks",
    "sparse_prefill.evaluation.run_times": "measure_times",
    "sparse_prefill.evaluation.texts": "FactText hide_facts",
    "sparse_prefill.evaluation.timing": "compare_attention time_attention",
    "sparse_prefill.head_table": "check_table load_table save_table streaming_heads window_loss",
    "sparse_prefill.knob": "Knob",
    "sparse_prefill.reference": (
        "attention block_mass block_means block_table dense_attention diagonal fewest first_key fully_visible "
        "key_block largest padding_of pooled_attention probabilities query_block representative spans sparse_attention "
        "token_by_mean token_mask visible"
    ),
    "sparse_prefill.tunable_option": "TunableOption",
    "sparse_prefill.models.eval_model": "AnswerLikelihood EvalModel LayerInputs load",
    "sparse_prefill.models.gguf": "GGUFCheckpointer gguf_decoder",
    "sparse_prefill.models.gguf_tokenizer": "GGUFTokenizer",
    "sparse_prefill.models.lm_eval": "SparseLM",
    "sparse_prefill.models.stats": "LayerStats Stats",
    "sparse_prefill.models.subject": "EvalModel Reading Subject load",
    "sparse_prefill.models.torchtune": (
        "Generation LastTokenDecoder Likelihood Score generate generate_packed likelihood prefill prefill_packed score "
        "sparsify"
    ),
    "sparse_prefill.models.torchtune_attention": "SparsePrefillAttention SparsePrefillGemma2Attention",
    "sparse_prefill.models.transformers": "register sparse",
    "sparse_prefill.options": "check_tokens",
    "sparse_prefill.packing": "Packed pack",
    "sparse_prefill.plotting": "crossover density_map frontier head_map needle_grid recall_map speedup",
    "sparse_prefill.record": "SparseCallTensors",
    "sparse_prefill.registry": "Registry",
    "sparse_prefill.report": "Picture figures_of write_report",
    "sparse_prefill.selectors": "CumulativeMass MaxRelative Threshold TopK top_k",
    "sparse_prefill.spec": "parse_strategy",
    "sparse_prefill.strategy": (
        "ComposedStrategy Strategy as_strategy get_estimator get_selector get_strategy list_strategies list_wrappers "
        "to_config"
    ),
    "sparse_prefill.strategies.a_shape": "AShape",
    "sparse_prefill.strategies.dense": "Dense",
    "sparse_prefill.strategies.dilated": "Dilated",
    "sparse_prefill.strategies.duo_attention": "DuoAttention",
    "sparse_prefill.strategies.flash_prefill": "FlashPrefill",
    "sparse_prefill.strategies.flex_prefill": "FlexPrefill",
    "sparse_prefill.strategies.last_query": "LastQuery",
    "sparse_prefill.strategies.local": "Local",
    "sparse_prefill.strategies.lserve": "LServe",
    "sparse_prefill.strategies.mean_pool": "MeanPool",
    "sparse_prefill.strategies.mean_slash": "MeanSlash",
    "sparse_prefill.strategies.minference": "MInference save_patterns",
    "sparse_prefill.strategies.moba": "MoBA",
    "sparse_prefill.strategies.oracle": "Oracle",
    "sparse_prefill.strategies.prism": "Prism",
    "sparse_prefill.strategies.proxy_attn": "ProxyAttn",
    "sparse_prefill.strategies.random": "Random",
    "sparse_prefill.strategies.sample_attention": "SampleAttention",
    "sparse_prefill.strategies.seer_attention": "SeerAttention",
    "sparse_prefill.strategies.sparge_attention": "SpargeAttention",
    "sparse_prefill.strategies.tri_shape": "TriShape",
    "sparse_prefill.strategies.triangle_mix": "TriangleMix",
    "sparse_prefill.strategies.xattention": "XAttention",
    "sparse_prefill.tasks": "PromptTemplate TaskSampler Task containment list_tasks make register_task score summary",
    "sparse_prefill.wrappers.by_head": "ByHead",
    "sparse_prefill.wrappers.delta": "Delta",
    "sparse_prefill.wrappers.gqa_union": "GqaUnion",
    "sparse_prefill.wrappers.layer_schedule": "LayerSchedule",
    "sparse_prefill.wrappers.mean_correction": "MeanCorrection",
    "sparse_prefill.wrappers.reuse_layer": "ReuseLayer",
    "sparse_prefill.wrappers.similarity_guard": "SimilarityGuard",
}
PATHS = [(module, name) for module, names in PUBLIC.items() for name in names.split()]
SUBPACKAGES = {"estimators", "selectors", "strategies", "wrappers"}  # packages that the package exports
GROUPS = {
    "sparse_prefill.strategies",
    "sparse_prefill.wrappers",
    "sparse_prefill.estimators",
    "sparse_prefill.selectors",
}


@pytest.mark.parametrize(("module", "name"), PATHS, ids=[f"{module}.{name}" for module, name in PATHS])
def test_public_paths_resolve(module, name):
    try:
        found = attrgetter(name)(import_module(module))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sparse_prefill"):
            raise
        pytest.skip(f"needs {error.name}")
    assert callable(found) != (name in SUBPACKAGES)  # a class or function, not a module of the same name


def test_exports_of_the_package_are_public():
    assert set(sp.__all__) <= set(PUBLIC["sparse_prefill"].split())


def test_groups_of_entry_points_keep_their_names():
    registries = (registry.strategies, registry.wrappers, registry.estimators, registry.selectors)
    assert {kind.group for kind in registries} == GROUPS
    assert tasks.group == "sparse_prefill.tasks"
