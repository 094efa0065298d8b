"""Sphinx roles of the docstrings (``:func:`~sparse_prefill.record` ``) as links of these pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth):`~?([\w.]+)`")


def link(role: re.Match) -> str:
    path = role[1]
    name = path.rpartition(".")[2]
    return f"[`{name}`][{path}]" if path.startswith("sparse_prefill.") else f"`{name}`"


class Roles(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
