"""The length law: thresholds for lengths without a calibration, threshold = a * exp(b * recall) / tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sparse_prefill.calibration.curves import By, Curves, measure
from sparse_prefill.calibration.result import as_plan
from sparse_prefill.calibration.tunable import tunable_option_of, tunable_options
from sparse_prefill.core.files import read_yaml
from sparse_prefill.core.option_checks import check_finite, check_fraction, check_tokens
from sparse_prefill.models.eval_model import EvalModel
from sparse_prefill.models.observe import OnProgress, Texts, as_tokens, part_of
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, as_strategy, to_config
from sparse_prefill.tunable_option import TunableOption

Place = tuple[int, tuple[int, ...]]  # a layer and its query heads


@dataclass(frozen=True)
class LengthLaw:
    """The threshold of a strategy as a function of recall and length, fitted on one model.

    For the layer and group of heads ``p``, the recall ``r`` and prompts of ``n`` tokens::

        threshold(p, r, n) = a[p] * exp(b * r) / n

    n dropped blocks lose at most n thresholds of attention mass, so the threshold for one recall falls with the length.
    ``b`` is one number for the model. The fit is linear: with ``y = log(threshold * n)``, each calibrated point obeys
    ``y = log(a[p]) + b * r``, and least squares give, with means over the points of a place p::

        b         = sum_p sum_i (r_i - mean_p(r)) * (y_i - mean_p(y)) / sum_p sum_i (r_i - mean_p(r))**2
        log(a[p]) = mean_p(y) - b * mean_p(r)

    Args:
        strategy (Strategy): the strategy that the thresholds belong to.
        by (str): which heads share a threshold: those of a "layer", of a "group", or each "head" for itself.
        b (float): slope of log(threshold) over recall.
        a (Mapping): factors by layer and query heads.
        lengths (tuple[int, ...]): fitted lengths in tokens.
        recalls (tuple[float, ...]): fitted recalls.
    """

    strategy: Strategy
    by: By
    b: float
    a: dict[Place, float]
    lengths: tuple[int, ...]
    recalls: tuple[float, ...]

    def values(self, recall: float, tokens: int) -> dict[Place, float]:
        """The thresholds by layer and query heads, clamped to the range of the option."""
        check_fraction("recall", recall)
        check_tokens("tokens", tokens, least=1)
        tunable = _threshold_of(self.strategy)
        low, high = sorted((tunable.least, tunable.most or 0.0))
        values = {place: a * math.exp(self.b * recall) / tokens for place, a in self.a.items()}
        return {place: float(f"{min(high, max(low, value)):.6g}") for place, value in values.items()}

    def plan(self, recall: float, tokens: int) -> Plan:
        """The plan for prompts of a length.

        Args:
            recall (float): recall to reach, in (0, 1].
            tokens (int): length of the prompts.

        Returns:
            Plan: for torchtune and transformers models.
        """
        return as_plan(self.strategy, self.values(recall, tokens))

    def save(self, path: str | Path) -> None:
        """Write the law as YAML. Needs the ``yaml`` extra."""
        import yaml

        content = {
            "strategy": to_config(self.strategy),
            "by": self.by,
            "b": self.b,
            "a": [[layer, list(heads), a] for (layer, heads), a in self.a.items()],
            "lengths": list(self.lengths),
            "recalls": list(self.recalls),
        }
        Path(path).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LengthLaw:
        """Read a law from YAML; ValueError if the file holds anything else. Needs the ``yaml`` extra."""
        content: Any = read_yaml(path, "length law")
        if not isinstance(content, dict) or content.keys() != {"strategy", "by", "b", "a", "lengths", "recalls"}:
            raise ValueError(f"{path} isn't a length law: write one with LengthLaw.save.")
        try:
            return cls(
                strategy=as_strategy(content["strategy"]),
                by=_granularity(content["by"]),
                b=_number("b", content["b"]),
                a={(_integer(layer), tuple(map(_integer, heads))): _number("a", a) for layer, heads, a in content["a"]},
                lengths=tuple(map(_integer, content["lengths"])),
                recalls=tuple(_number("recalls", recall) for recall in content["recalls"]),
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} isn't a length law: {error}") from None


def _granularity(value: Any) -> By:
    if value not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {value!r}.")
    return value


def _number(name: str, value: Any) -> float:
    check_finite(name, value)
    return float(value)


def _integer(value: Any) -> int:
    check_tokens("a layer, head or length", value)
    return value


def fit_length_law(
    subject: EvalModel,
    strategy: Strategy | str,
    texts: Texts,
    *,
    lengths: Sequence[int] = (2048, 3072, 4096),
    recalls: Sequence[float] = (0.85, 0.9, 0.95),
    by: By | None = None,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> LengthLaw:
    """Calibrate a threshold at several lengths and recalls, and fit the :class:`LengthLaw` to the results.

    Heads that reach a recall through the guards have no threshold there to fit; these points are left out. Heads
    without any point get the mean factor of the others.

    Args:
        subject (EvalModel): the model.
        strategy (Strategy | str): a strategy whose tunable option is a threshold of scores, e.g. "flash_prefill".
        texts (Sequence): token ids of sample texts; their first tokens are used.
        lengths (Sequence[int]): lengths to calibrate at, in tokens. Default: 2,048, 3,072 and 4,096.
        recalls (Sequence[float]): recalls to calibrate to, at least two. Default: 0.85, 0.9 and 0.95.
        by (str | None): as for :func:`~sparse_prefill.calibration.calibrate`.
        query_blocks (int): as for :func:`~sparse_prefill.calibration.calibrate`. Default: 16.
        on_progress (Callable | None): called as ``on_progress(done, total)``; a text counts once at each length.
            Default: nothing.

    Returns:
        LengthLaw: its ``plan`` serves other lengths. :func:`length_error` measures how well.

    Raises:
        ValueError: if the strategy's tunable option isn't a threshold of scores, a text is too short, a recall is out
            of reach, or too few heads need a threshold.

    Example:
        >>> law = fit_length_law(model, "flash_prefill", [model.encode(text)])
        >>> law.plan(0.95, tokens=16384).save("plan_16k.yaml")
    """
    strategy = as_strategy(strategy)
    tunable = _threshold_of(strategy)
    prompts = as_tokens(texts)
    for recall in recalls:
        check_fraction("recalls", recall)
    for length in lengths:
        check_tokens("lengths", length, least=1)
    if len(set(recalls)) < 2 or not lengths:
        raise ValueError(f"Give at least two recalls and a length to fit to, got {list(recalls)} and {list(lengths)}.")
    if short := [tokens.shape[1] for tokens in prompts if tokens.shape[1] < max(lengths)]:
        raise ValueError(f"Texts must have at least {max(lengths)} tokens, the longest of the lengths, got {short[0]}.")
    points: dict[Place, list[tuple[float, float]]] = {}  # (recall, log(threshold * tokens))
    for index, length in enumerate(lengths):
        parts = [tokens[0, :length] for tokens in prompts]
        progress = part_of(on_progress, index, len(lengths))
        curves = measure(subject, strategy, parts, by=by, query_blocks=query_blocks, on_progress=progress)
        for recall in recalls:
            for group in curves.at_recall(recall).groups:
                found = points.setdefault((group.layer, group.heads), [])
                if group.value != tunable.least:
                    found.append((recall, math.log(group.value * length)))
    a, b = _fit(points)
    return LengthLaw(strategy, curves.by, b, a, tuple(lengths), tuple(recalls))


@dataclass(frozen=True)
class LengthError:
    """A length law compared with a calibration at the same length.

    Args:
        tokens (int): length of the texts.
        target (float): target recall of both.
        recall (float): recall with the law's thresholds, mean over layers and heads.
        calibrated_recall (float): recall with calibrated thresholds; above the target if guards keep more.
        density (float): density with the law's thresholds.
        calibrated_density (float): density with calibrated thresholds.
        log_ratio (float): mean absolute difference of the natural logarithms of the thresholds, over the heads that the
            calibration gives a threshold.
    """

    tokens: int
    target: float
    recall: float
    calibrated_recall: float
    density: float
    calibrated_density: float
    log_ratio: float


def length_error(
    subject: EvalModel,
    law: LengthLaw,
    texts: Texts,
    *,
    recalls: Sequence[float] = (0.95,),
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> list[LengthError]:
    """Compare a length law with a calibration on texts of one length.

    Args:
        subject (EvalModel): the model.
        law (LengthLaw): a law that was fitted on the model.
        texts (Sequence): token ids of texts of one length.
        recalls (Sequence[float]): recalls to compare at. Default: 0.95.
        query_blocks (int): as for :func:`~sparse_prefill.calibration.calibrate`. Default: 16.
        on_progress (Callable | None): called as ``on_progress(done, total)``. Default: nothing.

    Returns:
        list[LengthError]: one for each recall.

    Raises:
        ValueError: if texts differ in length, one runs dense, or a recall is out of reach.
    """
    lengths = {tokens.shape[1] for tokens in as_tokens(texts)}
    if len(lengths) > 1:
        raise ValueError(f"Texts must be of one length, got {sorted(lengths)} tokens.")
    tokens = lengths.pop()
    curves = measure(subject, law.strategy, texts, by=law.by, query_blocks=query_blocks, on_progress=on_progress)
    return [_error(law, curves, tokens, recall) for recall in recalls]


def _error(law: LengthLaw, curves: Curves, tokens: int, target: float) -> LengthError:
    predicted, calibrated = law.values(target, tokens), curves.at_recall(target)
    reached = curves.at_values(predicted)
    least = _threshold_of(law.strategy).least
    ratios = [
        abs(math.log(group.value / predicted[group.layer, group.heads]))
        for group in calibrated.groups
        if group.value != least
    ]
    return LengthError(
        tokens=tokens,
        target=target,
        recall=reached.recall,
        calibrated_recall=calibrated.recall,
        density=reached.density,
        calibrated_density=calibrated.density,
        log_ratio=sum(ratios) / len(ratios) if ratios else 0.0,
    )


def _fit(points: dict[Place, list[tuple[float, float]]]) -> tuple[dict[Place, float], float]:
    """Factors of each place and one slope by least squares, see :class:`LengthLaw`."""
    means = {
        place: tuple(sum(x) / len(x) for x in zip(*found, strict=True)) for place, found in points.items() if found
    }
    above = sum((t - means[p][0]) * (y - means[p][1]) for p in means for t, y in points[p])
    below = sum((t - means[p][0]) ** 2 for p in means for t, _ in points[p])
    if not below:
        raise ValueError(
            "Too few heads need a threshold: the guards reach the recalls without one. Take longer texts, higher "
            "recalls or smaller guards."
        )
    b = above / below
    logs = {place: mean - b * recall for place, (recall, mean) in means.items()}
    common = sum(logs.values()) / len(logs)
    return {place: math.exp(logs.get(place, common)) for place in points}, b


def _threshold_of(strategy: Strategy) -> TunableOption:
    tunable = tunable_option_of(strategy)
    if tunable.scale != "log":
        names = ", ".join(name for name, other in tunable_options().items() if other.scale == "log")
        raise ValueError(
            f"A length law needs a threshold of scores, and {strategy.label}'s {tunable.option} isn't one. Strategies "
            f"with a threshold: {names}. Calibrate others at the length of the prompts."
        )
    return tunable
