"""Tables of heads: a number for each layer and key head that says how much the head needs the whole context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_prefill.core.files import read_text, read_yaml
from sparse_prefill.core.option_checks import check_finite
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.strategy import get_strategy

HeadTable = tuple[tuple[float, ...], ...]  # [layers][key heads], higher for heads that need more than a window
YAML = (".yaml", ".yml")


def check_table(table: Sequence[Sequence[float]], name: str = "table") -> HeadTable:
    """The table as tuples of floats; ValueError unless it holds finite numbers in rows of equal length."""
    rows = list(table) if isinstance(table, Sequence) and not isinstance(table, str) else []
    is_table = all(isinstance(row, Sequence) and not isinstance(row, str) and len(row) == len(rows[0]) for row in rows)
    if not rows or not is_table or not len(rows[0]):
        raise ValueError(f"{name} must have a row for each layer, with a number for each key head, got {table!r}.")
    for row in rows:
        for x in row:
            check_finite(f"each number of {name}", x)
    return tuple(tuple(map(float, row)) for row in rows)


def load_table(path: str | Path) -> HeadTable:
    """Read a table of heads.

    Args:
        path (str | Path): a file of tab-separated numbers with a line for each layer and a column for each key head,
            as published; or a .yaml or .yml file with a list of lists, which needs the ``yaml`` extra.

    Returns:
        HeadTable: [layers][key heads].

    Raises:
        ValueError: if there is no such file, or it doesn't hold a table.
    """
    path = Path(path)
    if path.suffix in YAML:
        return check_table(read_yaml(path, "table of heads"), str(path))
    text = read_text(path, "table of heads")
    try:
        return check_table([[float(x) for x in line.split("\t")] for line in text.splitlines() if line.strip()])
    except ValueError as error:
        raise ValueError(f"{path} is no table of heads: {error}") from None


def save_table(table: Sequence[Sequence[float]], path: str | Path) -> None:
    """Write a table of heads for :func:`load_table`: YAML to .yaml and .yml files, else tab-separated numbers.

    Raises:
        ValueError: if the table isn't rows of finite numbers of equal length.
    """
    table, path = check_table(table), Path(path)
    if path.suffix in YAML:
        import yaml

        path.write_text(yaml.safe_dump([list(row) for row in table]), encoding="utf-8")
    else:
        path.write_text("".join("\t".join(map(repr, row)) + "\n" for row in table), encoding="utf-8")


def streaming_heads(table: Sequence[Sequence[float]], sparsity: float) -> tuple[tuple[bool, ...], ...]:
    """Marks the heads that a window suffices for: those with numbers under a quantile of the whole table.

    Args:
        table (Sequence[Sequence[float]]): a number for each layer and key head.
        sparsity (float): share of heads to mark; 0 or less marks none, 1 or more all.

    Returns:
        tuple[tuple[bool, ...], ...]: [layers][key heads], True for a marked head. The quantile is interpolated
        linearly. Of heads with equal numbers, later ones are marked first.
    """
    table = check_table(table)
    flat = [x for row in table for x in row]
    count = len(flat) if sparsity >= 1 else max(0, math.ceil(round(sparsity * (len(flat) - 1), 9)))
    lowest = set(sorted(range(len(flat)), key=lambda i: (flat[i], -i))[:count])
    width = len(table[0])
    return tuple(tuple(layer * width + head in lowest for head in range(width)) for layer in range(len(table)))


def window_loss(
    q: Tensor,
    k: Tensor,
    prompt: Prompt | None = None,
    *,
    sink: int = 128,
    local: int = 256,
    query_blocks: Sequence[int] | None = None,
) -> list[float]:
    """How much attention each key head loses with a window: one layer's row of a table, without training.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt | None): what the tokens are; the window is rounded out to its blocks. Default: a causal prompt
            of these lengths.
        sink (int): number of first tokens in the window. Default: 128.
        local (int): number of nearest keys in the window. Default: 256.
        query_blocks (Sequence[int] | None): query blocks to measure. Default: sixteen, evenly spaced.

    Returns:
        list[float]: for each key head, the share of true attention outside the window, in [0, 1], as a mean over its
        query heads, these query blocks and the batch.

    Raises:
        ValueError: if the tensors, the prompt or the options don't fit each other.
    """
    if prompt is None:
        prompt = Prompt(q_len=q.shape[2], kv_len=k.shape[2])
    keep = get_strategy("a_shape", block_size=prompt.block_size, sink=sink, local=local).keep(q, k, prompt)
    if query_blocks is None:
        query_blocks = sorted({round((i + 1) * prompt.n_q / 16) - 1 for i in range(16)} & set(range(prompt.n_q)))
    mass = true_mass(q, k, prompt, query_blocks)  # [B, Hq, blocks, n_k]
    lost = (mass * ~keep[:, :, torch.as_tensor(query_blocks, device=keep.device)]).unflatten(1, (k.shape[1], -1))
    total = mass.unflatten(1, (k.shape[1], -1)).sum((0, 2, 3, 4)).clamp(min=torch.finfo(mass.dtype).tiny)
    return (lost.sum((0, 2, 3, 4)) / total).tolist()
