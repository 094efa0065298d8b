"""A model to evaluate, with its tokenizer: one interface for GGUF files and folders of Hugging Face's format."""

from sparse_prefill.models.eval_model.interface import AnswerLikelihood, EvalModel
from sparse_prefill.models.eval_model.layer_inputs import LayerInputs
from sparse_prefill.models.eval_model.load import load

__all__ = ["AnswerLikelihood", "EvalModel", "LayerInputs", "load"]
