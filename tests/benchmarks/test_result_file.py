"""Result files hold one record per line, and only values that pages or tests read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import result_file

REPORT = {
    "strategy": "FlexPrefill(block_size=128)",
    "lengths": [1024, 2048],
    "rows": [
        {"name": "dense", "by_head": {"recall": [[1.0]]}, "options": {"last": 0}},
        {"name": "flex_prefill", "by_head": {"recall": [[0.1]]}, "by_prompt": {}, "options": {}},
    ],
    "results": [{"tokens": 1024, "strategies": [{"name": "moba", "work": {"kernel": {"mb": 1}}, "total": 0.1}]}],
    "tasks": {"results": [{"grid": True, "nll": 1.0}, {"grid": False, "nll": 2.0}]},
    "runs": {"dense": {"seconds": 1.5}, "sparse": {"seconds": 0.5}},
    "none": [],
}


def test_each_record_is_written_on_one_line(tmp_path):
    path = tmp_path / "new" / "results.json"
    result_file.write(path, REPORT)
    assert json.loads(path.read_text()) == REPORT
    found = path.read_text().splitlines()
    assert ' "lengths": [1024, 2048],' in found
    assert '  "sparse": {"seconds": 0.5}' in found
    assert '  {"name": "dense", "by_head": {"recall": [[1.0]]}, "options": {"last": 0}},' in found


def test_unused_values_are_left_out():
    found = result_file.slimmed(REPORT)
    assert "strategy" not in found
    assert [set(row) for row in found["rows"]] == [{"name", "options"}, {"name", "by_head", "options"}]
    assert found["results"][0]["strategies"] == [{"name": "moba", "total": 0.1}]
    assert found["tasks"]["results"] == [{"grid": True, "nll": 1.0}]
    assert found["runs"] == REPORT["runs"]
    assert "options" not in result_file.slimmed({**REPORT, "densities": [0.1]})["rows"][0]


def test_a_command_is_stored_without_folders_of_the_machine():
    found = result_file.command("/a/benchmarks/gpu.py", ["--json", "/b/c.json", "--shapes", "tiny one"])
    assert found == "python benchmarks/gpu.py --json c.json --shapes 'tiny one'"
