"""Docstrings as Markdown of these pages: Sphinx roles (``:func:`~sparse_prefill.record` ``) become links."""

from __future__ import annotations

import re
from typing import Any

import griffe
from pages import ROLE, link  # which hooks.py has imported

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
SHAPE = re.compile(r"(?<![\w\]`])(\[[\w ]+\])\[")  # "[layers][key heads]" would be a link in Markdown


def as_markdown(docstring: str) -> str:
    """A docstring that mkdocstrings shows right: griffe knows ``Examples:``, and no ``Example:``."""
    return ROLE.sub(link, SHAPE.sub(r"\1\\[", EXAMPLE.sub(r"\1Examples:", docstring)))


class Roles(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
