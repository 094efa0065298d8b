"""Draw the pictures of these pages from the tables of the library.

    python docs/pictures.py                                # synthetic heads and committed results
    python docs/pictures.py --heads .cache/smollm2_8k.pt   # also each strategy on heads of a real model

``make .cache/smollm2_8k.pt`` writes the file of heads.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from pages import ours
from PIL import Image
from torch import Tensor

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.report import figures_of

TOKENS, BLOCK = 4096, 64
# Layer and head: the first attends to columns, the second to the topic of each query.
SHOWN_HEADS = [(6, 2), (18, 7)]


def structured_head(seed: int, columns: Tensor, distance: int, near: float, topics: float) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, 1, TOKENS, 128] with patterns that heads of language models have.

    Args:
        seed (int): of the noise.
        columns (Tensor): keys that all queries attend to, int64.
        distance (int): distance in tokens at which each query attends to a key.
        near (float): weight of that distance.
        topics (float): weight of the topic of a segment of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(TOKENS)
    frequency = torch.logspace(0, -3, 24)

    def wave(at: Tensor) -> Tensor:  # the product of two falls with the distance of their positions
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
    """The steps of a strategy for one head: scores, selection, guards, lists."""
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


# Real heads


OPTIONS = {"lserve": {"local": 1024}}  # the default is longer than the prompt


@dataclass(frozen=True)
class Head:
    """One query head of a layer, with the queries and keys of all of them."""

    layer: sp.Layer
    q: Tensor  # [1, Hq, M, D]
    k: Tensor  # [1, Hkv, M, D]
    head: int
    _mass: dict[int, Tensor] = field(default_factory=dict)

    def prompt(self, block_size: int = 128) -> sp.Prompt:
        return sp.Prompt(q_len=self.q.shape[2], block_size=block_size)

    def mass(self, block_size: int = 128) -> Tensor:
        """True attention mass by block: fp32 [n, n]."""
        if block_size not in self._mass:
            group = self.q.shape[1] // self.k.shape[1]
            q, k = self.q[:, [self.head]], self.k[:, [self.head // group]]
            self._mass[block_size] = sp.get_estimator("true_mass")(q, k, self.prompt(block_size))[0, 0]
        return self._mass[block_size]

    def show(self, axes, name: str) -> str:
        """Draw the blocks that a strategy keeps; returns its options other than defaults, and its measures."""
        torch.manual_seed(0)
        options = dict(OPTIONS.get(name, {}))
        changed = "".join(f"{option}={value}\n" for option, value in options.items())
        if "table" in registry.strategies.options(name):  # the first shown layer retrieves, others stream
            options["streaming"] = [self.layer.index > SHOWN_HEADS[0][0]] * self.k.shape[1]
        strategy = sp.get_strategy(name, **options).for_layer(self.layer)
        keep = strategy.keep(self.q, self.k).expand(1, self.q.shape[1], -1, -1)[0, self.head]
        prompt, mass = self.prompt(strategy.block_size), self.mass(strategy.block_size)
        blocks(axes, keep.int(), prompt, ["#440154"])
        density, recall = keep.sum() / prompt.visible().sum(), (mass * keep).sum() / mass.sum()
        return f"{changed}density {float(density):.2f}, recall {float(recall):.2f}"


def heads_of(path: Path, chosen: list[tuple[int, int]] = SHOWN_HEADS) -> list[Head]:
    """Some heads of a file of benchmarks/capture.py, by layer and head."""
    layers = torch.load(path)["layers"]
    rope = sp.Rope("interleaved", tuple(100_000.0 ** (-i / 32) for i in range(32)))  # of SmolLM2
    heads = []
    for layer, head in chosen:
        q, k, _ = layers[str(layer)]
        heads.append(Head(sp.Layer(layer, 30, rope), q, k, head))
    return heads


def strategy_picture(name: str, heads: list[Head]) -> Figure:
    """True attention of each head beside the blocks that a strategy keeps."""
    figure = Figure(figsize=(6 * len(heads), 3.3), layout="constrained")
    panels = figure.subplots(1, 2 * len(heads), squeeze=False)[0]
    for head, left, right in zip(heads, panels[::2], panels[1::2], strict=True):
        heat(left, head.mass(), head.prompt())
        left.set_title(f"layer {head.layer.index}, head {head.head}: true attention")
        right.set_title(head.show(right, name))
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    return figure


def overview(names: list[str], heads: list[Head], columns: int = 4) -> Figure:
    """The blocks that each strategy keeps for some heads, side by side."""
    rows = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(1.55 * columns * len(heads), 1.95 * rows), layout="constrained")
    panels = figure.subplots(rows, columns * len(heads), squeeze=False).flatten()
    for axes, head in zip(panels, heads, strict=False):
        heat(axes, head.mass(), head.prompt())
        axes.set_xlabel(f"layer {head.layer.index}, head {head.head}", fontsize=8)
    panels[0].set_title("true attention", fontsize=10, loc="left", fontweight="bold")
    for i, name in enumerate(names, start=1):
        for axes, head in zip(panels[i * len(heads) :], heads, strict=False):
            axes.set_xlabel(head.show(axes, name), fontsize=7)
        panels[i * len(heads)].set_title(name, fontsize=10, loc="left", fontweight="bold")
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def heat(axes, values: Tensor, prompt: sp.Prompt) -> None:
    """Show values >= 0 over three decades, and invisible blocks blank."""
    shown = (values / values.max()).clamp(min=1e-3).log10().masked_fill(~prompt.visible()[0, 0], torch.nan)
    axes.imshow(shown.numpy(), cmap="magma", interpolation="nearest")


def blocks(axes, kind: Tensor, prompt: sp.Prompt, colours: list[str]) -> None:
    """Show blocks of kind 1, 2, ... in their colours, other visible blocks in grey, and the future blank."""
    shown = kind.float().masked_fill(~prompt.visible()[0, 0], torch.nan)
    axes.imshow(
        shown.numpy(), cmap=ListedColormap(["#e8e8e8", *colours]), vmin=0, vmax=len(colours), interpolation="nearest"
    )


# Results


def draw_results(folder: Path, results: list[Path]) -> None:
    """Write the pictures of committed results: frontiers, speed-ups, grids of needles, maps of one strategy."""
    for path in results:
        for picture in figures_of(json.loads(path.read_text())):
            if picture.kind in ("density", "recall") and picture.row != "flex_prefill":
                continue
            name = re.sub(r"[^a-z0-9]+", "_", f"{path.stem} {picture.kind} {picture.row}".lower()).strip("_")
            save(picture.figure, folder / "results" / f"{name}.png", dpi=90, colours=256)


def save(figure: Figure, path: Path, dpi: int = 110, colours: int = 64) -> None:
    """Write a PNG with few colours, at a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)


def draw(folder: Path, heads: list[Head], names: list[str]) -> None:
    """Write a picture of each strategy, and one of all strategies, from real heads."""
    for name in names:
        save(strategy_picture(name, heads), folder / "strategies" / f"{name}.png", dpi=75)
    save(overview([name for name in names if name != "dense"], heads), folder / "strategies.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=Path, help="a file of benchmarks/capture.py")
    args = parser.parse_args()
    assets = Path(__file__).parent / "assets"
    save(walk(), assets / "walk.png")
    committed = Path(__file__).parents[1] / "benchmarks" / "results"
    kinds = ("evaluation", "frontier", "crossover", "needles")
    draw_results(assets, [path for kind in kinds for path in sorted(committed.glob(f"{kind}_*.json"))])
    if args.heads:
        draw(assets, heads_of(args.heads), ours(registry.strategies))


if __name__ == "__main__":
    main()
