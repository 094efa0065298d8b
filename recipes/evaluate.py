"""Measure strategies on a real model: what they keep, what they cost, and what the model still knows.

Hides facts in real texts and asks for them; the answers stand inside the sparse prefill, and no rows are granted dense
attention. Each strategy's row is written as soon as it is known, and a second run goes on where the first one stopped.

    python recipes/evaluate.py --config recipes/configs/evaluate_smollm2.yaml
    python recipes/evaluate.py --config recipes/configs/evaluate_smollm2.yaml 'strategies=[flex_prefill,a_shape]'
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torchtune import config, training

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.evaluation import oracle_density, recall, true_mass
from sparse_prefill.head_table import save_table, window_loss
from sparse_prefill.logits import PLAIN
from sparse_prefill.models.torchtune import likelihood, prefill, sparsify
from sparse_prefill.record import Seen
from sparse_prefill.strategy import as_strategy, to_config

STAGES = ("estimate", "select", "table", "kernel")
PLACES = ("lighthouse", "observatory", "bakery", "harbour", "museum", "quarry")
FACT = " The secret access code of the {place} is {code}. "
QUESTION = "\n\nQuestion: What is the secret access code of the {place} mentioned in the text above?\nAnswer:"
ANSWER = " The secret access code of the {place} is"


@dataclass
class Prompt:
    """A text with facts in its first half, and questions about them with their answers at its end."""

    name: str
    tokens: Tensor  # [1, n]
    answers: list[range]  # where the codes of the answers stand
    second_half: range  # of the text alone, without questions


@dataclass
class Kept:
    """What the calls of some sparse prefills kept; one number for each layer and prompt."""

    density: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    oracle_density: list[float] = field(default_factory=list)
    output_error: list[float] = field(default_factory=list)

    def inspect(self, call: sp.Call, seen: Seen, prompt: sp.Prompt) -> None:
        blocks = sorted({round((i + 1) * prompt.n_q / 6) - 1 for i in range(6)})
        mass = true_mass(seen.q, seen.k, prompt, blocks)
        kept = float(recall(mass, seen.keep, blocks).mean())
        self.density.append(float(call.density.mean()))
        self.recall.append(kept)
        self.oracle_density.append(oracle_density(mass, kept, prompt, blocks))
        self.output_error.append(output_error(seen, prompt, blocks))


def output_error(seen: Seen, prompt: sp.Prompt, blocks: list[int]) -> float:
    """Norm of the difference to dense attention over the norm of dense attention, over some query blocks."""
    difference = norm = 0.0
    for block in blocks:
        rows = slice(block * prompt.block_size, (block + 1) * prompt.block_size)
        positions = prompt.query_positions(seen.q.device)[rows]
        keys = torch.arange(min(prompt.kv_len, rows.stop + prompt.offset), device=seen.q.device)
        allowed = prompt.may_attend(positions, keys)
        k, v = seen.k[:, :, : len(keys)], seen.v[:, :, : len(keys)]
        dense = F.scaled_dot_product_attention(seen.q[:, :, rows], k, v, attn_mask=allowed, enable_gqa=True).float()
        difference += float((seen.out[:, :, rows].float() - dense).square().sum())
        norm += float(dense.square().sum())
    return (difference / norm) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Capture(sp.Strategy):
    """Dense attention that leaves the queries, keys and values of some layers in a dict, by layer."""

    into: dict[int, tuple[Tensor, Tensor, Tensor]]
    every: int = 1
    index: int = 0

    def for_layer(self, layer: sp.Layer) -> sp.Strategy:
        return Capture(into=self.into, every=self.every, index=layer.index, min_length=0)

    def keep(self, q: Tensor, k: Tensor, prompt: sp.Prompt | None = None) -> Tensor:
        return self.prompt_for(q, k, prompt).visible(q.device)

    def attend(self, q, k, v, keep, *, prompt, logits=PLAIN, segments=()) -> Tensor:
        if self.index % self.every == 0:
            self.into[self.index] = q.contiguous(), k.contiguous(), v.contiguous()
        return sp.dense_attention(q, k, v, prompt=prompt, logits=logits)


class EvaluateRecipe:
    """Runs every strategy over every prompt, then times the attention of all of them in turn.

    Args:
        cfg (DictConfig): see ``recipes/configs/evaluate_smollm2.yaml``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = torch.device(cfg.device)
        self.dtype = training.get_dtype(dtype=cfg.dtype, device=self.device)
        self.console = Console()
        # torchtune normalises in fp32 on purpose; torch notes that it has no fused kernel for that.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

    def setup(self) -> None:
        """Build the model, the prompts and the strategies."""
        cfg = self.cfg
        with training.set_default_dtype(self.dtype), self.device:
            self.model = config.instantiate(cfg.model)
        self.model.load_state_dict(config.instantiate(cfg.checkpointer).load_checkpoint()["model"])
        self.model.eval()
        self.tokenizer = config.instantiate(cfg.tokenizer)
        self.prompts = [self._prompt(**text) for text in cfg.texts]
        self.table = Path(cfg.output).with_suffix(".heads.tsv")
        self.strategies = self._strategies()

    def run(self) -> dict[str, Any]:
        """Measure what isn't in the report yet, and write it."""
        report = self._report()
        known = {row["name"]: row for row in report["rows"]}
        names = [name for name in self.strategies if "recall" not in known.get(name, {})]
        dense = self._dense_reference()
        with self._progress() as advance:
            for name in advance(names):
                # In the order of the list, whatever was measured first.
                known[name] = {**known.get(name, {}), **self._quality(name, dense)}
                self._write(report, known)
        if self.cfg.repeats and any("speedup_attention" not in known[name] for name in self.strategies):
            for name, times in self._times().items():
                known[name].update(times)
            self._write(report, known)
        self.console.print(self._summary(report))
        return report

    # Prompts and strategies -------------------------------------------------------------------------------

    def _prompt(self, name: str, files: list[str], skip: int = 0) -> Prompt:
        """A text of ``tokens`` tokens, questions and answers included, that begins ``skip`` tokens into the files."""
        cfg, encode = self.cfg, self._encode
        text = encode("\n\n".join(source(pattern) for pattern in files))[skip:]
        codes = [str(10**6 + (7919 * (i + 1) * (skip + 104_729)) % (9 * 10**6)) for i in range(cfg.facts)]
        facts = [encode(FACT.format(place=place, code=code)) for place, code in zip(PLACES, codes, strict=False)]
        end: list[int] = []
        answers = []
        for place, code in zip(PLACES, codes, strict=False):
            end += encode(QUESTION.format(place=place)) + encode(ANSWER.format(place=place))
            answers.append(range(len(end), len(end) + len(encode(f" {code}"))))
            end += encode(f" {code}")
        room = cfg.tokens - len(end) - sum(map(len, facts))
        if len(text) < room:
            raise ValueError(f"The text {name} has {len(text)} tokens; tokens={cfg.tokens} wants {room} of them.")
        ids: list[int] = []
        begin = 0
        for i, fact in enumerate(facts):  # at even depths in the first half
            place = int((i + 0.5) / len(facts) * room / 2)
            ids += text[begin:place] + fact
            begin = place
        ids += text[begin:room]
        start = len(ids)
        shifted = [range(a.start + start, a.stop + start) for a in answers]
        return Prompt(name, torch.tensor([ids + end], device=self.device), shifted, range(start // 2, start))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False, add_eos=False)

    def _strategies(self) -> dict[str, sp.Strategy]:
        """By the name of its row: "dense", then those of the configuration, or all there are."""
        names = self.cfg.strategies
        names = sp.list_strategies() if names is None else OmegaConf.to_container(names)
        adapted = OmegaConf.to_container(self.cfg.options)
        entries = [{"name": name, **adapted.get(name, {})} for name in names if name != "dense"]
        found = {"dense": sp.get_strategy("dense")}
        for entry in [*entries, *OmegaConf.to_container(self.cfg.more)]:
            options = dict(entry)
            name = options.pop("row", options["name"])
            found[name] = self._ready(options)
        return found

    def _ready(self, options: Mapping[str, Any]) -> sp.Strategy:
        """A strategy with no dense rows granted, and with a table of heads where it needs one."""
        options = dict(options)
        if "of" in options:
            return as_strategy({**options, "of": self._ready(options["of"])})
        known = registry.strategies.options(options["name"])
        if "table" in known and not options.get("table"):
            options["table"] = str(self._head_table())
        if "last" in known:
            options.setdefault("last", 0)
        return as_strategy(options)

    def _head_table(self) -> Path:
        """How much each key head loses by sinks and a window, from a text of its own."""
        if not self.table.exists():
            captured: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
            other = self._prompt(**self.cfg.heads_text)
            prefill(sparsify(self.model, Capture(into=captured, min_length=0)), other.tokens)
            self.table.parent.mkdir(parents=True, exist_ok=True)
            save_table([window_loss(q, k) for _, (q, k, _) in sorted(captured.items())], self.table)
        return self.table

    # Quality ----------------------------------------------------------------------------------------------

    def _dense_reference(self) -> list[dict[str, Any]]:
        """Of each prompt: perplexity of its second half, and log-probabilities behind its last token."""
        return [self._read(prompt, sp.get_strategy("dense")) for prompt in self.prompts]

    def _read(self, prompt: Prompt, strategy: sp.Strategy) -> dict[str, Any]:
        last = prompt.tokens.shape[1] - prompt.second_half.start
        found = likelihood(sparsify(self.model, strategy), prompt.tokens, last=last)
        at = [slice(a.start - prompt.second_half.start, a.stop - prompt.second_half.start) for a in prompt.answers]
        predicting = found.hidden[:, [part.start for part in at]]  # first token of each answer
        with torch.inference_mode():
            log_probs = self.model.output(predicting).float().log_softmax(-1)
        truth = prompt.tokens[:, -last:]
        return {
            "nll": float(found.nll[:, : len(prompt.second_half)].mean()),
            "answers": [float(found.nll[:, part].mean()) for part in at],
            "exact": [bool((found.greedy[:, part] == truth[:, part]).all()) for part in at],
            "log_probs": log_probs,
        }

    def _quality(self, name: str, dense: list[dict[str, Any]]) -> dict[str, Any]:
        strategy, kept = self.strategies[name], Kept()
        with sp.record(inspect=kept.inspect) as calls:
            read = [self._read(prompt, strategy) for prompt in self.prompts] if name != "dense" else dense
        reasons = {call.dense for call in calls if call.dense not in (None, "strategy")}
        if reasons:
            raise ValueError(f"{name} ran dense ({', '.join(sorted(reasons))}): take longer prompts.")
        # Layers that a strategy leaves dense count as such.
        whole = sum(call.dense == "strategy" for call in calls)
        divergence = [
            float((a["log_probs"].exp() * (a["log_probs"] - b["log_probs"])).sum(-1).mean())
            for a, b in zip(dense, read, strict=True)
        ]
        answers = [nll for one in read for nll in one["answers"]]
        exact = [hit for one in read for hit in one["exact"]]
        ratio = [b["nll"] - a["nll"] for a, b in zip(dense, read, strict=True)]
        return {
            "name": name,
            "strategy": strategy.label,
            "options": {key: value for key, value in to_config(strategy).items() if key != "name"},
            "density": mean(kept.density + [1.0] * whole, 1.0),
            "recall": mean(kept.recall + [1.0] * whole, 1.0),
            "oracle_density": mean(kept.oracle_density + [1.0] * whole, 1.0),
            "output_error": mean(kept.output_error + [0.0] * whole, 0.0),
            "kl_last_token": statistics.mean(divergence),
            "needle_nll": statistics.mean(answers),
            "needle_exact": statistics.mean(exact),
            "needles": len(exact),
            "perplexity_ratio": float(torch.tensor(ratio).mean().exp()),
            "by_prompt": {
                prompt.name: {
                    "needle_nll": statistics.mean(one["answers"]),
                    "needle_exact": statistics.mean(one["exact"]),
                }
                for prompt, one in zip(self.prompts, read, strict=True)
            },
        }

    # Time -------------------------------------------------------------------------------------------------

    def _times(self) -> dict[str, dict[str, float]]:
        """Milliseconds a layer of attention, medians of runs in turn over some layers of the first prompt."""
        cfg = self.cfg
        captured: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        model = sparsify(self.model, Capture(into=captured, every=cfg.time_every, min_length=0))
        prefill(model, self.prompts[0].tokens)
        bound = {name: self._bound(strategy) for name, strategy in self.strategies.items()}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in self.strategies}
        with torch.inference_mode(), self._progress() as advance:
            for index in advance(sorted(captured), "time layer {}"):
                q, k, v = captured[index]
                runs: dict[str, list[dict[str, float]]] = {name: [] for name in self.strategies}
                for repeat in range(cfg.repeats + 1):  # the first one warms up
                    for name in self.strategies:
                        seconds = timed(lambda name=name, q=q, k=k, v=v, index=index: bound[name][index](q, k, v))
                        if repeat:
                            runs[name].append(seconds)
                for name, values in runs.items():
                    rows[name].append({key: statistics.median(x[key] for x in values) for key in values[0]})
        times = {
            name: {f"{s}_ms": 1e3 * mean([x[s] for x in of], 0.0) for s in (*STAGES, "attention")}
            for name, of in rows.items()
        }
        for row in times.values():
            row["speedup_attention"] = times["dense"]["attention_ms"] / row["attention_ms"]
        return times

    def _bound(self, strategy: sp.Strategy) -> dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The attention of each layer; layers share a prompt, as in a model."""
        prompt = sp.Prompt(q_len=self.prompts[0].tokens.shape[1])
        calls = {}
        for index, layer in enumerate(sparsify(self.model, strategy).layers):
            of_layer = layer.attn.strategy
            calls[index] = lambda q, k, v, s=of_layer: sp.sparse_attention(
                q, k, v, s, prompt=prompt.on_grid(s.block_size)
            )
        return calls

    # Report -----------------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        """The report so far, if it is of these settings, else a new one."""
        cfg, path = self.cfg, Path(self.cfg.output)
        settings = {
            "model": cfg.model_name,
            "tokens": cfg.tokens,
            "texts": OmegaConf.to_container(cfg.texts),
            "facts": cfg.facts,
            "dtype": cfg.dtype,
        }
        if path.exists():
            report = json.loads(path.read_text())
            if all(report.get(key) == value for key, value in settings.items()):
                return report
            self.console.print(f"{path} is of other settings and is written anew.")
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python recipes/evaluate.py " + " ".join(sys.argv[1:]),
            **settings,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rows": [],
        }

    def _write(self, report: dict[str, Any], known: dict[str, dict[str, Any]]) -> None:
        order = [*self.strategies, *(name for name in known if name not in self.strategies)]
        report["rows"] = [known[name] for name in order if name in known]
        path = Path(self.cfg.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")

    def _summary(self, report: dict[str, Any]) -> str:
        columns = ("density", "recall", "oracle_density", "output_error", "needle_nll", "needle_exact")
        columns = (*columns, "perplexity_ratio", "kl_last_token", "attention_ms", "speedup_attention")
        lines = [f"{'':28}" + " ".join(f"{c[:12]:>12}" for c in columns)]
        for row in report["rows"]:
            cells = (f"{row[c]:12.3f}" if c in row else f"{'':12}" for c in columns)
            lines.append(f"{row['name']:28}" + " ".join(cells))
        return "\n".join(lines)

    def _progress(self) -> _Steps:
        return _Steps(self.console)


class _Steps:
    """A progress bar over names."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:34}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)

    def __enter__(self) -> Callable[..., Iterator[Any]]:
        self.progress.start()
        return self._steps

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def _steps(self, items: list[Any], description: str = "{}") -> Iterator[Any]:
        task = self.progress.add_task("", total=len(items))
        for item in items:
            self.progress.update(task, description=description.format(item))
            yield item
            self.progress.advance(task)


def source(pattern: str) -> str:
    """Text of a file, of all files that a pattern matches, or of a part of the standard library.

    "pydoc" is the language reference that comes with Python; "stdlib:NAME" a module's source.
    """
    if pattern == "pydoc":
        from pydoc_data import topics

        return " ".join("\n".join(map(str, topics.topics.values())).split())
    if pattern.startswith("stdlib:"):
        return (Path(statistics.__file__).parent / f"{pattern.removeprefix('stdlib:')}.py").read_text()
    return Path(pattern).read_text()


def device_name(device: torch.device) -> str:
    """Name of the GPU or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def timed(run: Callable[[], Tensor]) -> dict[str, float]:
    """Seconds of a call: as a whole, and of its stages in another run."""
    begin = time.perf_counter()
    out = run()
    if out.is_cuda:
        torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    with sp.record() as calls:
        run()
    return {"attention": whole, **{s: sum(call.seconds.get(s, 0.0) for call in calls) for s in STAGES}}


def mean(values: list[float], nothing: float) -> float:
    return statistics.mean(values) if values else nothing


@config.parse
def main(cfg: DictConfig) -> None:
    recipe = EvaluateRecipe(cfg=cfg)
    recipe.setup()
    recipe.run()


if __name__ == "__main__":
    sys.exit(main())
