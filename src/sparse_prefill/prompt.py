"""What the tokens of a prompt are, and which pairs of them may attend to each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from sparse_prefill.options import check_tokens

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Prompt:
    """The shape of a prompt: lengths, chunk offset, padding, documents and the block grid.

    The only place that knows what may be attended. Queries are the last ``q_len`` of the ``kv_len``
    tokens, so that query row ``r`` stands at position ``kv_len - q_len + r`` (a chunk behind a cached
    prefix, or a whole prompt when both lengths agree). Block ``i`` of the queries holds rows
    ``[i * block_size, (i + 1) * block_size)``, block ``j`` of the keys likewise; the last of each may
    be ragged.

    Notation used for tensor shapes:
        B: batch size, or 1 where all rows of the batch agree; n_q, n_k: number of query and key blocks.

    Args:
        q_len (int): number of query tokens, at least 1.
        kv_len (int | None): number of key tokens, at least ``q_len``. Default: ``q_len``.
        block_size (int): tokens in a block, a power of two from 16 on. Default: 128.
        left_padding (Tensor | Sequence[int] | None): padding tokens in front of each prompt of the batch,
            shape [B], each in ``[0, kv_len]``. Padding is never attended, scored or pooled. Default: None.
        documents (Tensor | Sequence | None): document id of each key token, shape [kv_len] or [B, kv_len],
            non-decreasing along the tokens. Tokens attend inside their own document only. Default: None.
        total_len (int | None): number of tokens of the whole prompt, where this is a chunk of it that others follow:
            it says which rows :meth:`last` means. At least ``kv_len``. Default: ``kv_len``, i.e. nothing follows.

    Raises:
        ValueError: if a length, the block size, the padding or the documents are out of range, or if both
            ``left_padding`` and ``documents`` are given (padding is then a document of its own).

    Example:
        >>> prompt = Prompt(q_len=512, kv_len=8192)   # the last 512 tokens, behind 7,680 cached ones
        >>> prompt.visible().shape
        torch.Size([1, 1, 4, 64])
    """

    q_len: int
    kv_len: int = None  # type: ignore[assignment]  # an int once built
    block_size: int = 128
    left_padding: Tensor | Sequence[int] | None = None
    documents: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None
    total_len: int | None = None
    _tables: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kv_len is None:
            object.__setattr__(self, "kv_len", self.q_len)
        for name in ("q_len", "kv_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of tokens, at least 1, got {value!r}.")
        if self.q_len > self.kv_len:
            raise ValueError(
                f"q_len must not exceed kv_len, got q_len={self.q_len} and kv_len={self.kv_len}: queries are the "
                "last tokens of the keys, so pass the keys of the whole prefix along."
            )
        if self.total_len is not None:
            check_tokens("total_len", self.total_len, least=self.kv_len)
        check_block_size(self.block_size)
        if self.left_padding is not None and self.documents is not None:
            raise ValueError("Give left_padding or documents, not both: make the padding a document of its own.")
        if self.left_padding is not None:
            object.__setattr__(self, "left_padding", self._checked_padding())
        if self.documents is not None:
            object.__setattr__(self, "documents", self._checked_documents())

    def _checked_padding(self) -> Tensor | None:
        padding = torch.as_tensor(self.left_padding)
        if padding.ndim != 1 or padding.is_floating_point() or padding.dtype == torch.bool:
            raise ValueError(
                f"left_padding must be whole numbers of shape [B], got shape {list(padding.shape)} and "
                f"dtype {padding.dtype}: give the number of padding tokens in front of each prompt."
            )
        if bool(((padding < 0) | (padding > self.kv_len)).any()):
            raise ValueError(f"left_padding must lie in [0, kv_len={self.kv_len}], got {padding.tolist()}.")
        return padding.long() if bool(padding.any()) else None

    def _checked_documents(self) -> Tensor | None:
        documents = torch.as_tensor(self.documents)
        documents = documents[None] if documents.ndim == 1 else documents
        if documents.ndim != 2 or documents.shape[1] != self.kv_len or documents.is_floating_point():
            raise ValueError(
                f"documents must be whole numbers of shape [kv_len] or [B, kv_len] with kv_len={self.kv_len}, "
                f"got shape {list(documents.shape)} and dtype {documents.dtype}."
            )
        if bool((documents.diff(dim=1) < 0).any()):
            raise ValueError("documents must not decrease along the tokens: number the documents in their order.")
        return documents.long() if bool((documents != documents[:, :1]).any()) else None

    # Sizes ------------------------------------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Position of the first query row, in tokens."""
        return self.kv_len - self.q_len

    @property
    def n_q(self) -> int:
        """Number of query blocks."""
        return -(-self.q_len // self.block_size)

    @property
    def n_k(self) -> int:
        """Number of key blocks."""
        return -(-self.kv_len // self.block_size)

    @property
    def batch(self) -> int:
        """Batch size that padding or documents ask for; 1 where any batch fits."""
        rows = self.left_padding if self.left_padding is not None else self.documents
        return 1 if rows is None else len(rows)

    @property
    def is_causal(self) -> bool:
        """Whether plain causality is all there is: no padding and no documents."""
        return self.left_padding is None and self.documents is None

    def on_grid(self, block_size: int) -> Prompt:
        """The same tokens in blocks of another size. Kept with the prompt, so that layers share its tables."""
        if block_size == self.block_size:
            return self
        return self._cached(f"grid {block_size}", "cpu", lambda _: replace(self, block_size=block_size))

    def row(self, b: int) -> Prompt | None:
        """One row of a left-padded batch without its padding, None where all its queries are padding.

        Kept with the prompt, so that layers share its tables.
        """

        def make(_: torch.device) -> Prompt | None:
            padding = int(self.start()[b])
            q_len = min(self.q_len, self.kv_len - padding)
            if q_len <= 0:
                return None
            total_len = None if self.total_len is None else self.total_len - padding
            return Prompt(q_len, self.kv_len - padding, self.block_size, total_len=total_len)

        return self._cached(f"row {b}", "cpu", make)

    @property
    def shared(self) -> dict[Hashable, Any]:
        """What the layers of a model leave for each other while this prompt passes through them."""
        return self._cached("shared", "cpu", lambda _: {})

    # Tokens -----------------------------------------------------------------------------------------------

    def start(self, device: torch.device | str = "cpu") -> Tensor:
        """First real token of each prompt: int64 [B]."""
        return self._cached("start", device, self._start)

    def query_positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each query row among the keys: int64 [q_len]."""
        return torch.arange(self.offset, self.kv_len, device=device)

    def may_attend(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Which query positions may attend to which keys.

        Args:
            rows (Tensor): query positions among the keys, int64 [m].
            keys (Tensor): key positions, int64 [k].

        Returns:
            Tensor: bool [B, 1, m, k], True where the pair is allowed.
        """
        allowed = (rows[:, None] >= keys)[None, None]  # [1, 1, m, k]
        if self.left_padding is not None:
            allowed = allowed & (keys >= self.start(keys.device)[:, None])[:, None, None]
        if self.documents is not None:
            ids = self._ids(keys.device)
            allowed = allowed & (ids[:, rows, None] == ids[:, None, keys])[:, None]
        return allowed

    def last_rows(self, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Positions of the last query rows, int64 [count], and which keys they may attend, bool [B, 1, count, kv_len].

        Kept with the prompt, since every layer asks for the same.
        """

        def make(device: torch.device) -> tuple[Tensor, Tensor]:
            rows = self.query_positions(device)[-count:]
            return rows, self.may_attend(rows, torch.arange(self.kv_len, device=device))

        return self._cached(f"last_rows {count}", device, make)

    def real_keys(self, device: torch.device | str = "cpu") -> Tensor:
        """Slots of the key grid with a real token, neither padding nor behind the end: bool [B, n_k * block_size]."""
        slots = torch.arange(self.n_k * self.block_size, device=device)
        return (slots >= self.start(device)[:, None]) & (slots < self.kv_len)

    def real_queries(self, device: torch.device | str = "cpu") -> Tensor:
        """Slots of the query grid with a real token: bool [B, n_q * block_size]."""
        slots = torch.arange(self.n_q * self.block_size, device=device)
        return (slots + self.offset >= self.start(device)[:, None]) & (slots < self.q_len)

    # Blocks -----------------------------------------------------------------------------------------------

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs with at least one allowed token pair: bool [B, 1, n_q, n_k]."""
        return self._cached("visible", device, self._visible)

    def fully_visible(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs in which every token pair is allowed and the key block isn't ragged: bool [B, 1, n_q, n_k]."""
        return self._cached("fully_visible", device, self._fully_visible)

    def diagonal(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs that hold a token's own position, the least that any row must keep: bool [B, 1, n_q, n_k]."""
        return self._cached("diagonal", device, self._diagonal)

    def near(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs with a token pair less than ``tokens`` apart, causality aside: bool [1, 1, n_q, n_k]."""
        q_lo, _, _, k_hi = self._edges(device)
        return (q_lo[:, None] - k_hi < tokens)[None, None]

    def first(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs whose keys hold one of the first ``tokens`` real tokens: bool [B, 1, n_q, n_k].

        First of the prompt, or, where there are documents, of each document.
        """
        _, _, k_lo, k_hi = self._edges(device)
        if self.documents is None:
            start = self.start(device)[:, None]  # [B, 1]
            held = (k_lo < start + tokens) & (k_hi >= start) & (tokens > 0)
            return held[:, None, None].expand(-1, -1, self.n_q, -1)
        age = torch.arange(self.kv_len, device=device) - self._document_starts(device)
        young = self._any_in_block(age < tokens, self.n_k)
        return young[:, None, None].expand(-1, -1, self.n_q, -1)

    def last(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs whose queries hold one of the last ``tokens`` of the whole prompt: bool [1, 1, n_q, n_k]."""
        _, q_hi, _, _ = self._edges(device)
        whole = self.kv_len if self.total_len is None else self.total_len
        return (q_hi >= whole - tokens)[None, None, :, None].expand(-1, -1, -1, self.n_k)

    def mask_mod(self, device: torch.device | str = "cpu", batch: int | None = None) -> MaskMod:
        """The token-level rule as FlexAttention wants it, for blocks that are visible in part.

        Args:
            device (torch.device | str): where the tensors that it captures live. Default: "cpu".
            batch (int | None): batch size of the attention call. Default: :attr:`batch`.

        Returns:
            MaskMod: ``mask_mod(b, h, q_idx, kv_idx)``.
        """
        return mask_mod(*self.mask_tensors(device, batch))

    def mask_tensors(
        self, device: torch.device | str = "cpu", batch: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What :meth:`mask_mod` captures: int64 offset [], first real token [B], and with documents, else None, the
        first token of each query row's document [B, slots], which reach beyond the last row as whole tiles do.
        """
        rows = self.batch if batch is None else batch
        return self._cached(f"mask_tensors {rows}", device, lambda device: self._mask_tensors(device, rows))

    # How the tables are made ------------------------------------------------------------------------------

    def _cached(self, name: str, device: torch.device | str, make: Callable):
        key = (name, str(device))
        if key not in self._tables:
            self._tables[key] = make(torch.device(device))
        return self._tables[key]

    def _start(self, device: torch.device) -> Tensor:
        if self.left_padding is None:
            return torch.zeros(self.batch, dtype=torch.int64, device=device)
        return cast(Tensor, self.left_padding).to(device)

    def _ids(self, device: torch.device | str) -> Tensor:
        return cast(Tensor, self.documents).to(device)

    def _document_starts(self, device: torch.device | str) -> Tensor:
        """First token of each token's document: int64 [B, kv_len]."""
        ids = self._ids(device).contiguous()
        return torch.searchsorted(ids, ids)

    def _edges(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last position of each query block [n_q] and key block [n_k]."""
        i = torch.arange(self.n_q, device=device) * self.block_size
        j = torch.arange(self.n_k, device=device) * self.block_size
        q_lo, q_hi = self.offset + i, self.offset + (i + self.block_size).clamp(max=self.q_len) - 1
        return q_lo, q_hi, j, (j + self.block_size).clamp(max=self.kv_len) - 1

    def _document_edges(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last document of each query block [B, n_q, 1] and key block [B, 1, n_k]."""
        ids = self._ids(device)
        q_lo, q_hi, k_lo, k_hi = self._edges(device)
        return ids[:, q_lo, None], ids[:, q_hi, None], ids[:, None, k_lo], ids[:, None, k_hi]

    def _visible(self, device: torch.device) -> Tensor:
        _, q_hi, k_lo, k_hi = self._edges(device)
        start = self.start(device)[:, None, None]  # [B, 1, 1]
        first_key = torch.maximum(k_lo, start)  # [B, 1, n_k]
        visible = (first_key <= k_hi) & (first_key <= q_hi[:, None])
        if self.documents is not None:
            # Ids don't decrease, so an earlier key block meets the query block's documents at its last token.
            q_doc, _, _, k_doc = self._document_edges(device)
            visible = visible & (k_doc >= q_doc)
        return visible[:, None]

    def _fully_visible(self, device: torch.device) -> Tensor:
        q_lo, _, k_lo, k_hi = self._edges(device)
        start = self.start(device)[:, None, None]
        whole = k_lo + self.block_size <= self.kv_len
        full = whole & (k_hi <= q_lo[:, None]) & (k_lo >= start)
        if self.documents is not None:
            _, q_doc, k_doc, _ = self._document_edges(device)
            full = full & (k_doc == q_doc)
        return full[:, None]

    def _diagonal(self, device: torch.device) -> Tensor:
        q_lo, q_hi, k_lo, k_hi = self._edges(device)
        own = (k_lo <= q_hi[:, None]) & (k_hi >= q_lo[:, None])
        return own & self.visible(device)

    def _any_in_block(self, tokens: Tensor, blocks: int) -> Tensor:
        pad = blocks * self.block_size - tokens.shape[-1]
        return torch.nn.functional.pad(tokens, (0, pad)).unflatten(-1, (blocks, self.block_size)).any(-1)

    def _mask_tensors(self, device: torch.device, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        offset = torch.tensor(self.offset, dtype=torch.int64, device=device)
        start = self.start(device).expand(batch).contiguous()
        if self.documents is None:
            return offset, start, None
        tile = max(self.block_size, 128)  # no kernel tile is larger
        slots = 1 << (self.q_len + tile - 1).bit_length()
        begin = self._document_starts(device)[:, self.offset :]
        begin = torch.nn.functional.pad(begin, (0, slots - self.q_len)).expand(batch, -1).contiguous()
        # The kernel checks each look-up against the sizes of this table, and the CPU kernel of torch 2.13 can't spell
        # symbolic ones: they are constants, few of them as they are powers of two.
        torch._dynamo.mark_static(begin)
        return offset, start, begin


def mask_mod(offset: Tensor, start: Tensor, begin: Tensor | None) -> MaskMod:
    """The rule of a prompt over absolute positions; captures tensors only, so that new values don't recompile."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx + offset >= kv_idx) & (kv_idx >= start[b])

    row_begin = cast(Tensor, begin)

    def inside_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx + offset >= kv_idx) & (kv_idx >= row_begin[b, q_idx])

    return causal if begin is None else inside_document


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless ``block_size`` is a power of two, at least 16."""
    whole = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not whole or block_size < 16 or block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two, at least 16, got {block_size!r}: 128 is fast everywhere, 64 selects "
            "more finely."
        )
