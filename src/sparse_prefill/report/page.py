"""The HTML page of an evaluation: numbers, pictures, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_prefill.evaluation.dense_layers import ran_dense, ranges, sliding_windows
from sparse_prefill.report.figures import Picture, figures_of, speedups_of, svg
from sparse_prefill.report.style import CSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Columns: the key in a row, the heading, the format and the meaning.
DENSE_LAYERS = ("ran_dense", "dense layers", "{}", "Layers that ran dense, by the reason; they count in all numbers.")
ROWS = (
    DENSE_LAYERS,
    ("density", "density", "{:.2f}", "Share of the visible blocks that is computed."),
    ("recall", "recall", "{:.3f}", "Share of the true attention in the kept blocks."),
    ("worst_recall", "worst recall", "{:.3f}", "Mean recall of the worst 1 % of query blocks, heads and layers."),
    (
        "oracle_density",
        "oracle's density",
        "{:.2f}",
        "The smallest density of any table with this recall.",
    ),
    ("oracle_gap", "gap", "{:.2f}x", "Density over the oracle's density, in the same query blocks."),
    ("overlap", "overlap", "{:.2f}", "Share of the kept blocks that are also in the best table of the same size."),
    (
        "output_error",
        "output error",
        "{:.3f}",
        "Norm of the difference from dense attention, over its norm.",
    ),
    (
        "kl_last_token",
        "KL, nats",
        "{:.3f}",
        "Divergence from the dense model at the answers' first tokens.",
    ),
    ("needle_nll", "needle NLL", "{:.2f}", "Negative log-likelihood of the answers inside the prefill, per token."),
    ("needle_exact", "answers right", "{:.0%}", "Share of the answers whose tokens are all the likeliest."),
    ("perplexity_ratio", "perplexity", "{:.3f}x", "Perplexity of the texts' second halves, over the dense model's."),
    ("perplexity_ratio_whole", "whole text", "{:.3f}x", "Perplexity of the whole texts, over the dense model's."),
    (
        "perplexity_ratio_last_quarter",
        "last quarter",
        "{:.3f}x",
        "Perplexity of the last quarters, over the dense model's.",
    ),
    ("estimate_ms", "estimate, ms", "{:.1f}", "Milliseconds per layer for scores of blocks."),
    ("select_ms", "select, ms", "{:.1f}", "Milliseconds per layer for the selection."),
    ("table_ms", "table, ms", "{:.1f}", "Milliseconds per layer for the block lists."),
    ("kernel_ms", "kernel, ms", "{:.1f}", "Milliseconds per layer for attention over the kept blocks."),
    ("attention_ms", "attention, ms", "{:.1f}", "Milliseconds per layer for the whole call, in separate runs."),
    ("speedup_attention", "against SDPA", "{:.2f}x", "Time of dense attention over that of the whole call."),
)
TASKS = (
    ("task", "task", "{}", "A task of the RULER family."),
    ("length", "tokens", "{:,}", "Tokens of prompt and answer."),
    ("strategy", "strategy", "{}", "The strategy, as in the table above."),
    ("samples", "samples", "{}", "Number of prompts."),
    DENSE_LAYERS,
    ("density", "density", "{:.2f}", "Share of the visible blocks that is computed."),
    ("accuracy", "accuracy", "{:.0%}", "Share of the answers that the model writes, with dense decoding."),
    ("dense_accuracy", "dense", "{:.0%}", "Accuracy of the dense model."),
    ("exact", "exact", "{:.0%}", "Share of the answers whose tokens are all the likeliest inside the prefill."),
    ("nll", "NLL", "{:.2f}", "Negative log-likelihood of the answers inside the prefill, per token."),
    (
        "beyond_model",
        "beyond the model",
        "{}",
        "The dense model scores under 50 %: the row tells nothing.",
    ),
)
SHOWN_ELSEWHERE = ("rows", "tasks", "lengths", "strategies", "oracle", "failures")  # not among the settings


def write_report(results: Mapping[str, Any], path: str | Path, figures: Mapping[str, Figure] | None = None) -> None:
    """Write the results of an evaluation as one HTML file.

    The file loads nothing and runs no script. It shows the measures of each strategy, strategies that failed, layers
    that ran dense, the frontier, maps of layers and heads, tasks and grids of needles, speed-up over length, and the
    settings of the measurement; sections without results are left out.

    Args:
        results (Mapping[str, Any]): the results of ``sparse-prefill eval --json``: "rows" with a "name" each, and
            perhaps "tasks" and "failures". Or those of ``benchmarks/crossover.py``: "lengths", and "strategies" with a
            "speedup" each. All other keys are settings.
        path (str | Path): the file to write.
        figures (Mapping[str, Figure] | None): more pictures, by their captions. Default: none.

    Raises:
        ValueError: if the results have another form, or hold nothing to show.

    Example:
        >>> write_report(json.loads(Path("outputs/eval.json").read_text()), "outputs/eval.html")
    """
    rows, tasks = ([{**row, "ran_dense": ran_dense(row)} for row in part] for part in checked(results))
    pictures = figures_of(results)
    pictures += [Picture("", "", caption, figure) for caption, figure in (figures or {}).items()]
    of = [f"{results['tokens']:,} tokens"] if isinstance(results.get("tokens"), int) else []
    of += [str(results[key]) for key in ("dtype", "device", "date") if key in results]
    title = f"Sparse prefill of {results.get('model', 'a model')}"
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(' · '.join(of))}</p>"]
    body += _failures(results.get("failures", {}))
    if rows:
        body += ["<h2>Strategies</h2>", _table("strategies", _named(rows), rows)]
    body += _figures("Frontier", pictures, "frontier")
    if tasks:
        body += ["<h2>Tasks</h2>", _table("tasks", _present(TASKS, tasks), tasks)]
    body += _dense_layers([*rows, *tasks])
    body += _figures("Needles", pictures, "needles")
    body += _figures("Speed", pictures, "speedup")
    body += _figures("Layers and heads", pictures, "density", "recall")
    body += _figures("More", pictures, "")
    body += ["<h2>Settings</h2>", _settings(results)]
    if any(row.get("options") for row in rows):
        body += ["<h2>Options</h2>", _options(rows)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(_PAGE.format(title=escape(title), style=CSS, body="\n".join(body)), encoding="utf-8")


def checked(results: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Rows of strategies and of tasks; ValueError if there are neither, nor times by length."""
    rows = results.get("rows", []) if isinstance(results, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "name" in row for row in rows):
        raise ValueError('Results of an evaluation are a mapping whose "rows" are mappings with a "name" each.')
    tasks = results.get("tasks", {}).get("summary", [])
    if not rows and not tasks and not speedups_of(results):
        raise ValueError("There is nothing to report: no rows, no tasks and no times.")
    return rows, tasks


def _named(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    return [("name", "strategy", "{}", "A method and its settings."), *_present(ROWS, rows)]


def _present(columns: Sequence[tuple[str, str, str, str]], rows: Sequence[Mapping[str, Any]]):
    """Columns for which some row has a value."""
    return [column for column in columns if any(row.get(column[0]) is not None for row in rows)]


def _table(name: str, columns: Sequence[tuple[str, str, str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows, whose cells have unrounded values in ``data-value``, and the meanings of its columns."""
    head = "".join(f'<th scope="col" data-key="{key}">{escape(heading)}</th>' for key, heading, _, _ in columns)
    body = "".join(
        f"<tr>{''.join(_cell(row.get(key), form, i == 0) for i, (key, _, form, _) in enumerate(columns))}</tr>"
        for row in rows
    )
    meanings = "".join(f"<dt>{escape(heading)}</dt><dd>{escape(meaning)}</dd>" for _, heading, _, meaning in columns)
    return (
        f'<div class="wide"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    )


def _cell(value: Any, form: str, first: bool) -> str:
    tag = 'th scope="row"' if first else "td"
    if value is None:
        return f"<{tag}></{tag[:2]}>"
    if isinstance(value, bool):
        shown = "yes" if value else "no"
    else:
        shown = value if isinstance(value, str) else form.format(value)
    return f'<{tag} data-value="{escape(str(value))}">{escape(shown)}</{tag[:2]}>'


def _figures(title: str, pictures: Sequence[Picture], *kinds: str) -> list[str]:
    """A section with the pictures of some kinds; nothing without any."""
    of = [
        f"<figure>{svg(picture.figure, picture.caption)}<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
        if picture.kind in kinds
    ]
    return [f"<h2>{title}</h2>", f'<div class="figures">{"".join(of)}</div>'] if of else []


def _failures(failures: Mapping[str, str]) -> list[str]:
    """A section on strategies that failed; nothing without any."""
    if not failures:
        return []
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(error)}</dd>" for name, error in failures.items())
    return ["<h2>Failed strategies</h2>", f'<dl id="failures">{terms}</dl>']


def _dense_layers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sliding windows, and the layers that ran dense in each row, once for equal ones; nothing without any."""
    found: dict[str, str] = {}
    for row in rows:
        if row["ran_dense"]:
            layers = "; ".join(f"{reason} {ranges(of)}" for reason, of in row["dense_layers"].items())
            found.setdefault(row.get("name") or row["strategy"], layers)
    windows = sliding_windows(rows)
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(layers)}</dd>" for name, layers in found.items())
    body = [f"<p>{escape(windows)}</p>"] if windows else []
    if terms:
        body.append(f'<details><summary>Layers that ran dense</summary><dl id="dense">{terms}</dl></details>')
    return ["<h2>Dense layers and sliding windows</h2>", *body] if body else []


def _settings(results: Mapping[str, Any]) -> str:
    """Model, texts, machine, versions and commands."""
    terms = []
    for key, value in results.items():
        if key not in SHOWN_ELSEWHERE:
            shown = value if isinstance(value, str) else json.dumps(value)
            terms.append(f"<dt>{escape(str(key))}</dt><dd><code>{escape(shown)}</code></dd>")
    return f'<dl id="settings">{"".join(terms)}</dl>'


def _options(rows: Sequence[Mapping[str, Any]]) -> str:
    terms = [
        f"<dt>{escape(row['name'])}</dt><dd><code>{escape(json.dumps(row.get('options', {})))}</code></dd>"
        for row in rows
    ]
    return f'<details><summary>Options of each strategy</summary><dl id="options">{"".join(terms)}</dl></details>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
