"""Save a real model's q, k and v for benchmarks/attention.py.

    python benchmarks/capture.py --config recipes/configs/demo.yaml --out .cache/smollm2_8k.pt

Runs the prompt of a demo configuration densely and keeps every third layer. Needs the torchtune, models and plot
extras; the file that it writes needs torch alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

import torch
from omegaconf import OmegaConf

import sparse_prefill as sp
from sparse_prefill.models import torchtune as door
from sparse_prefill.models.torchtune import attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from demo import DemoRecipe  # recipes are scripts, not a package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/configs/demo.yaml")
    parser.add_argument("--out", type=Path, default=Path(".cache/smollm2_8k.pt"))
    parser.add_argument("--every", type=int, default=3, help="keep one layer in this many")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="changes to the configuration, as tokens=4000")
    args = parser.parse_args()

    recipe = DemoRecipe(cfg=OmegaConf.merge(OmegaConf.load(args.config), OmegaConf.from_dotlist(args.options)))
    recipe.setup()
    seen: list[tuple[torch.Tensor, ...]] = []

    def keep_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest, **kwargs) -> torch.Tensor:
        layer = len(seen)
        seen.append(tuple(x.contiguous().cpu() for x in (q, k, v)) if layer % args.every == 0 else ())
        return sp.sparse_attention(q, k, v, *rest, **kwargs)

    with mock.patch.object(attention, "sparse_attention", keep_inputs):
        door.prefill(door.sparsify(recipe.model, "dense"), recipe.prompt)
    layers = {str(i): qkv for i, qkv in enumerate(seen) if qkv}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"layers": layers, "tokens": recipe.prompt.shape[1], **recipe.source()}, args.out)
    print(f"{len(layers)} layers of {recipe.prompt.shape[1]} tokens: {args.out}")


if __name__ == "__main__":
    main()
