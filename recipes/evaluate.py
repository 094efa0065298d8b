"""Measure strategies on a real model: density, recall, time, and how well the model still answers.

Hides facts in real texts and asks for them. The answers are inside the sparse prefill, and no row runs dense. Each
strategy's row is written when it is measured, and a second run goes on where the first one stopped. ``sparse-prefill
eval`` measures the same without a configuration file.

    python recipes/evaluate.py --config recipes/configs/evaluate_smollm2.yaml
    python recipes/evaluate.py --config recipes/configs/evaluate_smollm2.yaml 'strategies=[flex_prefill,a_shape]'
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import sparse_prefill as sp
from sparse_prefill.cli.evaluate import conclude, print_report
from sparse_prefill.cli.progress import Progress
from sparse_prefill.cli.recipe import build, parse
from sparse_prefill.core.files import check_output
from sparse_prefill.evaluation.results import Results, machine
from sparse_prefill.evaluation.run import measure_texts, saved_head_table, text_with_facts, without_dense_rows
from sparse_prefill.evaluation.run_times import measure_times
from sparse_prefill.evaluation.texts import FactText
from sparse_prefill.head_table import load_table
from sparse_prefill.kernel.compiled import check_can_run

COMPARED = ("strategies", "options", "more")
TEXTS = ("tokens", "facts", "texts", "seed", "heads_text")
KEYS = {"model_name", "model", *COMPARED, *TEXTS, "repeats", "time_every", "device", "dtype", "output"}


class EvaluateRecipe:
    """Runs every strategy over every text, then times the attention of all of them in turn.

    Args:
        cfg (DictConfig): see ``recipes/configs/evaluate_smollm2.yaml``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.table = Path(cfg.output).with_suffix(".heads.tsv")

    def setup(self) -> None:
        """Load the model, and the report if there is one."""
        cfg = self.cfg
        check_output(cfg.output)
        check_can_run()
        self.subject = build(cfg, "model")
        settings = {key: cfg[key] for key in ("tokens", "facts", "dtype", "seed")}
        settings |= {"model": cfg.model_name, "texts": OmegaConf.to_container(cfg.texts)}
        command = shlex.join(["python", "recipes/evaluate.py", *sys.argv[1:]])
        self.is_new = not Path(cfg.output).exists()
        self.results = Results(cfg.output, settings, {"command": command, **machine(cfg.device)})

    def run(self) -> dict[str, str]:
        """Measure the strategies that the report lacks; returns the failures by strategy."""
        cfg = self.cfg
        texts = [self.text(text) for text in OmegaConf.to_container(cfg.texts)]
        strategies = self.strategies()
        with Progress() as progress:
            failures = measure_texts(self.subject, strategies, texts, self.results, seed=cfg.seed, on_step=progress)
            if cfg.repeats:
                fit = {name: strategy for name, strategy in strategies.items() if name not in failures}
                tokens, every = texts[0].tokens, cfg.time_every
                measure_times(
                    self.subject, fit, tokens, self.results, repeats=cfg.repeats, every=every, on_step=progress
                )
        return failures

    def text(self, settings: dict[str, Any]) -> FactText:
        """A text with hidden facts."""
        cfg = self.cfg
        return text_with_facts(self.subject, settings, tokens=cfg.tokens, facts=cfg.facts, seed=cfg.seed)

    def strategies(self) -> dict[str, sp.Strategy]:
        """The strategies of the configuration, or all, by the names of their rows."""
        names = self.cfg.strategies
        names = sp.list_strategies() if names is None else OmegaConf.to_container(names)
        adapted = OmegaConf.to_container(self.cfg.options)
        entries = [{"name": name, **adapted.get(name, {})} for name in names if name != "dense"]
        found = {}
        for entry in [*entries, *OmegaConf.to_container(self.cfg.more)]:
            options = dict(entry)
            row = options.pop("row", options["name"])
            found[row] = without_dense_rows(options, self.head_table)
        return found

    def head_table(self) -> Path:
        """The table of heads, estimated on a separate text unless it is there already."""
        if self.table.exists():
            load_table(self.table)  # raises ValueError if it is damaged
            return self.table
        text = self.text(OmegaConf.to_container(self.cfg.heads_text))
        return saved_head_table(self.subject, text.tokens, self.table)


@parse(KEYS)
def main(cfg: DictConfig) -> int:
    recipe = EvaluateRecipe(cfg=cfg)
    recipe.setup()
    failures = recipe.run()
    results = recipe.results
    return conclude("evaluate.py", results, failures, lambda: print_report(results.content), is_new=recipe.is_new)


if __name__ == "__main__":
    main()
