"""Former names of public methods, attributes and options. They work for one more version, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


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


def former_options(**names: str) -> Callable[[C], C]:
    """Decorator of a keyword-only dataclass: options are taken and read by former names, too, ``former="today's"``."""

    def adopt(cls: C) -> C:
        init = cls.__init__  # type: ignore[misc]

        @wraps(init)
        def named_today(self: Any, **options: Any) -> None:
            init(self, **options_of_today(cls, options))

        cls.__init__, cls.former_options = named_today, names  # type: ignore[misc, attr-defined]
        for old, new in names.items():
            setattr(cls, old, _former_option(old, new))
        return cls

    return adopt


def _former_option(old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(f"The option {old}", new, stacklevel=3)
        return getattr(self, new)

    return property(read, doc=f"Former name of the option ``{new}``.")


def options_of_today(factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a factory, those with a former name under today's.

    Raises:
        ValueError: if an option is given by both of its names.
    """
    names, found = getattr(factory, "former_options", {}), dict(options)
    for old in [name for name in options if name in names]:
        new = names[old]
        if new in found:
            raise ValueError(f"{old} is the former name of {new}, and both are given: give {new} only.")
        warn_renamed(f"The option {old}", new, stacklevel=4)
        found[new] = found.pop(old)
    return found


def warn_renamed(old: str, new: str, *, stacklevel: int) -> None:
    """Warn that ``old`` is now called ``new``. ``stacklevel`` counts the calls from here to the user's line."""
    message = f"{old} is now called {new}; the former name goes in the next version."
    warnings.warn(message, FutureWarning, stacklevel=stacklevel)
