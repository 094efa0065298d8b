"""Strategies as command-line text."""

from __future__ import annotations

import os
import re
from typing import Any

from sparse_prefill import registry
from sparse_prefill.core.files import parse_json, with_numbers
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, as_strategy

SPEC = re.compile(r"(?P<name>[\w.-]+)(?:\((?P<of>.*)\))?(?::(?P<options>.*))?", re.DOTALL)
PLANS = (".yaml", ".yml", ".json")


def parse_strategy(spec: str) -> Strategy | Plan:
    """A strategy from its name and options, or a plan from a file.

    Args:
        spec (str): ``NAME``, ``NAME:OPTION=VALUE,OPTION=VALUE``, ``WRAPPER(SPEC):OPTION=VALUE``, or the path of a plan
            (.yaml, .yml or .json; needs the ``yaml`` extra), as :meth:`~sparse_prefill.Plan.save` writes it. Values
            are JSON; values that aren't JSON are text.

    Returns:
        Strategy | Plan: the strategy or the plan.

    Raises:
        ValueError: if it can't be parsed, or the strategy doesn't take an option or its value.

    Example:
        >>> parse_strategy("xattention:threshold=0.97,stride=16").threshold
        0.97
        >>> parse_strategy("delta(a_shape:local=512):every=32").label
        'delta(a_shape)'
    """
    return Plan.load(spec) if is_plan(spec) else as_strategy(parse_options(spec))


def is_plan(spec: str) -> bool:
    """Whether a spec is the path of a plan, and not a strategy with a file name as its last option."""
    match = SPEC.fullmatch(spec.strip())
    has_options = match is not None and (match["of"] is not None or "=" in (match["options"] or ""))
    return spec.endswith(PLANS) and (not has_options or os.path.isfile(spec))


def parse_options(spec: str) -> dict[str, Any]:
    """A strategy as a mapping of its ``name``, its options and, under ``of``, the wrapped strategy.

    Args:
        spec (str): as for :func:`parse_strategy`, but not the path of a plan.

    Returns:
        dict[str, Any]: the name and options in the spec, without defaults.

    Raises:
        ValueError: if it can't be parsed.
    """
    match = SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(
            f"{spec!r} is no strategy: write NAME, NAME:OPTION=VALUE,OPTION=VALUE or WRAPPER(NAME), as in "
            "xattention:threshold=0.97."
        )
    options = {"name": match["name"]}
    if match["of"] is not None:
        options["of"] = parse_options(match["of"])
    for option, value in _options(match["options"] or "", spec):
        if option in options:
            raise ValueError(f"{option} is given twice in {spec!r}: {_where(option)}")
        options[option] = value
    _check_switches(options)
    return options


def _where(option: str) -> str:
    if option == "name":
        return "write the strategy's name first, not as an option."
    return "name the wrapped strategy in brackets or after of=, not both." if option == "of" else "leave one out."


def _options(text: str, spec: str) -> list[tuple[str, Any]]:
    options = []
    for pair in _split(text):
        option, equals, value = pair.partition("=")
        if not equals or not option.strip():
            raise ValueError(f"{pair!r} in {spec!r} is no option: write OPTION=VALUE, with commas between them.")
        options.append((option.strip(), _value(value.strip())))
    return options


def _split(text: str) -> list[str]:
    """Parts between commas, except commas inside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    try:
        return with_numbers(parse_json(text))
    except ValueError as error:
        if text.startswith(("[", "{")):
            raise ValueError(f"{text!r} is no list or mapping: {error}") from None
        return text


def _check_switches(options: dict[str, Any]) -> None:
    """Raise ValueError if a bool option gets text, which is always true in Python: ``official=no`` would enable it."""
    name = options["name"]
    for kind in (registry.strategies, registry.wrappers):
        known = kind.options(name) if name in kind else {}
        for option, value in options.items():
            if isinstance(known.get(option), bool) and not isinstance(value, bool):
                raise ValueError(f"{option} of {name} must be true or false, got {value!r}.")
