"""Strategies, wrappers, estimators and selectors by name, including those of other packages."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from sparse_prefill.core.renamed import options_of_today

NAME = re.compile(r"[\w.-]+")  # as specs on the command line read it
T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Factories by name: classes or functions that build one kind of object from keyword options.

    Unknown names are looked up among the entry points of ``group``, once per process. So an installed package adds its
    factories without being imported first.

    Args:
        kind (str): what the factories build, for messages.
        group (str): entry-point group of third-party factories.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._factories: dict[str, Callable[..., Any]] = {}
        self._entry_points_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a class or function under ``name``.

        Raises:
            ValueError: if the name is taken or invalid, or if the class or function can't be called with options.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"A {self.kind} is registered by a name of letters, digits, _, . and -, as in "
                f'@register_{self.kind}("my_name"), got {name!r}.'
            )

        def file(factory: T) -> T:
            if name in self._factories:
                raise ValueError(f"The {self.kind} {name!r} is registered already: choose another name.")
            self._file(name, factory)
            return factory

        return file

    def _file(self, name: str, factory: Callable[..., Any]) -> None:
        _check_factory(f"The {self.kind} {name!r}", factory)
        self._factories[name] = factory
        if isinstance(factory, type):
            factory.name = name  # type: ignore[attr-defined]

    def unregister(self, name: str) -> None:
        """Remove ``name``, for tests and notebooks that register something for a limited time."""
        self.factory(name)
        del self._factories[name]

    def names(self) -> list[str]:
        """All names, sorted, including those of installed entry points."""
        self._load_entry_points()
        return sorted(self._factories)

    def __contains__(self, name: str) -> bool:
        if name not in self._factories:
            self._load_entry_points()
        return name in self._factories

    def factory(self, name: str) -> Callable[..., Any]:
        """The class or function that is registered under ``name``.

        Raises:
            ValueError: if there is no such name; the message lists all names.
        """
        if name not in self:
            raise ValueError(f"Unknown {self.kind} {name!r}. There are: {', '.join(self.names())}.")
        return self._factories[name]

    def options(self, name: str) -> dict[str, Any]:
        """Options of ``name`` with their defaults (``inspect.Parameter.empty`` for required ones)."""
        factory = self.factory(name)
        found = {p.name: p.default for p in inspect.signature(factory).parameters.values()}
        for field in fields(factory) if is_dataclass(factory) else ():
            if field.name in found and field.default_factory is not MISSING:
                found[field.name] = field.default_factory()
        return found

    def build(self, name: str, options: dict[str, Any]) -> Any:
        """Call the factory of ``name``.

        Raises:
            ValueError: if the name or an option is unknown, or a required option is missing.
        """
        factory = self.factory(name)
        known, options = self.options(name), options_of_today(factory, options)
        unknown = [option for option in options if option not in known]
        if unknown:
            raise ValueError(
                f"The {self.kind} {name!r} has no option {', '.join(map(repr, unknown))}. "
                f"There are: {', '.join(known) or 'none'}."
            )
        missing = [o for o, default in known.items() if default is inspect.Parameter.empty and o not in options]
        if missing:
            raise ValueError(f"The {self.kind} {name!r} needs the option {', '.join(map(repr, missing))}.")
        return factory(**options)

    def _load_entry_points(self) -> None:
        if self._entry_points_loaded:
            return
        self._entry_points_loaded = True
        for point in entry_points(group=self.group):
            if point.name not in self._factories:
                self._load(point)

    def _load(self, point: EntryPoint) -> None:
        try:
            factory = point.load()
            if point.name not in self._factories:  # else loading its module registered it
                self._file(point.name, factory)
        except Exception as error:  # one broken package must not stop the others
            warnings.warn(f"The {self.kind} {point.name!r} of {point.value} could not be loaded: {error}", stacklevel=2)


def _check_factory(what: str, factory: Callable[..., Any]) -> None:
    """Raise ValueError unless ``build`` can call it with options."""
    if not callable(factory):
        raise ValueError(f"{what} must be a class or a function that builds it, got a {type(factory).__name__}.")
    if isinstance(factory, type):
        own = vars(factory)
        lost = [name for name, type_ in own.get("__annotations__", {}).items() if "ClassVar" not in str(type_)]
        if lost and "__init__" not in own:  # which @dataclass adds
            raise ValueError(
                f"{what} has the fields {', '.join(lost)}, and no way to set them: write @dataclass(frozen=True, "
                f"kw_only=True) between @register and the class {factory.__name__}."
            )
        if inspect.isabstract(factory):
            raise ValueError(f"{what} is an abstract class: define all of its methods.")
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"{what} has no readable signature: give a Python class or function.") from None
    unnamed = [str(p) for p in parameters if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if unnamed:
        raise ValueError(f"{what} takes {', '.join(unnamed)}: give every option a name.")
    if any(p.name == "name" for p in parameters):
        raise ValueError(f"{what} has an option name, which is reserved for its registered name: rename the option.")


strategies = Registry("strategy", "sparse_prefill.strategies")
wrappers = Registry("wrapper", "sparse_prefill.wrappers")
estimators = Registry("estimator", "sparse_prefill.estimators")
selectors = Registry("selector", "sparse_prefill.selectors")

register_strategy = strategies.register
register_wrapper = wrappers.register
register_estimator = estimators.register
register_selector = selectors.register
