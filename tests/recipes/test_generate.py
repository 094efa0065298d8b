"""The generate recipe and its configs, end to end on a tiny GGUF file."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny_gguf import EMBED, HEADS, KV_HEADS, write_gguf
from torchtune import config
from torchtune.generation import generate as stock_generate
from torchtune.models.convert_weights import tune_to_hf

import sparse_prefill as sp
from sparse_prefill.models.gguf import GGUFCheckpointer, gguf_decoder
from sparse_prefill.models.gguf.tokenizer import GGUFTokenizer
from sparse_prefill.models.torchtune import sparsify

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
CONFIG = ROOT / "recipes" / "configs" / "smollm2_135m.yaml"
TEXT = "the other 12 weathered heathens gathered there, 1 2 3; " * 4
SPARSE = ["strategy.block_size=16", "strategy.min_length=0"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("recipe") / "tiny.gguf")


def arguments(path: Path, *overrides: str) -> list[str]:
    shared = [f"path={path}", "dtype=fp32", "chat=False", "max_new_tokens=6", f"prompt='{TEXT}'"]
    return ["--config", str(CONFIG), *shared, *overrides]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with the source of this checkout, not an installed package."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), "."])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def expected(path: Path) -> str:
    """The greedy answer of torchtune."""
    tokenizer = GGUFTokenizer(path)
    model = gguf_decoder(path).eval()
    model.load_state_dict(GGUFCheckpointer(path).load_checkpoint()["model"])
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    generated, _ = stock_generate(model, tokens, max_generated_tokens=6, top_k=1, pad_id=-1)
    ids = generated[0, tokens.shape[1] :].tolist()
    ends = [i for i, token in enumerate(ids) if token in tokenizer.stop_tokens]
    return tokenizer.decode(ids[: ends[0]] if ends else ids)


def test_python_runs_the_recipe_with_a_sparse_strategy(path):
    done = run(
        [sys.executable, "recipes/generate.py", *arguments(path, *SPARSE, "strategy.gamma=1.0", "strategy.tau=0")]
    )
    assert done.stdout == expected(path) + "\n"
    assert "compiling the kernel included), 100% of the blocks computed" in done.stderr


def test_the_recipe_takes_a_plan_as_its_strategy(path, tmp_path, monkeypatch, capsys):
    sp.Plan(default="dense", layers={0: {"name": "by_head", "of": "dense", "heads": {0: "dense"}}}).save(
        tmp_path / "plan.yaml"
    )
    overrides = ["strategy=sparse_prefill.Plan.load", "~strategy.name", f"strategy.path={tmp_path / 'plan.yaml'}"]
    assert run_here(monkeypatch, capsys, *arguments(path, *overrides)) == expected(path) + "\n"


STRATEGIES = {
    "a wrapper": "{_component_: sparse_prefill.get_strategy, name: by_head, of: {name: a_shape, sink: 256}}",
    "a plan": """
      _component_: sparse_prefill.Plan
      default: {name: xattention, threshold: [0.9, 0.8]}
      layers: {0: dense, 1: {name: by_head, of: dense, heads: {3: a_shape}}}
    """,
}


@pytest.mark.parametrize("text", STRATEGIES.values(), ids=STRATEGIES)
def test_configurations_may_nest_strategies(text):
    built = config.instantiate(OmegaConf.create(text))
    plain = {k: v for k, v in OmegaConf.to_container(OmegaConf.create(text)).items() if k != "_component_"}
    assert built == (sp.Plan(**plain) if "default" in plain else sp.get_strategy(**plain))


def test_tune_runs_the_recipe(path):
    tune = str(Path(sys.executable).parent / "tune")
    command = [tune, "run", "recipes/generate.py", *arguments(path, "strategy.name=dense")]
    done = run(command)
    assert done.stdout.endswith(expected(path) + "\n")
    assert "dense: strategy), 100% of the blocks computed" in done.stderr


def run_here(monkeypatch, capsys, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "recipes" / "generate.py"), run_name="__main__")
    assert not end.value.code
    return capsys.readouterr().out


def test_safetensors_weights_give_the_same_answer(path, tmp_path, monkeypatch, capsys):
    shape = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_size": EMBED}
    weights = GGUFCheckpointer(path).load_checkpoint()["model"]
    weights = tune_to_hf(weights, num_heads=HEADS, num_kv_heads=KV_HEADS, dim=EMBED)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")

    overrides = [
        "model=sparse_prefill.models.gguf.gguf_decoder",
        f"model.path={path}",
        f"checkpoint_dir={folder}",
        f"output_dir={tmp_path / 'output'}",
        "checkpointer.checkpoint_files=[model.safetensors]",
        "checkpointer.model_type=LLAMA3_2",
        "tokenizer=sparse_prefill.models.gguf.tokenizer.GGUFTokenizer",
        f"tokenizer.path={path}",
        "~tokenizer.max_seq_len",
        *("device=cpu", "dtype=fp32", "chat=False", "max_new_tokens=6", f"prompt='{TEXT}'", "strategy.name=dense"),
    ]
    other = str(CONFIG.with_name("llama3_1_8b.yaml"))
    assert run_here(monkeypatch, capsys, "--config", other, *overrides) == expected(path) + "\n"


def test_a_document_precedes_the_question_in_the_chat_template(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "report.txt").write_text("the report")
    given = []
    monkeypatch.setattr(
        GGUFTokenizer, "chat", lambda self, messages, answer: given.append((messages, answer)) or [1, 2, 3]
    )
    overrides = ["chat=True", "system=short", f"prompt_file={tmp_path / 'report.txt'}", "prompt='the question'"]
    run_here(monkeypatch, capsys, *arguments(path, *overrides))
    system, user = {"role": "system", "content": "short"}, {"role": "user", "content": "the report\n\nthe question"}
    assert given == [([system, user], True)]


def test_a_prompt_in_chunks_gets_the_same_answer(path, monkeypatch, capfd):
    options = ["strategy=sparse_prefill.get_strategy", "strategy.name=dense", "prefill_chunk_size=48"]
    assert run_here(monkeypatch, capfd, *arguments(path, *options)) == expected(path) + "\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompt=''", "give prompt="),
        ("prompt_fil=x", "unknown keys: prompt_fil"),
        ("prompt_file=nowhere.txt", "There is no text at nowhere.txt"),
        ("seed=x", "seed"),
        ("log_level=LOUD", "LOUD"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(override, message, path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments(path, override)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "recipes" / "generate.py"), run_name="__main__")
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate.py: ")]
    assert message in line


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_build_a_model_that_runs_with_their_strategy(file, path):
    cfg = OmegaConf.load(file)
    config.validate(cfg)
    for key in ("path", "gguf"):
        if key in cfg:
            cfg[key] = str(path)
            cfg.model.pop("max_seq_len", None)  # the tiny file has a short context
    if "source" in cfg.model:  # a model with its tokenizer
        model = config.instantiate(OmegaConf.merge(cfg, {"model": {"source": str(path)}}).model).model
    else:
        with torch.device("meta"):
            model = config.instantiate(cfg.model)
    strategy = config.instantiate(cfg.strategy) if "strategy" in cfg else sp.get_strategy("prism")
    sparse = sparsify(model, strategy)
    assert sparse.layers[-1].attn.strategy.name == strategy.name


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_show_how_to_launch_them(file):
    header = file.read_text().split("\n\n")[0]
    assert f"--config recipes/configs/{file.name}" in header
    assert any(way in header for way in ("tune download", "hf download", "pip install --no-deps"))
