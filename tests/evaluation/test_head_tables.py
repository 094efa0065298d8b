"""The head table that is estimated from texts."""

import pytest
import reference

import sparse_prefill as sp
from sparse_prefill.evaluation.head_tables import estimate_head_table
from sparse_prefill.head_table import load_table, save_table, window_loss
from tests.calibration.replay import Replay


def test_rows_are_mean_losses_over_the_texts_and_duo_attention_takes_the_table(tmp_path):
    texts = [[reference.random_qkv(q_len=n, seed=10 * n + i, scale=3) for i in range(3)] for n in (2304, 2100)]
    subject = Replay(*texts)
    table = estimate_head_table(subject, subject.ids, sink=128, local=256)
    for index, row in enumerate(table):
        each = [window_loss(*layers[index][:2], sink=128, local=256) for layers in texts]
        assert row == pytest.approx([sum(x) / 2 for x in zip(*each, strict=True)], abs=1e-6)
    save_table(table, tmp_path / "heads.tsv")
    assert load_table(tmp_path / "heads.tsv") == table
    bound = sp.get_strategy("duo_attention", table=str(tmp_path / "heads.tsv")).for_layer(sp.Layer(2, 3))
    assert sum(bound.streaming) in (0, 1, 2)
