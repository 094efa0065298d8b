"""The page on tasks shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def dense_nll(name: str) -> list[str]:
    report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    rows = {row["task"]: row["nll"] for row in report["tasks"]["summary"] if row["strategy"] == "dense"}
    return [f"{rows[task]:.2f}" for task in ("niah_single_2", "niah_multikey_1", "niah_single_1")]


def test_plain_text_is_compared_with_the_chat_template():
    page = " ".join((ROOT / "docs" / "tasks.md").read_text().split())
    plain, chat = (dense_nll(f"tasks_smollm2_2k{end}") for end in ("_plain", ""))
    told = "is {}, {} and {}, in place of {}, {} and {}.".format(*plain, *chat)
    assert told in page, f"docs/tasks.md should say: {told}"


def test_the_table_is_that_of_the_committed_results():
    page = (ROOT / "docs" / "tasks.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "tasks_smollm2_2k.json").read_text())
    rows = {(row["task"], row["strategy"]): row for row in report["tasks"]["summary"]}
    _, flex, window = names = ("dense", "flex_prefill", "a_shape:local=512")
    lines = [
        f"| task | density of `{flex}` | of `{window}` | exact: dense | `{flex}` | `{window}` "
        f"| NLL: dense | `{flex}` | `{window}` | beyond the model |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in sorted({task for task, _ in rows}):
        dense, *others = (rows[task, name] for name in names)
        cells = [f"{row['density']:.2f}" for row in others]
        cells += [f"{row['exact']:.2f}" for row in (dense, *others)]
        cells += [f"{row['nll']:.2f}" for row in (dense, *others)]
        lines.append(f"| `{task}` | {' | '.join(cells)} | {'yes' if dense['beyond_model'] else ''} |")
    table = "\n".join(lines)
    assert f"\n{table}\n" in page, f"docs/tasks.md should have\n{table}"
    assert report["command"] in page
