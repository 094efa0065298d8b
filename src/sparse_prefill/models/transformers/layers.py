"""The attention modules of a transformers model, by layer, and copies of the configs that they read."""

from __future__ import annotations

import ast
import copy
import inspect
from functools import cache
from textwrap import dedent

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from sparse_prefill.models.transformers.bindings import NAME


def copied_configs(model: nn.Module) -> tuple[dict[int, PreTrainedConfig], set[int]]:
    """Copies of a model's configs that name the library as the decoder's attention.

    Copies, since several models may share a config, and the config names the attention function.

    Args:
        model (nn.Module): the model, or a module around it.

    Returns:
        tuple[dict[int, PreTrainedConfig], set[int]]: the copies by the id of the original config, and the ids of the
        decoder's configs.

    Raises:
        ValueError: if there is no transformers model, or it doesn't use transformers' attention interface.
    """
    roots = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not roots:
        raise ValueError(f"sparse takes a model of transformers, got {type(model).__name__}.")
    copies: dict[int, PreTrainedConfig] = {}

    def copied(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in copies:
            copies[id(config)] = mine = copy.copy(config)
            for key in config.sub_configs:
                if isinstance(part := getattr(config, key, None), PreTrainedConfig):
                    mine.__dict__[key] = copied(part)
        return copies[id(config)]

    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            copied(config)
    kind = type(roots[0].config.get_text_config(decoder=True))
    texts = {key for key, config in copies.items() if type(config) is kind}
    for root in roots:
        if id(root.config) in texts and not root._can_set_attn_implementation():
            raise ValueError(
                f"{type(root).__name__} doesn't use transformers' attention interface, so its attention can't be "
                "replaced: take one of transformers' own models, or call sparse_attention in the model's code."
            )
    for key in texts:
        copies[key]._attn_implementation_internal = NAME
    return copies, texts


def layer_modules(model: nn.Module, texts: set[int]) -> dict[int, list[nn.Module]]:
    """Modules that may attend, by the index of their layer.

    Args:
        model (nn.Module): the model, or a module around it.
        texts (set[int]): ids of the decoder's configs, which the modules hold.

    Returns:
        dict[int, list[nn.Module]]: the modules. Those that several layers share have the index of the first.

    Raises:
        ValueError: if none of them calls transformers' attention interface, or one reads the attention mask itself.
    """
    layers: dict[int, list[nn.Module]] = {}
    attends = False
    for name, module in model.named_modules():
        if id(getattr(module, "config", None)) not in texts:
            continue
        index = getattr(module, "layer_idx", None)
        if is_attention := _is_attention(type(module)):
            attends = True
            if _reads_mask(type(module)):  # type: ignore[arg-type]  # classes are hashable
                raise ValueError(
                    f"{type(module).__name__} of {type(model).__name__} reads the attention mask in its own code, but "
                    "sparse prefill makes no mask tensor (models whose indexer selects tokens read it): run this model "
                    "without sparse prefill."
                )
        if is_attention and index is None:
            index = -1  # Zamba gives its attention no index
        if isinstance(index, int):
            if index < 0:
                index = next((int(part) for part in name.split(".") if part.isdigit()), 0)
            layers.setdefault(index, []).append(module)
    if not attends:
        raise ValueError(
            f"{type(model).__name__} has no attention layers that sparse prefill could serve (state-space and "
            "recurrent models have none): run this model without it."
        )
    return layers


def layer_type(attention: nn.Module, index: int) -> str | None:
    """The type of a module's layer in its config, None if the config has no types."""
    types = getattr(attention.config, "layer_types", None)
    return types[index] if types is not None and index < len(types) else None


@cache
def _reads_mask(kind: type) -> bool:
    """Whether code of a class takes elements or attributes of its ``attention_mask``, instead of passing it on."""
    try:
        tree = ast.parse(dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # a class without a file
        return False
    reads = (node.value for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Subscript)))
    return any(isinstance(value, ast.Name) and value.id == "attention_mask" for value in reads)


def _is_attention(kind: type) -> bool:
    """Whether code of a class names transformers' attention interface."""
    if issubclass(kind, PreTrainedModel):  # names the interface in order to set it
        return False
    for value in (value for parent in kind.__mro__ for value in vars(parent).values() if callable(value)):
        function = inspect.unwrap(value)
        if inspect.isfunction(function) and any(
            isinstance(function.__globals__.get(name), AttentionInterface) for name in function.__code__.co_names
        ):
            return True
    return False
