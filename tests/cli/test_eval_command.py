"""eval: its report, its table, its errors, and how it resumes after Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_hf import write_folder

from sparse_prefill.cli import main

HALF = "oracle:share=0.5,block_size=16,min_length=0"
SHAPE = "a_shape:sink=16,local=32,block_size=16,min_length=0"
MAIN = (  # background jobs of a shell ignore Ctrl-C, and so do their children
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from sparse_prefill.cli import main; sys.exit(main())"
)


@pytest.fixture
def words(model, text, tmp_path):
    """Words of an eval command without strategies."""
    return ["eval", "-m", model, "--text", text, "--tokens", "450", "-o", str(tmp_path / "out" / "report.json")]


def test_eval_prints_a_table_and_writes_a_report_of_each_strategy(words, tmp_path, capsys):
    shape = f"delta({SHAPE}):every=16"
    assert main([*words, "-s", HALF, "-s", shape, "--repeats", "1", "--every", "1", "--seed", "5"]) == 0
    printed = capsys.readouterr()
    assert [line.split("  ")[0] for line in printed.out.splitlines()[1:4]] == ["dense", HALF, shape]
    assert "recall" in printed.out.splitlines()[0]
    assert printed.out.splitlines()[-1] == str(tmp_path / "out" / "report.json")
    assert f"[1/3] {HALF}\n" in printed.err
    assert "time layer 1\n" in printed.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["command"].startswith("sparse-prefill eval -m ")
    assert (report["model"], report["tokens"], report["facts"], report["dtype"]) == ("tiny", 450, 1, "fp32")
    assert (report["seed"], report["texts"][0]["name"]) == (5, "prose")
    assert {"date", "device", "threads", "torch", "sparse_prefill", "peak_gib"} <= set(report)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows[shape]["strategy"] == "delta(a_shape)"
    assert rows[HALF]["density"] < 1
    assert all(row["attention_ms"] > 0 for row in rows.values())


def test_a_hugging_face_folder_is_evaluated(words, tmp_path, capsys):
    words[words.index("-m") + 1] = str(write_folder(tmp_path / "folder"))
    assert main([*words, "-s", HALF]) == 0
    assert HALF in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == "folder"
    assert report["rows"][1]["density"] < 1


def test_json_output_is_only_the_report(words, tmp_path, capsys):
    assert main([*words, "-s", HALF, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())


def test_a_second_run_adds_the_missing_strategies(words, capsys):
    assert main([*words, "-s", HALF]) == 0
    capsys.readouterr()
    assert main([*words, "-s", HALF, "-s", SHAPE]) == 0
    printed = capsys.readouterr()
    assert f"] {SHAPE}\n" in printed.err
    assert f"] {HALF}\n" not in printed.err
    assert HALF in printed.out
    assert SHAPE in printed.out


def test_tasks_are_scored_with_the_dense_model_for_comparison(model, tmp_path, capsys):
    words = ["eval", "-m", model, "-s", HALF, "-o", str(tmp_path / "tasks.json")]
    words += ["--tasks", "niah_single_1", "--lengths", "700", "--samples", "1", "--depths", "0", "1"]
    assert main([*words, "--no-generation"]) == 0
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines() if line.startswith("niah_single_1")]
    assert [line[:4] for line in table] == [["niah_single_1", "700", name, "2"] for name in ("dense", HALF)]
    assert f"{HALF}, niah_single_1 of 700 at 100%" in printed.err
    report = json.loads((tmp_path / "tasks.json").read_text())
    assert report["rows"] == []
    assert {one["depth"] for one in report["tasks"]["results"]} == {0, 1}


def test_plans_are_evaluated_and_head_tables_are_estimated(words, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    shape = {"name": "a_shape", "sink": 16, "local": 32, "block_size": 16, "min_length": 0}
    plan.write_text(json.dumps({"default": shape, "layers": {"0": {"name": "dense"}}}))
    duo = "duo_attention:block_size=16,min_length=0,sink=16,local=32"
    assert main([*words, "-s", str(plan), "-s", duo, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows[str(plan)]["strategy"] == "plan"
    assert rows[duo]["options"]["table"] == str(tmp_path / "out" / "report.heads.tsv")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-s", "a_shap"], "Unknown strategy 'a_shap'"),
        (["-s", "a_shape", "-s", "a_shape"], "'a_shape' is given twice"),
        (["--tasks", "niah"], "There is no task 'niah'"),
        (["--text", "nowhere.txt"], "nowhere.txt can't be read as text"),
        (["--tokens", "90000"], "tokens=90000 needs"),
        (["--tasks", "vt", "--lengths", "90000"], "takes 4096 tokens, and a length is 90000"),
        (["--text", "other/prose.md"], "Two texts have the same name"),
        (["--device", "nothing"], "There is no device 'nothing'"),
        (["-m", "nowhere.gguf"], "There is no model at 'nowhere.gguf'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_arguments_give_one_line_and_exit_code_two(words, more, message, capsys):
    assert main([*words, *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("sparse-prefill: ")]
    assert message in line
    assert printed.err.endswith(f"{line}\n")


@pytest.mark.parametrize("more", [["--tokens", "0"], ["--depths", "1.5"], ["--repeats", "-1"], ["--tokens", "many"]])
def test_numbers_out_of_range_are_refused(words, more, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, *more])
    assert stop.value.code == 2
    assert more[0] in capsys.readouterr().err


def test_other_settings_do_not_overwrite_results(words, capsys):
    assert main([*words, "-s", HALF]) == 0
    assert main([*words, "-s", HALF, "--seed", "9"]) == 2
    assert "seed is 0 there and 9 now" in capsys.readouterr().err


def test_a_failed_measurement_gives_exit_code_one_and_keeps_the_other_results(words, tmp_path, capsys):
    wide = "lserve:block_size=16"  # its window covers the whole text
    assert main([*words, "-s", wide, "-s", HALF]) == 1
    printed = capsys.readouterr()
    assert f"sparse-prefill: {wide} failed: It ran dense (window)" in printed.err
    assert HALF in printed.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["dense", HALF]
    assert report["failures"] == {wide: "It ran dense (window): take longer texts."}


def test_a_report_without_a_successful_strategy_is_neither_shown_nor_saved(words, tmp_path, capsys):
    wide = ["lserve:block_size=16", "lserve:block_size=32"]
    assert main([*words, "-s", wide[0], "-s", wide[1]]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"\nsparse-prefill: {wide[0]}, {wide[1]} failed: It ran dense (window)" in printed.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_eval_refuses_a_switched_off_compiler_in_one_line(words, tmp_path, capsys):
    with torch._dynamo.config.patch(disable=True):
        assert main([*words, "-s", HALF]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sparse-prefill: RuntimeError: torch.compile is switched off.")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*words, "-s", "dense"]) == 0


def rows(path):
    return len(json.loads(path.read_text())["rows"]) if path.exists() else 0


def test_ctrl_c_keeps_finished_steps_and_a_second_run_continues(words, tmp_path, capsys):
    path = tmp_path / "out" / "report.json"
    specs = [f"oracle:share=0.{i},block_size=16,min_length=0" for i in range(1, 10)]
    command = [*words, "--tokens", "900", "--facts", "3", *(word for spec in specs for word in ("-s", spec))]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begin = time.monotonic()
    while rows(path) < 2 and process.poll() is None and time.monotonic() < begin + 300:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].startswith(f"sparse-prefill: interrupted; {path} has the finished steps")
    assert "Traceback" not in err
    finished = [row["name"] for row in json.loads(path.read_text())["rows"]]
    assert 2 <= len(finished) < 1 + len(specs)

    assert main(command) == 0
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["dense", *specs]
    measured = [
        line.partition("] ")[2].partition(", prose")[0] for line in capsys.readouterr().err.splitlines() if "] " in line
    ]
    assert not set(measured) & set(finished[1:])
