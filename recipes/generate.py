"""Answer a prompt with sparse prefill: any torchtune decoder, any strategy.

python recipes/generate.py --config recipes/configs/smollm2_135m.yaml prompt="What is a lighthouse for?"
PYTHONPATH=. tune run recipes/generate.py --config recipes/configs/smollm2_135m.yaml prompt_file=report.txt
"""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torchtune import config
from torchtune.data import Message

import sparse_prefill as sp
from sparse_prefill.cli.recipe import DECODER, SAMPLING, START, build, check_sampling, load_decoder, parse, start
from sparse_prefill.core.files import read_text
from sparse_prefill.models.torchtune import Generation, generate, sparsify

PROMPT = ("prompt", "prompt_file", "system", "chat", "prefill_chunk_size")
KEYS = {*DECODER, *START, *SAMPLING, "strategy", *PROMPT}


class GenerateRecipe:
    """Loads a model, gives it sparse prefill, and continues one prompt on one device.

    Args:
        cfg (DictConfig): see ``recipes/configs``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_sampling(cfg)
        self._device, self._logger = start(cfg)

    def setup(self, cfg: DictConfig) -> None:
        """Build the model and the tokenizer."""
        strategy = build(cfg, "strategy")
        model, self._tokenizer, self._stop_tokens = load_decoder(cfg)
        self._model = sparsify(model, strategy)  # sparse prefill in every layer

    def generate(self, cfg: DictConfig) -> str:
        """Answer the prompt, print the answer, and log times and density."""
        # 1. Text to tokens
        tokens = torch.tensor([self._encode(cfg)], device=self._device)  # [1, s]

        # 2. One sparse prefill, then token by token
        with sp.record() as calls:
            made = generate(
                self._model,
                tokens,
                max_new_tokens=cfg.max_new_tokens,
                stop_tokens=self._stop_tokens,
                prefill_chunk_size=cfg.prefill_chunk_size,
                temperature=cfg.temperature,
                top_k=cfg.top_k,
            )

        # 3. Tokens to text
        ids = made.tokens[0].tolist()
        answer = self._tokenizer.decode(ids[:-1] if ids[-1] in self._stop_tokens else ids)
        print(answer)
        self._log(tokens.shape[1], made, [call for call in calls if call.q_len > 1])
        return answer

    def _encode(self, cfg: DictConfig) -> list[int]:
        """The text of the file, if any, followed by the prompt, as tokens."""
        parts = [read_text(cfg.prompt_file, "text")] if cfg.prompt_file else []
        text = "\n\n".join([*parts, cfg.prompt] if cfg.prompt else parts)
        if not text:
            raise ValueError("There is nothing to answer: give prompt=... or prompt_file=...")
        if not cfg.chat:
            return self._tokenizer.encode(text, add_bos=True, add_eos=False)
        messages = [Message(role="user", content=text), Message(role="assistant", content="")]
        if cfg.system:
            messages.insert(0, Message(role="system", content=cfg.system))
        return self._tokenizer({"messages": messages}, inference=True)["tokens"]

    def _log(self, length: int, made: Generation, prefill_calls: list[sp.Call]) -> None:
        pairs = torch.tensor([call.q_len * (2.0 * call.kv_len - call.q_len) for call in prefill_calls])  # of tokens
        density = (torch.stack([call.density.mean() for call in prefill_calls]) * pairs).sum() / pairs.sum()
        reasons = {call.dense for call in prefill_calls}
        how = f"dense: {', '.join(sorted(reasons))}" if None not in reasons else "compiling the kernel included"
        self._logger.info(
            f"Prefill: {length} tokens in {made.prefill_seconds:.2f} s ({how}), {density:.0%} of the blocks computed"
        )
        steps = made.tokens.shape[1] - 1
        speed = f" at {steps / made.decode_seconds:.1f} tokens/s" if steps else ""
        self._logger.info(f"Decode: {steps} tokens in {made.decode_seconds:.2f} s{speed}")
        if self._device.type == "cuda":
            self._logger.info(f"Peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


@parse(KEYS)
def main(cfg: DictConfig) -> None:
    config.log_config(recipe_name="GenerateRecipe", cfg=cfg)
    recipe = GenerateRecipe(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.generate(cfg=cfg)


if __name__ == "__main__":
    main()
