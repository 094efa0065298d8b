"""Compare dense and sparse prefill of a long document: time, density, recall and the model's answer.

Hides a fact in a document, asks for it at the end, and reports the time that sparse prefill saves and what it changes.

    python recipes/demo.py --config recipes/configs/demo.yaml
    python recipes/demo.py --config recipes/configs/demo.yaml tokens=4000 strategy.gamma=0.9
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import sparse_prefill as sp
from sparse_prefill import plotting
from sparse_prefill.cli.recipe import DECODER, build, load_decoder, parse
from sparse_prefill.core.files import check_folder, read_text
from sparse_prefill.core.option_checks import check_nonnegative, check_tokens
from sparse_prefill.estimators import TrueMass
from sparse_prefill.evaluation import oracle_density, recall, true_mass
from sparse_prefill.evaluation.results import origin
from sparse_prefill.models.torchtune import Generation, generate, prefill, score, sparsify
from sparse_prefill.record import SparseCallTensors

PROMPT = ("document", "tokens", "code", "depth", "max_new_tokens")
KEYS = {*DECODER, "strategy", "model_name", *PROMPT, "repeats", "seed", "output_dir"}
STAGES = ("estimate", "select", "table", "kernel")
FACT = " The secret access code of the lighthouse is {code}. "
QUESTION = """

Question: What is the secret access code of the lighthouse mentioned in the text above?
Answer: The secret access code of the lighthouse is"""


@dataclass
class Inspection:
    """Density and recall of a recorded sparse prefill, layer by layer."""

    densities: list[Tensor] = field(default_factory=list)  # [heads] each
    recalls: list[float] = field(default_factory=list)
    oracle_densities: list[float] = field(default_factory=list)
    head: tuple[int, int, Tensor, Tensor, Tensor] | None = None  # layer, head, scores, keep, true mass


class DemoRecipe:
    """Runs the comparison, in the order of the printed table.

    Args:
        cfg (DictConfig): see ``recipes/configs/demo.yaml``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = torch.device(cfg.device)
        self.console = Console()
        check_tokens("repeats", cfg.repeats, least=1)
        check_nonnegative("depth", cfg.depth)
        if cfg.depth > 1:
            raise ValueError(f"depth must be 1 at most, the end of the document, got {cfg.depth}.")
        self.out = check_folder(cfg.output_dir)
        self.strategy = build(cfg, "strategy")

    def setup(self) -> None:
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        self.model, self.tokenizer, _ = load_decoder(cfg)
        self.prompt, self.answer = self._prompt()

    def run(self) -> dict[str, Any]:
        """Measure everything, print the table, write the report and the pictures."""
        cfg = self.cfg
        steps = 3 * cfg.repeats + 7
        columns = (TextColumn("{task.description:38}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=steps)

            def step(description: str, advance: int = 1) -> None:
                progress.update(task, description=description)
                progress.advance(task, advance)

            # 1. Density and recall of the sparse prefill; this run also compiles the kernel.
            step("compile, and measure recall", 0)
            inspection = self._inspect()
            # 2. Time both in turn, so that a change in the machine's load affects both.
            progress.advance(task, 2)
            runs: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
            for i in range(cfg.repeats):
                for name, run in runs.items():
                    step(f"prefill {i + 1} of {cfg.repeats}, {name}", 1 if name == "dense" else 2)
                    run.append(self._timed("dense" if name == "dense" else self.strategy))
            # 3. The model's answers.
            answers: dict[str, Generation] = {}
            for name, strategy in (("dense", "dense"), ("sparse", self.strategy)):
                step(f"answer, {name}")
                answers[name] = self._answer(strategy)
            # 4. The likelihood of the right answer inside the prefill.
            nll = {}
            for name, strategy in (("dense", "dense"), ("sparse", self.strategy), ("a_shape", "a_shape")):
                step(f"score the right answer, {name}")
                nll[name] = float(score(sparsify(self.model, strategy), self.prompt, self.answer).nll.mean())
            progress.update(task, description="done", completed=steps)
        report = self._report(inspection, runs, answers, nll)
        self._write(report, inspection)
        self._print(report)
        return report

    def source(self) -> dict[str, Any]:
        """Model, text and seed, for the report."""
        cfg = self.cfg
        return {
            "model": cfg.model_name,
            "text": Path(cfg.document).name if cfg.document else "pydoc",
            "seed": cfg.seed,
        }

    def _prompt(self) -> tuple[Tensor, Tensor]:
        """Prompt [1, tokens] and right answer [1, answer] as token ids."""
        cfg = self.cfg
        text = read_text(cfg.document, "document") if cfg.document else "\n".join(map(str, topics.topics.values()))
        encode = self.tokenizer.encode
        document = encode(" ".join(text.split()), add_bos=False, add_eos=False)
        fact, question, answer = (
            encode(part, add_bos=False, add_eos=False)
            for part in (FACT.format(code=cfg.code), QUESTION, f" {cfg.code}")
        )
        room = cfg.tokens - len(fact) - len(question)
        if len(document) < room:
            raise ValueError(f"The document has {len(document)} tokens; tokens={cfg.tokens} needs {room} of them.")
        place = int(cfg.depth * room)
        while place > 0 and "." not in self.tokenizer.decode([document[place - 1]]):  # after a sentence
            place -= 1
        prompt = document[:place] + fact + document[place:room] + question
        return torch.tensor([prompt], device=self.device), torch.tensor([answer], device=self.device)

    def _timed(self, strategy: sp.Strategy | str) -> dict[str, float]:
        """Seconds of one whole prefill, and of its attention stages; the sparse one includes the cost of recording."""
        model = sparsify(self.model, strategy)
        with sp.record() as calls:
            begin = time.perf_counter()
            prefill(model, self.prompt)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            whole = time.perf_counter() - begin
        return {"prefill": whole, **{s: sum(call.seconds.get(s, 0.0) for call in calls) for s in STAGES}}

    def _inspect(self) -> Inspection:
        found = Inspection()
        picture_layer = len(self.model.layers) // 3

        def inspect(call: sp.Call, seen: SparseCallTensors, prompt: sp.Prompt) -> None:
            q, k, keep = seen.q, seen.k, seen.keep
            blocks = sorted({round((i + 1) * prompt.n_q / 12) - 1 for i in range(12)})
            mass = true_mass(q, k, prompt, blocks)
            kept = float(recall(mass, keep, blocks).mean())
            layer = len(found.densities)
            found.densities.append(call.density[0].expand(q.shape[1]))
            found.recalls.append(kept)
            found.oracle_densities.append(oracle_density(mass, kept, prompt, blocks))
            if layer == picture_layer:
                head = int(call.density[0].expand(q.shape[1]).argsort()[q.shape[1] // 2])
                kv_head = head // (q.shape[1] // k.shape[1])
                scores = self.strategy.score_table(self.strategy.score(q, k, prompt), prompt)
                whole = TrueMass()(q[:, head : head + 1], k[:, kv_head : kv_head + 1], prompt)[0, 0]
                shape = (1, q.shape[1], prompt.n_q, prompt.n_k)
                found.head = (layer, head, scores.expand(shape)[0, head], keep.expand(shape)[0, head], whole)

        with sp.record(inspect=inspect) as calls:
            prefill(sparsify(self.model, self.strategy), self.prompt)
        dense = [call.dense for call in calls if call.dense]
        if dense:
            raise ValueError(f"The prefill ran dense ({dense[0]}), so there is nothing to compare: more tokens.")
        return found

    def _answer(self, strategy: sp.Strategy | str) -> Generation:
        stops = [self.tokenizer.eos_id] if self.tokenizer.eos_id is not None else []
        return generate(
            sparsify(self.model, strategy),
            self.prompt,
            max_new_tokens=self.cfg.max_new_tokens,
            stop_tokens=stops,
        )

    def _report(
        self,
        inspection: Inspection,
        runs: dict[str, list[dict[str, float]]],
        answers: dict[str, Generation],
        nll: dict[str, float],
    ) -> dict[str, Any]:
        median = {n: {key: statistics.median(r[key] for r in run) for key in run[0]} for n, run in runs.items()}
        attention = {name: sum(times[s] for s in STAGES) for name, times in median.items()}
        dense, sparse = (answers[name].prompt_logits[0].log_softmax(-1) for name in ("dense", "sparse"))
        return {
            **origin(shlex.join(["python", "recipes/demo.py", *sys.argv[1:]]), self.device, **self.source()),
            "tokens": self.prompt.shape[1],
            "strategy": repr(self.strategy),
            "density": float(torch.stack(inspection.densities).mean()),
            "recall": statistics.mean(inspection.recalls),
            "oracle_density": statistics.mean(inspection.oracle_densities),
            "expected": str(self.cfg.code),
            "answer": {
                n: self.tokenizer.decode(a.tokens[0].tolist()).split("\n")[0].strip() for n, a in answers.items()
            },
            "answer_nll": nll,
            "next_token": {
                "kl_divergence": float((dense.exp() * (dense - sparse)).sum()),
                "same_top": bool(dense.argmax() == sparse.argmax()),
            },
            "seconds": {name: times["prefill"] for name, times in median.items()},
            "attention_seconds": {
                "dense": attention["dense"],
                "sparse": attention["sparse"],
                **{stage: median["sparse"][stage] for stage in STAGES},
            },
            "speedup": {
                "prefill": median["dense"]["prefill"] / median["sparse"]["prefill"],
                "attention": attention["dense"] / attention["sparse"],
            },
            "repeats": self.cfg.repeats,
            "dtype": self.cfg.dtype,
        }

    def _write(self, report: dict[str, Any], inspection: Inspection) -> None:
        out = self.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        plotting.density_map(torch.stack(inspection.densities)).savefig(out / "density.png", dpi=120)
        assert inspection.head is not None
        layer, head, scores, keep, mass = inspection.head
        figure = plotting.head_map(scores, keep, mass, f"{self.strategy.name}, layer {layer}, head {head}")
        figure.savefig(out / "head.png", dpi=120)

    def _print(self, report: dict[str, Any]) -> None:
        table = Table(title=f"{self.strategy.name} against dense, {report['tokens']:,} tokens", title_justify="left")
        for column in ("", "dense", "sparse", ""):
            table.add_column(column, justify="left" if not column else "right")
        seconds, attention, speedup = report["seconds"], report["attention_seconds"], report["speedup"]
        nll, answer = report["answer_nll"], report["answer"]
        right = {name: "right" if report["expected"] in text else "WRONG" for name, text in answer.items()}
        rows = [
            ("density (blocks computed)", "1.00", f"{report['density']:.2f}", ""),
            ("recall of attention mass", "1.00", f"{report['recall']:.3f}", "12 query blocks a layer"),
            ("density of an oracle", "", f"{report['oracle_density']:.2f}", "at this recall"),
            (
                "attention",
                f"{attention['dense']:.2f} s",
                f"{attention['sparse']:.2f} s",
                f"{speedup['attention']:.2f}x",
            ),
            *((f"  {stage}", "", f"{attention[stage]:.2f} s", "") for stage in STAGES),
            ("whole prefill", f"{seconds['dense']:.2f} s", f"{seconds['sparse']:.2f} s", f"{speedup['prefill']:.2f}x"),
            ("answer", answer["dense"], answer["sparse"], f"expected {report['expected']}"),
            ("", right["dense"], right["sparse"], ""),
            ("NLL of the right answer", f"{nll['dense']:.3f}", f"{nll['sparse']:.3f}", "per token, in the prefill"),
            ("  the same with a_shape", "", f"{nll['a_shape']:.3f}", "that loses the fact"),
            ("next-token KL divergence", "", f"{report['next_token']['kl_divergence']:.4f}", "nats"),
        ]
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        self.console.print(f"Report and pictures: {self.cfg.output_dir}")


@parse(KEYS)
def main(cfg: DictConfig) -> None:
    recipe = DemoRecipe(cfg=cfg)
    recipe.setup()
    recipe.run()


if __name__ == "__main__":
    main()
