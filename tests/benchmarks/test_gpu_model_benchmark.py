"""benchmarks/gpu_model.py, with a tiny decoder on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_model


def test_each_way_is_timed_and_compared_with_dense_attention(tmp_path):
    path = tmp_path / "model.json"
    strategy = "a_shape:local=128"
    options = ["--device", "cpu", "--shape", "tiny", "--lengths", "500", "--repeats", "1", "--strategies", strategy]
    report = gpu_model.main([*options, "--json", str(path)])
    assert json.loads(path.read_text()) == report
    assert report["model"] == "tiny, random weights"
    (found,) = report["results"]
    dense, sparse = found["ways"]
    assert found["tokens"] == 500
    assert (dense["way"], dense["against dense"]) == ("dense", 1)
    assert sparse["way"] == strategy
    assert 0 < sparse["density"] < 1
    assert sparse["against dense"] == pytest.approx(dense["seconds"] / sparse["seconds"])


@pytest.mark.parametrize("words", [["--repeats", "0", "--device", "cpu"], ["--device", "cuda"]])
def test_arguments_that_cannot_run_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_model.parse(words)
    assert ("at least 1" if "0" in words else "no CUDA device") in capsys.readouterr().err


def test_the_model_has_the_given_shape_and_dtype():
    before = torch.get_default_dtype()
    model = gpu_model.made("tiny", "cpu")
    assert torch.get_default_dtype() == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(model.model.layers) == 4
