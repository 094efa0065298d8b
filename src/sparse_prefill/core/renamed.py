"""Former names of public methods and attributes. They work for one more version, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any


def former_name(old: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method under its former name: it warns, then calls the method under its current name."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_renamed(old, method.__name__, stacklevel=3)
        return getattr(self, method.__name__)(*args, **kwargs)

    run.__doc__ = f"Former name of :meth:`{method.__name__}`."
    return run


def adopt_former_attributes(cls: type, names: Mapping[str, str]) -> None:
    """Copy attributes that a class defines under former names to current ones: ``{former name: current name}``."""
    for old, new in names.items():
        if old in cls.__dict__ and new not in cls.__dict__:
            warn_renamed(f"{cls.__name__}.{old}", new, stacklevel=4)
            setattr(cls, new, cls.__dict__[old])


def warn_renamed(old: str, new: str, *, stacklevel: int) -> None:
    """Warn that ``old`` is now called ``new``. ``stacklevel`` counts the calls from here to the user's line."""
    message = f"{old} is now called {new}; the former name goes in the next version."
    warnings.warn(message, FutureWarning, stacklevel=stacklevel)
