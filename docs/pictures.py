"""The pictures of these pages, from the library's own tables: python docs/pictures.py"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

import sparse_prefill as sp

TOKENS, BLOCK = 4096, 64


def structured_head(seed: int, columns: Tensor, distance: int, near: float, topics: float) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, 1, TOKENS, 128] that attend as heads of language models are known to.

    Args:
        seed (int): of the noise.
        columns (Tensor): keys that all queries look at, int64.
        distance (int): how far before itself a query looks.
        near (float): weight of that distance.
        topics (float): weight of what a segment of the text shares.
    """
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(TOKENS)
    frequency = torch.logspace(0, -3, 24)

    def wave(at: Tensor) -> Tensor:  # its product with itself falls with the difference of the positions
        angle = at[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], -1) / 24**0.5  # [TOKENS, 48]

    subject = torch.randn(6, 48, generator=generator)
    subject = subject / subject.norm(dim=-1, keepdim=True)
    segment = torch.tensor([0, 1, 2, 0, 3, 1, 4, 0, 5, 2]).repeat_interleave(-(-TOKENS // 10))[:TOKENS]
    hub = torch.zeros(TOKENS, 1).index_fill_(0, columns, 1.0)
    fill = torch.zeros(TOKENS, 31)
    q = torch.cat([near * wave(position - distance), topics * subject[segment], torch.full_like(hub, 12.0), fill], -1)
    k = torch.cat([near * wave(position), topics * subject[segment], 12 * hub, fill], -1)
    q, k = (x + 0.3 * torch.randn(x.shape, generator=generator) for x in (q, k))
    return q[None, None], k[None, None]


def walk() -> Figure:
    """One head through a strategy: scores, selection, guards, lists."""
    q, k = structured_head(0, torch.tensor([0, 700, 1500, 2600]), distance=900, near=7.5, topics=8.5)
    prompt = sp.Prompt(q_len=TOKENS, block_size=BLOCK)
    estimator = sp.get_estimator("pooled_attention")
    selector = sp.get_selector("cumulative", share=0.8)
    strategy = sp.ComposedStrategy(estimator=estimator, selector=selector, block_size=BLOCK, sink=64, local=256)
    scores = estimator(q, k, prompt)
    selected = selector(scores, prompt)
    keep = strategy.keep(q, k, prompt)
    partial = keep & ~prompt.fully_visible()

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    heat(panels[0], scores[0, 0], prompt)
    panels[0].set(title="estimator: scores", ylabel="query block")
    blocks(panels[1], selected[0, 0].int(), prompt, ["#440154"])
    panels[1].set_title("selector: share 0.8 of each row")
    blocks(panels[2], selected[0, 0].int() + 2 * (keep & ~selected)[0, 0].int(), prompt, ["#440154", "#e07b39"])
    panels[2].set_title("guards add sink and local blocks")
    blocks(panels[3], keep[0, 0].int() + partial[0, 0].int(), prompt, ["#3b528b", "#e07b39"])
    panels[3].set_title("full list (blue), partial list (orange)")
    for axes in panels:
        axes.set_xlabel("key block")
    return figure


def flex_prefill() -> Figure:
    """One vertical-slash head and one query-aware head: true attention and kept blocks."""
    heads = [
        structured_head(1, torch.tensor([0, 600, 2000, 2900]), distance=1200, near=13.0, topics=0.0),
        structured_head(2, torch.tensor([], dtype=torch.int64), distance=0, near=4.0, topics=9.0),
    ]
    q, k = (torch.cat(x, dim=1) for x in zip(*heads, strict=True))  # [1, 2, TOKENS, 128]
    prompt = sp.Prompt(q_len=TOKENS, block_size=BLOCK)
    strategy = sp.get_strategy("flex_prefill", gamma=0.95, tau=0.3, block_size=BLOCK)
    query_aware = strategy.score(q, k, prompt).query_aware[0, :, 0].tolist()
    keep = strategy.keep(q, k, prompt)
    mass = sp.get_estimator("true_mass")(q, k, prompt)
    density = keep.sum((-2, -1)) / prompt.visible().sum((-2, -1))

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    for head, name in enumerate("query-aware" if aware else "vertical-slash" for aware in query_aware):
        left, right = panels[2 * head], panels[2 * head + 1]
        heat(left, mass[0, head], prompt)
        left.set_title(f"head {head}: true attention")
        blocks(right, keep[0, head].int(), prompt, ["#440154"])
        right.set_title(f"{name}, density {density[0, head]:.2f}")
    panels[0].set_ylabel("query block")
    for axes in panels:
        axes.set_xlabel("key block")
    return figure


def heat(axes, values: Tensor, prompt: sp.Prompt) -> None:
    """Show values >= 0 over three decades, blank where nothing is visible."""
    shown = (values / values.max()).clamp(min=1e-3).log10().masked_fill(~prompt.visible()[0, 0], torch.nan)
    axes.imshow(shown.numpy(), cmap="magma", interpolation="nearest")


def blocks(axes, kind: Tensor, prompt: sp.Prompt, colours: list[str]) -> None:
    """Show blocks of kind 1, 2, ... in their colours, other visible ones in grey, the future blank."""
    shown = kind.float().masked_fill(~prompt.visible()[0, 0], torch.nan)
    axes.imshow(
        shown.numpy(), cmap=ListedColormap(["#e8e8e8", *colours]), vmin=0, vmax=len(colours), interpolation="nearest"
    )


PICTURES = {"walk.png": walk, "flex_prefill.png": flex_prefill}


def main(folder: Path) -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        draw().savefig(folder / name, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(__file__).parent / "assets")
