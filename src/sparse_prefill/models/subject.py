"""The earlier path of names that are now in ``sparse_prefill.models.eval_model``."""

from sparse_prefill.models.eval_model import AnswerLikelihood, EvalModel, load

Subject, Reading = EvalModel, AnswerLikelihood  # former names

__all__ = ["AnswerLikelihood", "EvalModel", "Reading", "Subject", "load"]
