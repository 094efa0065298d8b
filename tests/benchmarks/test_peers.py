"""Other implementations: called if installed, listed if missing, and reported with their error if they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peers

NAMES = [peer.name for peer in peers.PEERS]
MODULES = {peer.module.partition(".")[0] for peer in peers.PEERS}
SHORT = (
    "--lengths 300 --heads 6 2 16 --dtypes fp32 --repeats 1 --device cpu --strategies a_shape:min_length=0,local=128"
)


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    """Pretend that none of the packages is installed."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_bnhd(q, k, v):
    """Attention of tensors [B, N, H, D]."""
    return causal(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class FlashInferWrapper:
    def __init__(self, workspace):
        assert workspace.numel() >= 2**27

    def plan(self, keep, rows, columns, heads, key_heads, dim, *, causal, q_data_type):
        assert keep.shape == (6, 3, 3)
        assert heads == key_heads == 6
        assert rows.tolist() == columns.tolist() == [[128, 128, 44]] * 6
        assert causal
        self.keep, self.dim, self.dtype = keep, dim, q_data_type

    def run(self, q, k, v):
        assert self.dtype == q.dtype
        return causal(q[None], k[None], v[None])[0]


def vertical_slash(q, k, v, columns, diagonals):
    assert k.shape == q.shape, "key heads are repeated"
    assert columns.dtype == diagonals.dtype == torch.int32
    assert set(range(30)) <= set(columns[0, 0].tolist())
    assert set(range(100)) <= set(diagonals[0, 0].tolist())
    return causal(q, k, v)


def flash_prefill(q, k, v, out, begins, longest, *, alpha, block_size):
    assert begins.tolist() == [0, longest]
    out.copy_(attend_bnhd(q[None], k[None], v[None])[0])


FAKES = {
    "flash_attn": {"flash_attn_func": lambda q, k, v, causal: attend_bnhd(q, k, v)},
    "flash_attn_interface": {"flash_attn_func": lambda q, k, v, causal: (attend_bnhd(q, k, v), None)},
    "flex_prefill": {"flex_prefill_attention": lambda q, k, v, **options: attend_bnhd(q, k, v)},
    "xattn.src.Xattention": {"Xattention_prefill": lambda q, k, v, **options: causal(q, k, v)},
    "minference": {
        "vertical_slash_sparse_attention": vertical_slash,
        "block_sparse_attention": lambda q, k, v, top_k: causal(q, k, v),
    },
    "ops": {"flash_prefill_varlen_func": flash_prefill},
    "flashinfer": {"VariableBlockSparseAttentionWrapper": FlashInferWrapper},
}


def install(monkeypatch, name, **functions):
    parts = name.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), ModuleType(parts[i]))
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


def rows_of(report):
    (case,) = report["results"]
    return {row["name"]: row for row in case["rows"]}


def test_missing_peers_are_listed(tmp_path, capsys):
    report = peers.main([*SHORT.split(), "--json", str(tmp_path / "peers.json")])
    assert report["not installed"] == NAMES
    assert f"not installed: {', '.join(NAMES)}" in capsys.readouterr().out
    rows = rows_of(json.loads((tmp_path / "peers.json").read_text()))
    assert list(rows) == ["SDPA, default", "dense FlexAttention", "a_shape:min_length=0,local=128"]
    assert rows["SDPA, default"]["against SDPA"] == 1
    assert rows["SDPA, default"]["relative error"] == 0
    assert rows["dense FlexAttention"]["relative error"] < 1e-5
    assert 0 < rows["a_shape:min_length=0,local=128"]["relative error"] < 1


def test_installed_peers_are_called_with_the_arguments_of_their_functions(monkeypatch):
    for name, functions in FAKES.items():
        install(monkeypatch, name, **functions)
    report = peers.main(SHORT.split())
    assert report["not installed"] == []
    rows = rows_of(report)
    assert set(NAMES) <= rows.keys()
    for name in NAMES:
        assert rows[name].get("relative error", rows[name].get("error")) == pytest.approx(0, abs=1e-6), name
        assert rows[name]["seconds"] > 0


def test_a_failed_peer_is_reported_in_one_line_and_the_others_are_measured(monkeypatch, capsys):
    def fail(*_args, **_options):
        raise RuntimeError("needs a GPU\nand a long explanation")

    install(monkeypatch, "flash_attn", flash_attn_func=fail)
    install(monkeypatch, "flex_prefill")  # without its function
    install(monkeypatch, "minference", **FAKES["minference"])
    rows = rows_of(peers.main(SHORT.split()))
    assert rows["FlashAttention 2"] == {"name": "FlashAttention 2", "error": "RuntimeError: needs a GPU"}
    assert rows["FlexPrefill"]["error"].startswith("AttributeError: ")
    assert rows["MInference"]["seconds"] > 0
    assert "| FlashAttention 2 | RuntimeError: needs a GPU | | |" in capsys.readouterr().out


def test_installed_packages_are_found_without_being_imported(monkeypatch, tmp_path):
    (tmp_path / "flashprefill_varlen_func.py").write_text("raise SystemError")
    places = {"ops": [], "flash_attn": None}
    monkeypatch.setattr(
        peers,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=places[name]) if name in places else None,
    )
    there = {peer.name for peer in peers.PEERS if peers.installed(peer)}
    assert there == {"FlashAttention 2"}, "another package is called ops"
    places["ops"] = [str(tmp_path)]
    assert {peer.name for peer in peers.PEERS if peers.installed(peer)} == {"FlashAttention 2", "FlashPrefill"}


def test_layers_are_averaged_and_a_failure_in_one_is_reported():
    layers = [
        {"SDPA, default": {"relative error": 0.0, "seconds": 2.0}, "other": {"relative error": 0.1, "seconds": 1.0}},
        {"SDPA, default": {"relative error": 0.0, "seconds": 4.0}, "other": {"error": "RuntimeError: no"}},
    ]
    sdpa, other = peers.mean(layers)
    assert sdpa == {"name": "SDPA, default", "relative error": 0, "seconds": 3, "against SDPA": 1}
    assert other == {"name": "other", "error": "RuntimeError: no"}


def test_vertical_and_slash_lines_come_from_the_last_queries():
    q, k, v = reference.random_qkv(q_len=300)
    seen = {}

    def keep(q, k, v, columns, diagonals):
        seen.update(columns=columns, diagonals=diagonals)
        return causal(q, k, v)

    q[:, :, -64:, 0] += 30
    k[:, :, 77, 0] += 30  # all of the last queries attend to this key
    k[0, 0, 36:100] = 20 * F.normalize(k[0, 0, 36:100], dim=-1)
    q[0, 0, 236:] = k[0, 0, 36:100]  # in head 0, each of the last queries attends to the key 200 before it
    with pytest.MonkeyPatch.context() as patch:
        install(patch, "minference", vertical_slash_sparse_attention=keep)
        peers.minference(q, k, v, verticals=31, slashes=101)()
    assert 77 in seen["columns"][0, 3].tolist()
    assert 200 in seen["diagonals"][0, 0].tolist()
