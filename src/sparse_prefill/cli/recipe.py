"""Shared code of recipes: checks of the config, one-line errors, and the model that a config names."""

from __future__ import annotations

import functools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config, training, utils
from torchtune.config._errors import InstantiationError
from torchtune.modules import TransformerDecoder

from sparse_prefill.cli.exits import exit_code
from sparse_prefill.core.files import read_yaml
from sparse_prefill.core.option_checks import check_nonnegative, check_tokens

REFERENCE = re.compile(r"\$\{([^.}\[:]+)")  # of one key of a config to another
DECODER = ("model", "checkpointer", "tokenizer", "dtype", "device")  # the keys that load_decoder reads
START = ("device", "seed", "log_level")
SAMPLING = ("max_new_tokens", "temperature", "top_k")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class Loaded(NamedTuple):
    """A model and its tokenizer, with the tokens that end an answer."""

    model: TransformerDecoder
    tokenizer: Any
    stop_tokens: list[int]


def parse(keys: Collection[str]) -> Callable[[Callable[[DictConfig], int | None]], Callable[[], None]]:
    """torchtune's ``config.parse`` with one-line errors and the exit codes of the command line.

    Args:
        keys (Collection[str]): all keys that the recipe reads. The config must have all of them, and no others except
            those that its own values refer to, as ``${path}`` refers to ``path``.
    """

    def decorate(main: Callable[[DictConfig], int | None]) -> Callable[[], None]:
        @functools.wraps(main)
        def checked(cfg: DictConfig) -> int | None:
            _check_keys(cfg, keys)
            return main(cfg)

        def run() -> int:
            _check_file(sys.argv[1:])
            try:
                config.parse(checked)()
            except SystemExit as end:  # raised by parse, as argparse does
                if isinstance(end.code, str):
                    raise RuntimeError(end.code) from None
                return end.code or 0
            except OmegaConfBaseException as error:
                raise ValueError(f"The config can't be read: {error}") from error
            return 0

        @functools.wraps(main)
        def wrapper() -> None:
            # torchtune normalises in fp32 on purpose, and torch warns that it has no fused kernel for that.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            sys.exit(exit_code(Path(sys.argv[0]).name, run))

        return wrapper

    return decorate


def start(cfg: DictConfig) -> tuple[torch.device, logging.Logger]:
    """Set the seed and return the device and the logger of a recipe; ValueError if a setting is wrong.

    Args:
        cfg (DictConfig): with the keys of ``START``.
    """
    check_tokens("seed", cfg.seed)
    if cfg.log_level not in LOG_LEVELS:
        raise ValueError(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {cfg.log_level!r}.")
    training.set_seed(seed=cfg.seed)
    return utils.get_device(device=cfg.device), utils.get_logger(cfg.log_level)


def check_sampling(cfg: DictConfig) -> None:
    """Raise ValueError if a setting of sampling is wrong, before a model is loaded."""
    check_tokens("max_new_tokens", cfg.max_new_tokens, least=1)
    check_nonnegative("temperature", cfg.temperature)
    if cfg.top_k is not None:
        check_tokens("top_k", cfg.top_k, least=1)


def build(cfg: DictConfig, key: str) -> Any:
    """Build the component under a key of the config; ValueError if that fails."""
    try:
        return config.instantiate(cfg[key])
    except (TypeError, AttributeError, InstantiationError, OmegaConfBaseException) as error:
        raise ValueError(f"{key} of the config can't be built: {error}") from error


def load_decoder(cfg: DictConfig) -> Loaded:
    """The model as torchtune builds it, with its weights, and its tokenizer.

    Args:
        cfg (DictConfig): with the keys of ``DECODER``.

    Raises:
        ValueError: if a component can't be built, or the weights don't fit the model.
    """
    device = torch.device(cfg.device)
    with training.set_default_dtype(training.get_dtype(dtype=cfg.dtype, device=device)), device:
        model = build(cfg, "model")
    weights = build(cfg, "checkpointer").load_checkpoint()[training.MODEL_KEY]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        faults = [" ".join(line.split()) for line in str(error).splitlines()[1:]]
        reason = faults[0][:200] if faults else str(error)
        raise ValueError(f"The checkpointer's weights don't fit the model: {reason}") from error
    tokenizer = build(cfg, "tokenizer")
    return Loaded(model.eval(), tokenizer, getattr(tokenizer, "stop_tokens", [tokenizer.eos_id]))


def _check_file(words: list[str]) -> None:
    """Refuse a config file that torchtune fails on with a traceback. argparse reports a missing ``--config``."""
    named = [after for word, after in pairwise(words) if word == "--config"]
    named += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    for path in named:
        content = read_yaml(path, "config")
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise ValueError(f"{path} isn't a config: it must hold a mapping of settings.")
    for word in words:
        if not word.startswith(("-", "~")) and word not in named and "=" not in word:
            raise ValueError(f"{word!r} isn't a setting: write KEY=VALUE, or ~KEY to leave one out.")


def _check_keys(cfg: DictConfig, keys: Collection[str]) -> None:
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    known = {*keys, *REFERENCE.findall(str(content))}
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"The config has unknown keys: {', '.join(unknown)}. There are: {', '.join(sorted(keys))}.")
    if missing := sorted(set(keys) - set(content)):
        raise ValueError(f"The config lacks the keys {', '.join(missing)}: set them, if only to null.")
