"""Sphinx roles of the docstrings (``:func:`~sparse_prefill.record` ``) as links of these pages."""

from __future__ import annotations

from typing import Any

import griffe
from pages import ROLE, link  # which hooks.py has imported


class Roles(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
