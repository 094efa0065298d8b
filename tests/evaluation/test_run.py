"""The evaluation of a tiny model: its numbers are consistent, reproducible, and saved between runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_gguf import write_gguf

import sparse_prefill as sp
from sparse_prefill.evaluation import results as on_disk
from sparse_prefill.evaluation.results import Results, dumps
from sparse_prefill.evaluation.run import measure_texts, saved_head_table, without_dense_rows
from sparse_prefill.evaluation.run_tasks import measure_tasks
from sparse_prefill.evaluation.run_times import layers_of, measure_times
from sparse_prefill.evaluation.texts import hide_facts, read_source
from sparse_prefill.head_table import load_table
from sparse_prefill.models.eval_model import load

SMALL = {"block_size": 16, "min_length": 0}
PROSE = "The keeper of the light writes down the wind and the waves each night. " * 40


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load(write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", fields={"llama.context_length": 1024}))


@pytest.fixture(scope="module")
def texts(subject):
    ids = subject.encode(PROSE)
    return [
        hide_facts(name, ids, subject.encode, tokens=450, facts=2, skip=skip) for name, skip in [("a", 0), ("b", 9)]
    ]


def strategies():
    return {
        "oracle, half": sp.get_strategy("oracle", share=0.5, **SMALL),
        "oracle, all": sp.get_strategy("oracle", share=1.0, **SMALL),
        "random": sp.get_strategy("random", **SMALL),
        "plan": sp.Plan(default=sp.get_strategy("a_shape", local=32, sink=16, **SMALL), layers={0: "dense"}),
    }


@pytest.fixture(scope="module")
def measured(subject, texts, tmp_path_factory):
    results = Results(tmp_path_factory.mktemp("out") / "new" / "report.json", {"seed": 3}, {"command": "test"})
    assert measure_texts(subject, strategies(), texts, results, seed=3) == {}
    return json.loads(results.path.read_text())


def test_rows_hold_the_measures_of_attention_and_of_predictions(measured):
    rows = {row["name"]: row for row in measured["rows"]}
    assert list(rows) == ["dense", "oracle, half", "oracle, all", "random", "plan"]
    dense, half, everything = rows["dense"], rows["oracle, half"], rows["oracle, all"]
    for row in (dense, everything):
        for name in ("density", "recall", "worst_recall", "overlap"):
            assert row[name] == pytest.approx(1, abs=1e-4), name
        assert row["oracle_gap"] == pytest.approx(1, abs=0.01)  # blocks of next to no attention
        for name in ("perplexity_ratio", "perplexity_ratio_whole", "perplexity_ratio_last_quarter"):
            assert row[name] == pytest.approx(1, abs=1e-4), name
        assert row["kl_last_token"] == pytest.approx(0, abs=1e-5)
        assert row["output_error"] == pytest.approx(0, abs=1e-4)
        assert row["needle_nll"] == pytest.approx(dense["needle_nll"], abs=1e-4)
    assert half["worst_recall"] < half["recall"] < 1
    assert half["oracle_density"] <= half["density"] < 1
    assert half["oracle_gap"] >= 1 - 1e-6
    assert rows["random"]["overlap"] < half["overlap"] <= 1
    assert half["needle_nll"] != dense["needle_nll"]
    assert half["kl_last_token"] > 0
    assert half["options"]["share"] == 0.5
    for row in rows.values():
        assert row["needles"] == 4
        assert set(row["by_prompt"]) == {"a", "b"}


def test_rows_have_density_and_recall_of_each_head(measured):
    rows = {row["name"]: row for row in measured["rows"]}
    for name in ("density", "recall"):
        table = torch.tensor(rows["oracle, half"]["by_head"][name])
        assert table.shape == (2, 4)
        assert float(table.mean()) == pytest.approx(rows["oracle, half"][name], abs=1e-3)
    plan = rows["plan"]
    assert plan["strategy"] == "plan"
    assert plan["options"]["layers"]["0"]["name"] == "dense"
    first, second = torch.tensor(plan["by_head"]["density"])
    assert (first == 1).all()
    assert (second < 1).all()


def test_perplexity_ratios_cover_the_whole_text_its_last_half_and_its_last_quarter(subject, texts, measured):
    strategy, last = strategies()["oracle, half"], 449
    ratios = {}
    for name, share in (("whole", 1.0), ("half", 0.5), ("quarter", 0.25)):
        logs = []
        for one in texts:
            body = len(one.body) - 1
            dense, sparse = (subject.likelihood(s, one.tokens, last).nll[0, :body] for s in ("dense", strategy))
            count = math.ceil(share * body)
            logs.append(float((sparse - dense)[body - count :].double().mean()))
        ratios[name] = math.exp(sum(logs) / len(logs))
    row = measured["rows"][1]
    assert row["perplexity_ratio_whole"] == pytest.approx(ratios["whole"])
    assert row["perplexity_ratio"] == pytest.approx(ratios["half"])
    assert row["perplexity_ratio_last_quarter"] == pytest.approx(ratios["quarter"])


def test_a_second_run_with_the_seed_gives_the_same_numbers(subject, texts, measured, tmp_path):
    results = Results(tmp_path / "again.json", {"seed": 3}, {"command": "test"})
    # In reverse order: no row may depend on earlier ones.
    reversed_order = dict(reversed(strategies().items()))
    assert measure_texts(subject, reversed_order, texts, results, seed=3) == {}
    again = {row["name"]: row for row in results.content["rows"]}
    assert again == {row["name"]: row for row in measured["rows"]}


def test_results_are_written_after_each_row_and_a_second_run_resumes(subject, texts, measured, tmp_path):
    path, settings = tmp_path / "report.json", {"seed": 3}
    results = Results(path, settings, {"command": "test"})
    seen = []

    def stop(done, total, text):
        seen.append((done, total, text))
        if text == "random, a":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_texts(subject, strategies(), texts, results, seed=3, on_step=stop)
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["dense", "oracle, half", "oracle, all"]
    assert seen[0] == (0, 10, "dense, a")
    assert seen[-1] == (6, 10, "random, a")
    seen.clear()
    again = Results(path, settings, {"command": "other"})
    again.row("oracle, half")["recall"] = 0.123
    measure_texts(subject, strategies(), texts, again, seed=3, on_step=lambda *step: seen.append(step))
    assert {step[2].partition(",")[0] for step in seen} == {"dense", "random", "plan"}
    rows = json.loads(path.read_text())["rows"]
    assert rows[1].pop("recall") == 0.123
    assert [row | {"recall": 0} for row in rows] == [row | {"recall": 0} for row in measured["rows"]]
    assert json.loads(path.read_text())["command"] == "test"
    assert not list(tmp_path.glob("*.part"))


def test_a_strategy_that_fails_does_not_stop_the_others(subject, texts, tmp_path):
    results = Results(tmp_path / "report.json", {}, {})
    window = sp.get_strategy("lserve", block_size=16, table=[[0.1, 0.2], [0.3, 0.4]])  # its window covers the text
    wanted = {"window": window, "half": strategies()["oracle, half"]}
    failures = measure_texts(subject, wanted, texts[:1], results)
    assert set(failures) == {"window"}
    assert "ran dense (window): take longer texts" in failures["window"]
    assert [row["name"] for row in results.content["rows"]] == ["dense", "half"]
    assert json.loads(results.path.read_text())["failures"] == failures
    measure_texts(subject, wanted | {"window": sp.get_strategy("random", **SMALL)}, texts[:1], results)
    assert "failures" not in json.loads(results.path.read_text()), "an error is removed once its strategy has a row"


def test_an_evaluation_stops_if_the_kernel_cannot_run(subject, texts, tmp_path):
    results = Results(tmp_path / "report.json", {}, {})
    wanted = {name: strategies()[name] for name in ("oracle, half", "random")}
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(RuntimeError, match=r"torch\.compile"):
            measure_texts(subject, wanted, texts, results)
        with pytest.raises(RuntimeError, match=r"torch\.compile"):
            measure_tasks(subject, wanted, ["niah_single_1"], results, lengths=[700], generate=False)
    report = json.loads(results.path.read_text())
    assert [row["name"] for row in report["rows"]] == ["dense"]
    assert set(report["failures"]) == set(wanted)
    assert {one["strategy"] for one in report["tasks"]["results"]} == {"dense"}


def test_an_empty_list_of_texts_is_refused(subject, tmp_path):
    with pytest.raises(ValueError, match="one or more, got none"):
        measure_texts(subject, strategies(), [], Results(tmp_path / "report.json", {}, {}))


def test_a_model_whose_layers_do_not_all_attend_is_refused(subject, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        subject, "layers", 4
    )  # two texts through two layers make as many calls as one text through four
    with pytest.raises(ValueError, match="4 layers"):
        measure_texts(subject, strategies(), texts, Results(tmp_path / "report.json", {}, {}))


def test_results_of_other_settings_and_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "report.json"
    Results(path, {"tokens": 450, "seed": 0}, {}).put("a", {"x": 1})
    with pytest.raises(ValueError, match=r"with other settings \(tokens is 450 there and 900 now\)"):
        Results(path, {"tokens": 900, "seed": 0}, {})
    assert Results(path, {"tokens": 450, "seed": 0, "texts": ["a"]}, {}).content["texts"] == ["a"]
    for content in ("[1]", "{", '{"rows": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="isn't the result of an evaluation"):
            Results(path, {}, {})


def test_results_record_the_machine_and_its_peak_memory(tmp_path):
    results = Results(tmp_path / "report.json", {}, on_disk.machine("cpu"))
    results.write()
    content = json.loads(results.path.read_text())
    assert content["torch"] == torch.__version__
    assert content["sparse_prefill"] == sp.__version__
    assert content["threads"] == torch.get_num_threads()
    assert content["device"]
    assert content["peak_gib"] > 0.01


def test_cpus_are_named_with_their_bf16_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "CPU_INFO", tmp_path / "cpuinfo")
    for flags, name in (
        ("fpu amx_bf16 avx512_bf16", "Intel Xeon with AMX"),
        ("fpu avx512_bf16", "Intel Xeon with AVX512_BF16"),
        ("fpu", "Intel Xeon without AMX"),
    ):
        on_disk.CPU_INFO.write_text(f"processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: {flags}\n")
        assert on_disk.device_name("cpu") == name
    on_disk.CPU_INFO.write_text("processor\t: 0\nmodel name\t: Apple M2\n")
    assert on_disk.device_name("cpu") == "Apple M2"


def test_json_of_tables_is_compact_and_reads_back_unchanged():
    content = {"rows": [{"name": "a [1,\n 2]", "by_head": [[0.5, 1.0], [0.25, -1e-05]], "empty": [], "no": {}}]}
    written = dumps(content)
    assert json.loads(written) == content
    assert "[0.5, 1.0]" in written
    assert written.count("\n") < 14


# Tasks


def test_tasks_are_also_scored_with_the_dense_model_and_a_second_run_resumes(subject, tmp_path):
    path = tmp_path / "report.json"
    wanted = {"half": strategies()["oracle, half"]}
    steps = []

    def run(*names, **more):
        steps.clear()
        results = Results(path, {"seed": 42}, {})
        assert (
            measure_tasks(
                subject, wanted, names, results, generate=False, on_step=lambda *step: steps.append(step), **more
            )
            == {}
        )
        return json.loads(path.read_text())["tasks"]

    found = run("niah_single_1", lengths=[700], depths=[0.0, 1.0], samples=2)
    assert len(found["results"]) == len(steps) == 8
    assert {one["depth"] for one in found["results"]} == {0.0, 1.0}
    assert {one["strategy"] for one in found["results"]} == {"dense", "half"}
    assert all(one["density"] < 1 for one in found["results"] if one["strategy"] == "half")
    assert "text" not in found["results"][0]
    assert [(row["strategy"], row["samples"]) for row in found["summary"]] == [("dense", 4), ("half", 4)]
    again = run("niah_single_1", lengths=[700], depths=[0.0, 1.0], samples=2)
    assert not steps
    assert again == found
    more = run("niah_single_1", lengths=[700], samples=1)
    assert len(steps) == 2, "samples at drawn depths aren't part of a grid"
    assert len(more["results"]) == 10


def test_unknown_tasks_are_refused(subject, tmp_path):
    results = Results(tmp_path / "report.json", {}, {})
    with pytest.raises(ValueError, match="niah"):
        measure_tasks(subject, {}, ["niah"], results, lengths=[700])


# Times


def test_attention_is_timed_on_the_tensors_of_the_model(subject, texts, tmp_path):
    results = Results(tmp_path / "report.json", {}, {})
    wanted = {"half": strategies()["oracle, half"], "prism": sp.get_strategy("prism", **SMALL)}
    measure_times(subject, wanted, texts[0].tokens, results, repeats=1)
    rows = {row["name"]: row for row in results.content["rows"]}
    assert set(rows) == {"dense", "half", "prism"}
    for row in rows.values():
        assert row["attention_ms"] > 0
        assert row["kernel_ms"] > 0
        assert row["speedup_attention"] == pytest.approx(rows["dense"]["attention_ms"] / row["attention_ms"])
    assert rows["half"]["estimate_ms"] > 0
    assert rows["dense"]["estimate_ms"] == 0
    measure_times(subject, wanted, texts[0].tokens, results, repeats=0)  # all rows exist
    with pytest.raises(ValueError, match="repeats must be"):
        measure_times(subject, wanted, texts[0].tokens, Results(tmp_path / "none.json", {}, {}), repeats=0)
    with pytest.raises(ValueError, match=r"\[1, tokens\]"):
        measure_times(subject, wanted, texts[0].tokens[0], Results(tmp_path / "none.json", {}, {}))


def test_layers_have_their_rotary_embedding(subject):
    layers = layers_of(subject)
    assert [(layer.index, layer.count) for layer in layers] == [(0, 2), (1, 2)]
    assert layers[0].rope is not None


# Strategies and texts


def test_strategies_are_measured_without_dense_rows_unless_the_options_ask_for_them(subject, texts, tmp_path):
    path = tmp_path / "heads.tsv"

    def table():
        return saved_head_table(subject, texts[0].tokens, path)

    assert without_dense_rows({"name": "flash_prefill"}, table).last == 0
    assert without_dense_rows({"name": "flash_prefill", "last": 64}, table).last == 64
    assert without_dense_rows({"name": "delta", "of": {"name": "flash_prefill"}}, table).of.last == 0
    assert without_dense_rows({"name": "delta", "of": "tri_shape"}, table).of.last == 0
    assert not path.exists()
    duo = without_dense_rows({"name": "delta", "of": {"name": "duo_attention"}}, table)
    assert duo.of.table == str(path)
    found = load_table(path)
    assert len(found) == 2
    assert all(len(row) == 2 for row in found)
    path.write_text("0\t0\n0\t1\n")
    table()
    assert load_table(path) == ((0, 0), (0, 1)), "an existing table is used"


def test_the_file_of_a_head_table_is_checked_before_the_model_runs(subject, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "prefill", lambda *args: pytest.fail("the model ran"))
    (tmp_path / "file").write_text("not a table")
    (tmp_path / "circle.tsv").symlink_to(tmp_path / "circle.tsv")
    for path, match in (
        (tmp_path / "file", "is no table of heads"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "heads.tsv", "is a file, and no folder"),
        (tmp_path / "circle.tsv", "can't be written"),
    ):
        with pytest.raises(ValueError, match=match):
            saved_head_table(subject, texts[0].tokens, path)


def test_facts_are_in_the_first_half_and_answers_at_the_end(subject):
    ids = subject.encode(PROSE)
    text = hide_facts("t", ids, subject.encode, tokens=500, facts=2)
    assert text.tokens.shape == (1, 500)
    assert text.answers[-1].stop == 500
    whole = text.tokens[0].tolist()
    for place, answer in zip(("lighthouse", "observatory"), text.answers, strict=True):
        code = subject.decode(whole[answer.start : answer.stop]).strip()
        assert len(code) == 7
        hidden = subject.decode(whole[: len(text.body)]).index(f"access code of the {place} is {code}")
        assert hidden < len(subject.decode(whole[: len(text.body)])) / 2 + 60
    other = hide_facts("t", ids, subject.encode, tokens=500, facts=2, seed=1)
    assert other.tokens.tolist() != text.tokens.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 10**5}, "The text t has"),
        ({"tokens": 100}, "no room for a text"),
        ({"facts": 7}, "facts must be at most 6"),
        ({"skip": -1}, "skip must be"),
    ],
)
def test_texts_that_do_not_fit_are_refused(subject, changes, message):
    with pytest.raises(ValueError, match=message):
        hide_facts("t", subject.encode(PROSE), subject.encode, **({"tokens": 500} | changes))


def test_texts_are_read_from_files_and_from_the_standard_library(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    assert read_source(tmp_path / "text.txt") == "hello"
    assert len(read_source("pydoc")) > 10**5
    assert "def dedent" in read_source("stdlib:textwrap")
    for source in (tmp_path / "nothing.txt", "stdlib:nothing"):
        with pytest.raises(ValueError, match="can't be read as text"):
            read_source(source)
