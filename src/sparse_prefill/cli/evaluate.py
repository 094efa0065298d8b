"""Measure strategies on your model: density, recall, time, and how well the model still answers.

Each text hides facts and asks for them at its end. The answers are inside the sparse prefill, and no row runs dense, so
the model can find a fact only through the blocks that are computed. --tasks scores tasks of the RULER family, too;
without --text, it scores only these. The dense model is always measured for comparison.

Results are written after each step. After Ctrl-C, the same command goes on with the steps that are left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_prefill.cli.arguments import (
    add_machine,
    add_model,
    add_strategies,
    command_line,
    count,
    fraction,
    load_model,
    number,
)
from sparse_prefill.cli.evaluation_tables import print_report
from sparse_prefill.cli.output import add_json
from sparse_prefill.cli.progress import Progress
from sparse_prefill.core.files import check_output
from sparse_prefill.kernel.compiled import check_can_run
from sparse_prefill.plan import Plan
from sparse_prefill.spec import is_plan, parse_options, parse_strategy
from sparse_prefill.strategy import Strategy, list_strategies

if TYPE_CHECKING:
    from sparse_prefill.evaluation.results import Results
    from sparse_prefill.evaluation.texts import FactText
    from sparse_prefill.models.eval_model import EvalModel

DEFAULTS = ("flex_prefill", "mean_slash", "flash_prefill", "xattention", "a_shape", "oracle")
HEADS_TEXT = {"name": "heads", "files": ["pydoc"], "skip": 80_000}  # the text that tables of heads are estimated on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_strategies(parser, f"{', '.join(DEFAULTS)}; `all` for every strategy")
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text",
        action="append",
        dest="texts",
        metavar="FILE",
        help="a text to hide facts in: a file, `pydoc` (the reference that comes with Python) or `stdlib:MODULE`; may "
        "be given several times. Default: pydoc",
    )
    texts.add_argument("--tokens", type=count, default=4096, metavar="N", help="tokens of each text. Default: 4096")
    texts.add_argument("--facts", type=count, default=1, metavar="N", help="facts in each text. Default: 1")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="e.g. niah_multikey_1; `all` for all")
    tasks.add_argument("--lengths", type=count, nargs="+", default=[4096], metavar="N", help="in tokens. Default: 4096")
    tasks.add_argument("--samples", type=count, default=5, metavar="N", help="per task and length. Default: 5")
    tasks.add_argument(
        "--depths",
        type=fraction,
        nargs="+",
        default=[],
        metavar="X",
        help="depths of the needle, 0 to 1, for a grid. Default: random",
    )
    tasks.add_argument("--haystack", metavar="FILE", help="text to hide needles in. Default: pydoc")
    tasks.add_argument("--no-generation", action="store_true", help="score answers only inside the prefill")
    tasks.add_argument("--plain", action="store_true", help="ask in plain text, without the model's chat template")
    times = parser.add_argument_group("times")
    times.add_argument(
        "--repeats", type=number, default=0, metavar="N", help="timed runs of attention. Default: 0, none"
    )
    times.add_argument("--every", type=count, default=3, metavar="N", help="time one layer in N. Default: 3")
    add_machine(parser)
    parser.add_argument("--seed", type=number, default=0, help="default: 0")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: outputs/eval_MODEL.json")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from sparse_prefill.evaluation.results import Results, dumps, machine
    from sparse_prefill.tasks import list_tasks

    specs = options.strategies or list(DEFAULTS)
    specs = [name for name in list_strategies() if name != "dense"] if specs == ["all"] else specs
    options.tasks = list_tasks() if options.tasks == ["all"] else options.tasks
    _check(options, specs)
    of_texts = _texts(options) if options.texts or not options.tasks else {}
    with Progress() as progress:
        subject = load_model(options, progress)
        path = options.output or Path("outputs") / f"eval_{subject.name}.json"
        of_tasks = {"plain": options.plain, "haystack": options.haystack or "pydoc"} if options.tasks else {}
        settings = {"model": subject.name, **of_texts, **of_tasks, "dtype": options.dtype, "seed": options.seed}
        is_new = not path.exists()
        results = Results(path, settings, {"command": command_line(options), **machine(subject.device)})
        try:
            failures = _measure(options, subject, specs, of_texts.get("texts", []), results, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {path} has the finished steps, and the same command goes on with the others"
            ) from None

    def show() -> None:
        if options.json:
            print(dumps(results.content))
        else:
            print_report(results.content)
            print(f"\n{path}")

    return conclude("sparse-prefill", results, failures, show, is_new=is_new)


def conclude(
    program: str, results: Results, failures: Mapping[str, str], show: Callable[[], None], *, is_new: bool
) -> int:
    """Show what was measured and say what failed.

    The report lists failures under "failures". A new report of the dense model only, where every strategy failed, is
    neither shown nor kept.

    Args:
        program (str): name in front of each line about a failure.
        results (Results): the report.
        failures (Mapping[str, str]): what went wrong, by strategy.
        show (Callable[[], None]): prints the report.
        is_new (bool): whether this run made the report's file.

    Returns:
        int: the exit code: 1 if anything failed, else 0.
    """
    content = results.content
    measured = {row["name"] for row in content["rows"]}
    measured |= {one["strategy"] for one in content.get("tasks", {}).get("results", [])}
    now = {name: " ".join(reason.split()) for name, reason in failures.items()}
    if now and is_new and measured <= {"dense"}:
        results.path.unlink(missing_ok=True)
    else:
        earlier = content.pop("failures", {})
        if failed := {
            name: reason for name, reason in {**earlier, **now}.items() if name in now or name not in measured
        }:
            content["failures"] = failed
        if failed != earlier:
            results.write()
        show()
    for reason in dict.fromkeys(now.values()):
        names = ", ".join(name for name in now if now[name] == reason)
        print(f"{program}: {names} failed: {reason}", file=sys.stderr)
    return 1 if now else 0


def _check(options: argparse.Namespace, specs: list[str]) -> None:
    """Raise ValueError for wrong options before a model is loaded."""
    from sparse_prefill.tasks import list_tasks

    if options.output:
        check_output(options.output, [options.model, options.haystack, *(options.texts or [])])
    for spec in specs:
        parse_strategy(spec)
        if specs.count(spec) > 1:
            raise ValueError(f"The strategy {spec!r} is given twice: leave one out.")
    for task in options.tasks:
        if task not in list_tasks():
            raise ValueError(f"There is no task {task!r}. There are: {', '.join(list_tasks())}.")
    if set(specs) != {"dense"}:
        check_can_run()


def _texts(options: argparse.Namespace) -> dict[str, Any]:
    texts = [
        {"name": Path(source.removeprefix("stdlib:")).stem, "files": [source]} for source in options.texts or ["pydoc"]
    ]
    names = [str(text["name"]) for text in texts]
    if len(set(names)) < len(names):
        raise ValueError(f"Two texts have the same name, which results are listed by: {', '.join(names)}.")
    return {"tokens": options.tokens, "texts": texts, "facts": options.facts}


def _measure(
    options: argparse.Namespace,
    subject: EvalModel,
    specs: list[str],
    texts: list[dict[str, Any]],
    results: Results,
    progress: Progress,
) -> dict[str, str]:
    from sparse_prefill.evaluation.run import measure_texts, saved_head_table, text_with_facts, without_dense_rows
    from sparse_prefill.evaluation.run_tasks import measure_tasks
    from sparse_prefill.evaluation.run_times import measure_times

    def text(settings: Mapping[str, Any]) -> FactText:
        return text_with_facts(subject, settings, tokens=options.tokens, facts=options.facts, seed=options.seed)

    def head_table() -> Path:
        return saved_head_table(subject, text(HEADS_TEXT).tokens, results.path.with_suffix(".heads.tsv"))

    # Plans are measured unchanged, and strategies without dense last rows unless the spec sets ``last``.
    strategies: dict[str, Strategy | Plan] = {
        spec: parse_strategy(spec) if is_plan(spec) else without_dense_rows(parse_options(spec), head_table)
        for spec in specs
    }
    failures: dict[str, str] = {}
    if texts:
        progress(0, 0, "read texts")
        with_facts = [text(one) for one in texts]
        failures |= measure_texts(subject, strategies, with_facts, results, seed=options.seed, on_step=progress)
        if options.repeats:
            fit = {name: one for name, one in strategies.items() if name not in failures}
            measure_times(
                subject,
                fit,
                with_facts[0].tokens,
                results,
                repeats=options.repeats,
                every=options.every,
                on_step=progress,
            )
    if options.tasks:
        failures |= measure_tasks(
            subject,
            {name: one for name, one in strategies.items() if name not in failures},
            options.tasks,
            results,
            lengths=options.lengths,
            samples=options.samples,
            depths=options.depths,
            generate=not options.no_generation,
            chat=not options.plain,
            seed=options.seed,
            haystack=options.haystack,
            on_step=progress,
        )
    return failures
