"""Measure everything that the documentation says, and write its pictures and tables.

    make evidence             # all of it, into benchmarks/results and docs
    make evidence QUICK=1     # shorter prompts and fewer strategies, into outputs/evidence_quick, to see that it runs
    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --only attention crossover
    python benchmarks/evidence.py --qwen models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

Steps that time nothing run side by side, and then the others one by one. The next call doesn't run finished steps
again, and most steps go on where they were interrupted. Needs what the Makefile installs; the steps of a second model
run where --qwen names its file.
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import result_file
from evidence_steps import RESULTS, ROOT, STEPS, Step

ENVIRONMENT = {  # as in the Makefile, which says why
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor"),
}
_writing = Lock()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the steps, with their commands")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help="run only these, finished or not")
    parser.add_argument("--quick", action="store_true", help="short forms of all steps, into outputs/evidence_quick")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        default="bf16",
        help="bf16 is slower on a CPU without bf16 products",
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
            print(f"{name}: {step.title}", *(f"    {shlex.join(words)}" for words in commands(step, args)), sep="\n")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in STEPS if name in (args.only or STEPS) and to_run(name, args)]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    begin, failed = time.monotonic(), []
    pool = ThreadPoolExecutor(args.jobs)
    try:
        together = [name for name in chosen if not STEPS[name].exclusive]
        good = list(pool.map(partial(run, args=args, env={"OMP_NUM_THREADS": threads}), together))
        failed = [name for name, fine in zip(together, good, strict=True) if not fine]
        failed += [name for name in chosen if STEPS[name].exclusive and not run(name, args, {})]
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
    print(f"{name}: {STEPS[name].title}, with its log in {log}", file=sys.stderr)
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
