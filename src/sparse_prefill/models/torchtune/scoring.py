"""Likelihoods of tokens inside one sparse prefill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.models.torchtune.checks import Padding, check_inputs, padding_tensor
from sparse_prefill.models.torchtune.decoder import LastTokenDecoder
from sparse_prefill.models.torchtune.prefilling import run_tokens

POSITIONS_PER_STEP = 256  # positions whose logits are held at a time


@dataclass(frozen=True, eq=False)
class Score:
    """Likelihoods of answers, from :func:`score`.

    Args:
        nll (Tensor): negative log-likelihood of each answer token in nats, fp32 [b, answer].
        exact (Tensor): whether every token of the answer was the likeliest, bool [b].
    """

    nll: Tensor
    exact: Tensor


@torch.inference_mode()
def score(model: LastTokenDecoder, tokens: Tensor, answer: Tensor, *, left_padding: Padding | None = None) -> Score:
    """The likelihood of an answer, with prompt and answer in one sparse prefill.

    The answer's tokens attend to the prompt through selected blocks, unlike in ``generate``, where new tokens attend
    densely. Logits are computed at the answer's positions only, 256 at a time.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`.
        tokens (Tensor): token ids of the prompts [b, s].
        answer (Tensor): token ids of the answers [b, answer].
        left_padding (Tensor | Sequence[int] | None): padding tokens before each prompt, [b]. Default: None.

    Returns:
        Score: the likelihood of each token, and whether greedy decoding would give the answer.

    Raises:
        ValueError: if the model wasn't sparsified, or the tokens, the answer or the padding don't fit it.

    Example:
        >>> score(model, tokens, answer).nll.mean()
    """
    check_inputs(model, tokens)
    if answer.ndim != 2 or answer.shape[0] != tokens.shape[0] or answer.shape[1] == 0:
        raise ValueError(f"answer must be token ids [{tokens.shape[0]}, 1 or more], got shape {list(answer.shape)}.")
    found = likelihood(model, torch.cat([tokens, answer], dim=1), last=answer.shape[1], left_padding=left_padding)
    return Score(found.nll, (found.greedy == answer).all(-1))


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Likelihoods of the last tokens, from :func:`likelihood`.

    Args:
        nll (Tensor): negative log-likelihood of each token in nats, given all before it, fp32 [b, last].
        greedy (Tensor): the likeliest token at its position, int64 [b, last].
        hidden (Tensor): normalised hidden states that predict it [b, last, d]; ``model.output`` turns them into logits.
    """

    nll: Tensor
    greedy: Tensor
    hidden: Tensor


@torch.inference_mode()
def likelihood(
    model: LastTokenDecoder, tokens: Tensor, *, last: int, left_padding: Padding | None = None
) -> Likelihood:
    """The likelihoods of the last tokens, all in one sparse prefill.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`.
        tokens (Tensor): token ids [b, s].
        last (int): tokens to predict, at least 1 and fewer than s.
        left_padding (Tensor | Sequence[int] | None): padding tokens before each row, [b]. Default: None.

    Returns:
        Likelihood: of each token. Logits are computed 256 positions at a time.

    Raises:
        ValueError: if the model wasn't sparsified, or the tokens, their number or the padding don't fit it.

    Example:
        >>> perplexity = likelihood(model, tokens, last=tokens.shape[1] // 2).nll.mean().exp()
    """
    check_inputs(model, tokens)
    check_tokens("last", last, least=1)
    if last >= tokens.shape[1]:
        raise ValueError(
            f"last must leave at least one token to predict from, got last={last} of {tokens.shape[1]} tokens."
        )
    left_padding = padding_tensor(left_padding, len(tokens), tokens.shape[1] - last)
    read = tokens[:, :-1]  # the last token predicts nothing
    hidden = run_tokens(model, read, left_padding, last, hidden=True)
    nll, greedy = [], []
    for part, target in zip(
        hidden.split(POSITIONS_PER_STEP, 1), tokens[:, -last:].split(POSITIONS_PER_STEP, 1), strict=True
    ):
        logits = model.output(part).float()  # [b, positions, v]
        flat = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        nll.append(flat.view(target.shape))
        greedy.append(logits.argmax(-1))
    return Likelihood(torch.cat(nll, 1), torch.cat(greedy, 1), hidden)
