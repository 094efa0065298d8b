"""benchmarks/frontier.py writes a file for each length, and a second run adds to it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from tiny_gguf import write_gguf

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "frontier.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def words(tmp_path):
    (tmp_path / "text.txt").write_text("The keeper of the light writes down the wind and the waves. " * 40)
    model = write_gguf(tmp_path / "tiny.gguf")
    return ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--every", "1", "--query-blocks", "2"]


def test_each_length_is_written_to_a_separate_file(main, words, tmp_path, capsys):
    out = tmp_path / "out" / "frontier_{model}_{tokens}.json"
    short, long = main(
        [*words, "--tokens", "256", "400", "--json", str(out), "--strategies", "duo_attention", "mean_pool:sink=0"]
    )
    assert json.loads((tmp_path / "out" / "frontier_tiny_256.json").read_text()) == short
    assert json.loads((tmp_path / "out" / "frontier_tiny_400.json").read_text()) == long
    assert (short["model"], short["tokens"], long["tokens"]) == ("tiny", 256, 400)
    assert str(tmp_path) not in json.dumps({**long, "text": None}), "folders of this machine"
    assert "--model tiny.gguf" in long["command"]
    rows = {row["name"]: row for row in long["rows"]}
    assert rows["duo_attention"]["options"]["table"].endswith(".tsv")
    assert rows["mean_pool:sink=0"]["options"] == {"sink": 0}
    assert any(name.startswith("mean_pool:sink=0,share=") for name in rows)
    assert "density" in capsys.readouterr().out
    more = main([*words, "--tokens", "400", "--json", str(out), "--strategies", "mean_pool:sink=0", "random"])[0]
    assert more["rows"][: len(long["rows"])] == long["rows"]
    assert more["rows"][-1]["name"] == "random"


def test_two_lengths_with_one_file_are_refused(main, words, tmp_path):
    with pytest.raises(ValueError, match="--json"):
        main([*words, "--tokens", "256", "400", "--json", str(tmp_path / "one.json")])


def test_a_text_that_is_too_short_is_refused(main, words, tmp_path):
    with pytest.raises(ValueError, match=r"text\.txt has \d+ tokens"):
        main([*words, "--tokens", "100000", "--json", str(tmp_path / "one.json"), "--strategies", "random"])
