"""Names for strategies, estimators and selectors, and how other packages add theirs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Factories by name: classes or functions that build one kind of thing from keyword options.

    Names that are not known here are looked up among the entry points of ``group``, once per process, so that an
    installed package adds its own without being imported first.

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
        """Decorator that files a class or function under ``name``.

        Raises:
            ValueError: if the name is taken.
        """

        def file(factory: T) -> T:
            if name in self._factories:
                raise ValueError(f"The {self.kind} {name!r} is registered already: choose another name.")
            self._file(name, factory)
            return factory

        return file

    def _file(self, name: str, factory: Callable[..., Any]) -> None:
        self._factories[name] = factory
        if isinstance(factory, type):
            factory.name = name  # type: ignore[attr-defined]

    def unregister(self, name: str) -> None:
        """Forget ``name``, for tests and notebooks that register something for a while."""
        self.factory(name)
        del self._factories[name]

    def names(self) -> list[str]:
        """All names, sorted, those of installed entry points included."""
        self._load_entry_points()
        return sorted(self._factories)

    def __contains__(self, name: str) -> bool:
        if name not in self._factories:
            self._load_entry_points()
        return name in self._factories

    def factory(self, name: str) -> Callable[..., Any]:
        """What was registered under ``name``.

        Raises:
            ValueError: if there is no such name; the message lists those there are.
        """
        if name not in self:
            raise ValueError(f"Unknown {self.kind} {name!r}. There are: {', '.join(self.names())}.")
        return self._factories[name]

    def options(self, name: str) -> dict[str, Any]:
        """Options that ``name`` takes, with their defaults (``inspect.Parameter.empty`` where one must be given)."""
        factory = self.factory(name)
        found = {p.name: p.default for p in inspect.signature(factory).parameters.values()}
        for field in fields(factory) if is_dataclass(factory) else ():
            if field.name in found and field.default_factory is not MISSING:
                found[field.name] = field.default_factory()
        return found

    def build(self, name: str, options: dict[str, Any]) -> Any:
        """Call the factory of ``name``.

        Raises:
            ValueError: if the name or an option is unknown, or an option that has no default is missing.
        """
        factory = self.factory(name)
        known = self.options(name)
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
        except Exception as error:  # one broken package must not take the others down
            warnings.warn(f"The {self.kind} {point.name!r} of {point.value} could not be loaded: {error}", stacklevel=2)
            return
        if point.name not in self._factories:  # else its module registered it while it was loaded
            self._file(point.name, factory)


strategies = Registry("strategy", "sparse_prefill.strategies")
wrappers = Registry("wrapper", "sparse_prefill.wrappers")
estimators = Registry("estimator", "sparse_prefill.estimators")
selectors = Registry("selector", "sparse_prefill.selectors")

register_strategy = strategies.register
register_wrapper = wrappers.register
register_estimator = estimators.register
register_selector = selectors.register
