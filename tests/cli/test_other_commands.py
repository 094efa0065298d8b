"""bench, calibrate, plot and report: their output and their errors."""

from __future__ import annotations

import json

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.cli import main
from sparse_prefill.head_table import load_table

SMALL = "block_size=16,min_length=0"
SHAPE = f"a_shape:sink=16,local=32,{SMALL}"


def error_of(capsys) -> str:
    """The error line of a failed command."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("sparse-prefill: ")]
    return line


@pytest.mark.parametrize("command", ["bench", "calibrate"])
def test_a_switched_off_compiler_is_refused_in_one_line_without_a_file(command, model, text, tmp_path, capsys):
    out = tmp_path / "new" / "out.yaml"
    words = [command, "-m", model, "--text", text, "--tokens", "450", "-o", str(out)]
    with torch._dynamo.config.patch(disable=True):
        assert main([*words, "-s", f"flash_prefill:{SMALL}"]) == 1
    assert "torch.compile is switched off" in error_of(capsys)
    assert not out.parent.exists()


# bench


def test_bench_times_the_layers_of_a_model(model, text, tmp_path, capsys):
    words = ["bench", "-m", model, "--text", text, "--tokens", "450", "--every", "1", "--repeats", "1"]
    specs = [SHAPE, f"prism:{SMALL}"]  # prism needs each layer's rotary embedding
    out = tmp_path / "new" / "bench.json"
    assert main([*words, "-s", specs[0], "-s", specs[1], "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert "mean of 2 layers: SDPA" in printed.out
    assert [line.split()[0] for line in printed.out.splitlines()[-2:]] == specs
    assert "time layer 1\n" in printed.err
    report = json.loads(out.read_text())
    assert report["command"].startswith("sparse-prefill bench -m")
    assert (report["model"], report["text"]) == ("tiny", text)
    (case,) = report["results"]
    assert (case["case"], case["layers"]) == ("tiny, 450 tokens", 2)
    for row in case["strategies"]:
        assert row["total"] > 0
        assert row["kernel"] > 0
        assert 0 < row["density"] < 1
        assert 0 < row["recall"] <= 1
        assert row["speed-up over sdpa"] == pytest.approx(case["sdpa"] / row["total"])


@pytest.fixture
def captured(tmp_path):
    path = tmp_path / "captured.pt"
    layers = {str(i): reference.random_qkv(q_len=300, seed=i) for i in (0, 3)}
    torch.save({"layers": layers, "model": "tiny", "text": "prose"}, path)
    return str(path)


def test_bench_times_captured_tensors_as_json(captured, capsys):
    assert main(["bench", "--qkv", captured, "--repeats", "1", "--every", "1", "-s", SHAPE, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [report[key] for key in ("model", "text", "seed")] == ["tiny", "prose", None]
    assert report["results"][0]["layers"] == 2
    assert report["results"][0]["strategies"][0]["name"] == SHAPE


def test_bench_refuses_arguments_that_it_cannot_time(captured, model, text, tmp_path, capsys):
    (tmp_path / "other.pt").write_text("no tensors")
    (tmp_path / "plan.json").write_text('{"default": {"name": "a_shape"}}')
    for words, message in (
        (["--qkv", str(tmp_path / "other.pt")], "holds no queries, keys and values"),
        (["--qkv", str(tmp_path / "nothing.pt")], "There is no file of queries, keys and values at"),
        (["--qkv", captured, "-s", str(tmp_path / "plan.json")], "is a plan of layers"),
        (["--qkv", captured, "-s", "a_shap"], "Unknown strategy"),
        (["-m", model, "--text", text, "--tokens", "90000"], "90000 are needed"),
    ):
        assert main(["bench", *words]) == 2
        assert message in error_of(capsys)
    for words in ([], ["-m", model, "--qkv", captured]):
        with pytest.raises(SystemExit) as stop:
            main(["bench", *words])
        assert stop.value.code == 2


# calibrate


@pytest.fixture
def calibration(model, text):
    return ["calibrate", "-m", model, "--text", text, "--tokens", "700"]


def test_calibrate_writes_a_plan_that_reaches_the_target(calibration, tmp_path, capsys):
    path = tmp_path / "new" / "plan.yaml"
    words = [*calibration, "-s", f"xattention:stride=4,{SMALL}", "--recall", "0.9", "-o", str(path)]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("target: recall 0.9\nhere: recall 0.9")
    assert "held-out text: recall 0." in printed.out
    assert printed.out.endswith(f"{path}\n")
    assert "calibrate" in printed.err
    plan = sp.Plan.load(path)
    assert set(plan.layers) == {0, 1}
    assert plan.layers[0].label in ("xattention", "by_head(xattention)")


def test_calibrate_runs_short_texts_sparse_and_writes_min_length_to_the_plan(calibration, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    words = [*calibration, "-s", "mean_pool:block_size=16", "--recall", "0.9", "-o", str(path), "--json"]
    words[words.index("700")] = "2000"  # the text has fewer than 2,000 tokens left
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["held_out"] is None
    assert "4000 are needed" in report["reason"]
    assert sp.Plan.load(path).default.min_length is None


def test_calibrate_to_a_density_as_json(calibration, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    words = [*calibration, "-s", f"mean_pool:{SMALL}", "--density", "0.4", "--by", "layer", "-o", str(path), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == {"density": 0.4}
    assert report["density"] <= 0.4
    assert {group["layer"] for group in report["groups"]} == {0, 1}
    assert 0 < report["held_out"]["density"] < 1


def test_calibrate_searches_patterns_and_estimates_head_tables(model, text, tmp_path, capsys):
    words = ["calibrate", "-m", model, "--text", text, "--tokens", "700", "--json"]
    patterns = tmp_path / "patterns.json"
    assert main([*words, "-s", f"minference:sink=16,local=16,{SMALL}", "--density", "0.5", "-o", str(patterns)]) == 0
    assert sum(json.loads(capsys.readouterr().out)["patterns"].values()) == 2 * 4
    assert len(json.loads(patterns.read_text())) == 2
    table = tmp_path / "heads.tsv"
    words[words.index("700")] = "2100"
    assert main([*words, "-s", f"duo_attention:{SMALL}", "-o", str(table)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 <= report["loss"]["least"] <= report["loss"]["most"] <= 1
    assert len(load_table(table)) == 2


def test_calibrate_refuses_arguments_without_a_usable_target(calibration, tmp_path, capsys):
    plan = str(tmp_path / "plan.yaml")
    for words, message in (
        (["-s", "dense", "-o", plan], "has no tunable option"),
        (["-s", "mean_pool", "-o", str(tmp_path / "plan.json")], "A plan is written as YAML"),
        (["-s", "minference", "--recall", "0.9", "-o", plan], "--recall has no meaning for minference"),
        (["-s", "duo_attention", "--density", "0.5", "-o", plan], "--density has no meaning for duo_attention"),
        (["-s", f"mean_pool:{SMALL}", "--recall", "0", "-o", plan], "recall must be a number in (0, 1]"),
        (["-s", f"mean_pool:{SMALL}", "--density", "0", "-o", plan], "density must be a number in (0, 1]"),
        (["-s", plan, "-o", plan], "is no strategy"),
    ):
        assert main([*calibration, *words]) == 2
        assert message in error_of(capsys)
    assert not list(tmp_path.iterdir())


# plot


@pytest.fixture
def results(tmp_path):
    rows = [
        {"name": "dense", "strategy": "dense", "density": 1.0, "recall": 1.0},
        {"name": "local:local=16", "strategy": "local", "density": 0.25, "recall": 0.625, "oracle_density": 0.125},
    ]
    rows[1]["by_head"] = {"density": [[0.25, 0.25]], "recall": [[0.5, 0.75]]}
    cells = [{"strategy": "local", "grid": True, "depth": d, "length": 700, "exact": d} for d in (0.0, 1.0)]
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"model": "tiny", "rows": rows, "tasks": {"results": cells, "summary": []}}))
    return path


def test_plot_draws_all_figures_of_a_report(results, tmp_path, capsys):
    assert main(["plot", str(results)]) == 0
    printed = capsys.readouterr()
    names = ["frontier", "needles_local", "density_local_local=16", "recall_local_local=16"]
    assert [line.rpartition("/")[2] for line in printed.out.splitlines()] == [f"{name}.png" for name in names]
    assert all((tmp_path / "eval" / f"{name}.png").stat().st_size > 1000 for name in names)
    assert "draw frontier" in printed.err


def test_plot_draws_a_head_of_a_model(model, text, tmp_path, capsys):
    path = tmp_path / "new" / "head.svg"
    words = ["plot", "-m", model, "--text", text, "--tokens", "450", "-s", SHAPE, "--layer", "1", "--head", "3"]
    assert main([*words, "-o", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pictures": [str(path)]}
    assert path.read_text().count("<image") == 3


def test_plot_refuses_arguments_that_it_cannot_draw(model, text, results, tmp_path, capsys):
    head = ["-m", model, "--text", text, "--tokens", "450", "-s", SHAPE]
    (tmp_path / "empty.json").write_text('{"rows": []}')
    (tmp_path / "other.json").write_text('{"rows": [3]}')
    for words, message in (
        ([str(tmp_path / "empty.json")], "nothing to draw"),
        ([str(tmp_path / "other.json")], "is no report"),
        ([str(results), "-o", "all.png"], "go into a folder"),
        ([*head, "--layer", "2"], "--layer must be in [0, 1] for tiny, got 2"),
        ([*head, "--head", "4"], "--head must be in [0, 3] for tiny, got 4"),
        ([*head, "-o", "head.bmp"], "one of .png, .svg, .pdf"),
        (["-m", model, "-s", "a_shap"], "Unknown strategy"),
    ):
        assert main(["plot", *words]) == 2
        assert message in error_of(capsys)
    for words in ([], [str(results), "-m", model]):
        with pytest.raises(SystemExit) as stop:
            main(["plot", *words])
        assert stop.value.code == 2


# report


def test_report_writes_a_page(tmp_path, capsys):
    path = tmp_path / "eval.json"
    rows = [{"name": "dense", "density": 1.0, "recall": 1.0}, {"name": "local", "density": 0.25, "recall": 0.625}]
    path.write_text(json.dumps({"model": "tiny", "rows": rows}))
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'eval.html'}\n"
    page = (tmp_path / "eval.html").read_text()
    assert "0.625" in page
    assert "local" in page
    assert main(["report", str(path), "-o", str(tmp_path / "new" / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "new" / "page.html")}


def test_report_refuses_files_that_are_not_results(tmp_path, capsys):
    for content, message in (("[]", "is no report"), ("<html>", "is no report"), ('{"rows": []}', "nothing to report")):
        (tmp_path / "other.json").write_text(content)
        assert main(["report", str(tmp_path / "other.json")]) == 2
        assert message in error_of(capsys)
    assert main(["report", str(tmp_path / "nothing.json")]) == 2
    assert "There is no report at" in error_of(capsys)
