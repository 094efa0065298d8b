"""A report shows the numbers that it was given, loads nothing and runs no scripts."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sparse_prefill.report import figures_of, write_report

MEASURED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("evaluation_*.json"))
HOSTILE = '<script>alert("1")</script> & $\\frac$'
BY_HEAD = {"density": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], "recall": [[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]]}
RESULTS = {
    "date": "2026-11-21",
    "command": "sparse-prefill eval model.gguf --strategies a_shape 'flex_prefill:gamma=0.9'",
    "device": "A & B <CPU>",
    "torch": "2.13.0",
    "model": "Tiny",
    "tokens": 4096,
    "texts": [{"name": "prose", "files": ["pydoc"]}],
    "rows": [
        {"name": "dense", "strategy": "dense", "density": 1.0, "recall": 1.0, "oracle_density": 1.0, "needle_exact": 1},
        {
            "name": "a_shape",
            "strategy": "a_shape",
            "options": {"sink": 128},
            "density": 0.29012345,
            "recall": 0.8876177,
            "oracle_density": 0.1846,
            "needle_exact": 0.25,
            "kl_last_token": float("inf"),
            "by_head": BY_HEAD,
        },
        {"name": HOSTILE, "strategy": HOSTILE, "density": 0.5, "recall": 0.95, "perplexity_ratio": 1.0341},
    ],
    "tasks": {
        "summary": [
            {
                "task": "niah_single_1",
                "length": 4096,
                "strategy": "a_shape",
                "samples": 2,
                "density": 0.3,
                "accuracy": 0.5,
                "dense_accuracy": 0.4,
                "exact": 0.0,
                "nll": 2.345,
                "beyond_model": True,
            }
        ],
        "results": [
            {"strategy": "a_shape", "length": length, "depth": depth, "exact": exact, "grid": True}
            for length, depth, exact in ((2048, 0.0, 1.0), (2048, 0.5, 0.0), (4096, 0.0, 0.5), (4096, 0.0, 1.0))
        ],
    },
    "lengths": [1024, 2048],
    "strategies": {"a_shape": {"speedup": [0.5, 2.0]}},
}


class Page(HTMLParser):
    """Tables, texts, tags, ids, links and data values of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.values: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self._table: list[list[str]] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.values += [found["data-value"]] if "data-value" in found else []
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")]
        if tag == "table":
            self._table = self.tables[found["id"]] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        self.texts.append(data.strip())
        if self._table and self._table[-1]:
            self._table[-1][-1] += data


def written(path: Path, results=RESULTS, **options) -> str:
    write_report(results, path / "report.html", **options)
    return (path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("report"))


def test_tables_hold_the_measured_numbers(text):
    page = Page(text)
    assert page.tables["strategies"] == [
        ["strategy", "density", "recall", "oracle's density", "KL, nats", "answers right", "perplexity"],
        ["dense", "1.00", "1.000", "1.00", "", "100%", ""],
        ["a_shape", "0.29", "0.888", "0.18", "inf", "25%", ""],
        [HOSTILE, "0.50", "0.950", "", "", "", "1.034x"],
    ]
    heads = [
        "task",
        "tokens",
        "strategy",
        "samples",
        "density",
        "accuracy",
        "dense",
        "exact",
        "NLL",
        "beyond the model",
    ]
    row = ["niah_single_1", "4,096", "a_shape", "2", "0.30", "50%", "40%", "0%", "2.35", "yes"]
    assert page.tables["tasks"] == [heads, row]
    assert "0.29012345" in page.values, "the unrounded number is also there"


DENSE = {"min_length": [0, 1, 2, 4], "strategy": [3]}
WINDOWS = {"512": [0, 1, 2, 4]}


def test_dense_layers_and_windows_are_shown_next_to_the_density(tmp_path):
    row, task = RESULTS["rows"][1], RESULTS["tasks"]["summary"][0]
    more = {"dense_layers": DENSE, "windows": WINDOWS}
    results = RESULTS | {"rows": [RESULTS["rows"][0] | more | {"dense_layers": {"strategy": [0]}}, row | more]}
    page = Page(written(tmp_path, results | {"tasks": {"summary": [task | more], "results": []}}))
    heads, dense, sparse = page.tables["strategies"]
    assert heads[1:3] == ["dense layers", "density"]
    assert (dense[1], sparse[1]) == ("", "4 min_length, 1 strategy")
    assert page.tables["tasks"][0][4:6] == ["dense layers", "density"]
    assert page.tables["tasks"][1][4] == "4 min_length, 1 strategy"
    assert "min_length 0-2, 4; strategy 3" in page.texts
    assert any("512 tokens in layers 0-2, 4" in text for text in page.texts)


def test_failed_strategies_are_named_with_their_errors(tmp_path):
    page = Page(written(tmp_path, RESULTS | {"failures": {"moba": "The attention kernel wasn't run."}}))
    assert page.texts.index("moba") < page.texts.index("Strategies")
    assert "The attention kernel wasn't run." in page.texts


def test_settings_versions_and_commands_are_shown(text):
    texts = Page(text).texts
    for value in (RESULTS["command"], "A & B <CPU>", "2.13.0", json.dumps(RESULTS["texts"]), '{"sink": 128}'):
        assert value in texts


def test_all_kinds_of_numbers_have_a_figure(text):
    page = Page(text)
    assert page.tags.count("svg") == 5
    captions = [one for one in page.texts if one.endswith(".")]
    for start in (
        "Recall of strategies",
        "Density of a_shape",
        "Recall of a_shape",
        "Share of the answers that a_shape",
        "Time of dense attention",
    ):
        assert any(caption.startswith(start) for caption in captions), start
    assert HOSTILE in page.texts[page.texts.index("oracle") :], "a name in the legend of the frontier"
    assert "0.75" in page.texts, "the mean of two samples in a cell of the grid"
    assert "a_shape (from 1,290 tokens)" in page.texts


def test_figures_have_a_kind_and_the_row_that_they_show():
    found = [(picture.kind, picture.row) for picture in figures_of(RESULTS)]
    a_shape = [("needles", "a_shape"), ("speedup", ""), ("density", "a_shape"), ("recall", "a_shape")]
    assert found == [("frontier", ""), *a_shape]


def test_a_report_loads_nothing_and_runs_no_scripts(text):
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text
    assert HOSTILE not in text
    assert len(set(page.ids)) == len(page.ids), "ids of different figures don't collide"


def test_a_report_supports_small_screens_and_dark_mode(text):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "overflow-x: auto" in text


def test_given_figures_are_added(tmp_path):
    figure = Figure()
    figure.subplots().set_title("an axis title")
    page = Page(written(tmp_path, {"rows": [{"name": "a_shape"}]}, figures={"A caption & more": figure}))
    assert page.tags.count("svg") == 1
    assert {"an axis title", "A caption & more"} <= set(page.texts)


def test_parts_that_are_missing_are_left_out(tmp_path):
    page = Page(written(tmp_path, {"rows": [{"name": "a_shape", "density": 0.5}]}))
    assert page.tables == {"strategies": [["strategy", "density"], ["a_shape", "0.50"]]}
    assert "svg" not in page.tags
    page = Page(written(tmp_path, {key: RESULTS[key] for key in ("lengths", "strategies")}))
    assert page.tables == {}
    assert page.tags.count("svg") == 1


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_committed_results_make_a_report(path, tmp_path):
    results = json.loads(path.read_text())
    page = Page(written(tmp_path, results))
    table = page.tables["strategies"]
    density = table[0].index("density")
    assert [row[0] for row in table[1:]] == [row["name"] for row in results["rows"]]
    assert [row[density] for row in table[1:]] == [f"{row['density']:.2f}" for row in results["rows"]]


def test_results_of_another_form_are_refused(tmp_path):
    for wrong in ([], {"rows": 3}, {"rows": [{"density": 1}]}):
        with pytest.raises(ValueError, match='mapping whose "rows" are mappings with a "name"'):
            write_report(wrong, tmp_path / "report.html")
    for empty in ({"rows": []}, {"strategies": ["a_shape"]}):
        with pytest.raises(ValueError, match="nothing to report"):
            write_report(empty, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


# In a browser


@pytest.fixture
def served(tmp_path):
    """A folder, its address on a local server, and the list of paths requested."""
    requested = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            requested.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(importlib.util.find_spec("lightpanda") is None, reason="there is no lightpanda for this machine")
def test_a_browser_reads_the_numbers_of_a_report(served):
    from lightpanda import Browser

    folder, address, requested = served
    written(folder)
    read = """({
      title: document.title,
      rows: [...document.querySelectorAll("#strategies tbody tr")].map(row => [...row.cells].map(x => x.textContent)),
      recall: Number(document.querySelector("#strategies tbody tr:nth-child(2) td:nth-child(3)").dataset.value),
      pictures: document.querySelectorAll("figure svg").length,
      scripts: document.scripts.length,
    })"""
    with Browser(env={"LIGHTPANDA_DISABLE_TELEMETRY": "true"}, timeout=60) as browser:
        page = browser.new_session()
        assert page.goto(url=f"{address}/report.html").http_status == 200
        found = page.evaluate(script=read)
    assert found["title"] == "Sparse prefill of Tiny"
    assert found["rows"][1] == ["a_shape", "0.29", "0.888", "0.18", "inf", "25%", ""]
    assert found["rows"][2][0] == HOSTILE
    assert found["recall"] == RESULTS["rows"][1]["recall"]
    assert found["pictures"] == 5
    assert found["scripts"] == 0
    assert requested == ["/report.html"], "the page loads nothing else"
