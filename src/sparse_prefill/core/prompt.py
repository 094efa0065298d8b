"""What the tokens of a prompt are, and which pairs of them may attend to each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.option_checks import as_int, check_tokens
from sparse_prefill.core.renamed import former_name

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LEAST_SLOTS = 1 << 18  # 1 MB for each row of a batch


@dataclass(frozen=True, eq=False)
class Prompt:
    """The shape of a prompt: lengths, chunk offset, padding, documents, sliding window and the block grid.

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
        right_padding (Tensor | Sequence[int] | None): padding tokens behind each prompt of the batch, likewise; with
            those in front at most ``kv_len``. Default: None.
        documents (Tensor | Sequence | None): document id of each key token, shape [kv_len] or [B, kv_len],
            non-decreasing along the tokens. Tokens attend inside their own document only. Default: None.
        total_len (int | None): number of tokens of the whole prompt, where this is a chunk of it that others follow:
            it says which rows :meth:`tail_blocks` means. At least ``kv_len``. Default: ``kv_len``, nothing follows.
        window (int | None): sliding window: a token attends to itself and the ``window - 1`` tokens before it.
            Default: None, i.e. to all tokens before it.

    Attributes:
        state (KeyState | None): what is remembered about the keys of earlier chunks; see :meth:`with_state`.

    Raises:
        ValueError: if a length, the block size, the padding, the documents or the window are out of range, or if both
            padding and documents are given (padding is then a document of its own).

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
    right_padding: Tensor | Sequence[int] | None = None
    window: int | None = None
    state: KeyState | None = field(default=None, init=False, repr=False)
    _tables: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kv_len is None:
            object.__setattr__(self, "kv_len", self.q_len)
        for name in ("q_len", "kv_len", "block_size", "total_len", "window"):
            object.__setattr__(self, name, as_int(getattr(self, name)))
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
        if self.documents is not None and (self.left_padding is not None or self.right_padding is not None):
            raise ValueError("Give padding or documents, not both: make the padding a document of its own.")
        for name in ("left_padding", "right_padding"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._checked_padding(name))
        self._check_room()
        if self.documents is not None:
            object.__setattr__(self, "documents", self._checked_documents())
        if self.window is not None:
            check_tokens("window", self.window, least=1)
            if self.window >= self.kv_len:  # it hides nothing
                object.__setattr__(self, "window", None)

    def _checked_padding(self, name: str) -> Tensor | None:
        padding = torch.as_tensor(getattr(self, name))
        if padding.ndim != 1 or padding.is_floating_point() or padding.dtype == torch.bool:
            place = "in front of" if name == "left_padding" else "behind"
            raise ValueError(
                f"{name} must be whole numbers of shape [B], got shape {list(padding.shape)} and "
                f"dtype {padding.dtype}: give the number of padding tokens {place} each prompt."
            )
        if bool(((padding < 0) | (padding > self.kv_len)).any()):
            raise ValueError(f"{name} must lie in [0, kv_len={self.kv_len}], got {padding.tolist()}.")
        return padding.long() if bool(padding.any()) else None

    def _check_room(self) -> None:
        left, right = cast("Tensor | None", self.left_padding), cast("Tensor | None", self.right_padding)
        if left is None or right is None:
            return
        if len(left) != len(right) or bool((left + right > self.kv_len).any()):
            raise ValueError(
                f"left_padding and right_padding must be of one batch and together at most kv_len={self.kv_len}, got "
                f"{left.tolist()} and {right.tolist()}."
            )

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
        for rows in (self.left_padding, self.right_padding, self.documents):
            if rows is not None:
                return len(rows)
        return 1

    @property
    def is_causal(self) -> bool:
        """Whether plain causality is all there is: no padding, no documents and no window."""
        return self.is_single and self.window is None

    @property
    def is_single(self) -> bool:
        """Whether each row of the batch is one prompt from its first token to its last: no padding, no documents."""
        return self.left_padding is None and self.right_padding is None and self.documents is None

    def on_grid(self, block_size: int) -> Prompt:
        """The same tokens in blocks of another size. Kept with the prompt, so that layers share its tables."""
        if block_size == self.block_size:
            return self
        return self._cached(f"grid {block_size}", "cpu", lambda _: replace(self, block_size=block_size))

    def with_state(self, state: KeyState | None) -> Prompt:
        """The same prompt, and what is remembered about the keys of one layer. It shares this prompt's tables."""
        if state is self.state:
            return self
        other = copy.copy(self)
        object.__setattr__(other, "state", state)
        return other

    def split_sequences(self) -> list[SubPrompt]:
        """The prompts that rows of a padded batch and packed documents are, each by itself.

        Kept with the prompt, so that layers share their tables. What has no query here, a row of padding or a document
        of earlier chunks, has no piece.
        """
        return self._cached("pieces", "cpu", lambda _: self._split_sequences())

    def chunks(self, blocks: int) -> list[SubPrompt]:
        """This prompt, which :attr:`is_single`, as chunks of so many query blocks, each with the keys up to its end.

        The last one may have one block more, so that none is as short as a decode step.
        """

        def make(_: torch.device) -> list[SubPrompt]:
            starts = range(self.offset, max(self.kv_len - self.block_size, self.offset + 1), blocks * self.block_size)
            edges = [*starts, self.kv_len]
            every = slice(None)
            return [
                SubPrompt(every, slice(a - self.offset, b - self.offset), slice(0, b), self._piece(a, 0, b))
                for a, b in pairwise(edges)
            ]

        return self._cached(f"chunks {blocks}", "cpu", make)

    @property
    def shared(self) -> dict[Hashable, Any]:
        """What the layers of a model leave for each other while this prompt passes through them."""
        return self._cached("shared", "cpu", lambda _: {})

    # Tokens -----------------------------------------------------------------------------------------------

    def start(self, device: torch.device | str = "cpu") -> Tensor:
        """First real token of each prompt: int64 [B]."""
        return self._cached("start", device, self._start)

    def end(self, device: torch.device | str = "cpu") -> Tensor:
        """Token behind the last real one of each prompt: int64 [B]."""
        return self._cached("end", device, self._end)

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
        if self.window is not None:
            allowed = allowed & (rows[:, None] - keys < self.window)
        if self.right_padding is not None:  # causality hides the keys from all others
            allowed = allowed & (rows < self.end(rows.device)[:, None])[:, None, :, None]
        if self.left_padding is not None:
            allowed = allowed & (keys >= self.start(keys.device)[:, None])[:, None, None]
        if self.documents is not None:
            ids = self._ids(keys.device)
            allowed = allowed & (ids[:, rows, None] == ids[:, None, keys])[:, None]
        return allowed

    def num_common_keys(self, position: int) -> int:
        """How many of the first keys all queries from this position on are known to attend: masks may begin there."""
        return position if self.is_causal else 0

    def whole_blocks(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Which key blocks end at or before each query row, and lie in its document where there are several.

        Returns:
            tuple[Tensor, Tensor]: the first of them and the one behind the last, int32 [B, q_len] each; the first isn't
            below the other where there is none. Padding and what a window hides may be part of the first block.
        """
        return self._cached("whole_blocks", device, self._whole_blocks)

    def last_rows(self, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Positions of the last query rows, int64 [count], and which keys they may attend, bool [B, 1, count, l].

        The mask is of the last l keys; all rows attend to those before. Kept with the prompt, since every layer asks
        for the same.
        """

        def make(device: torch.device) -> tuple[Tensor, Tensor]:
            rows = self.query_positions(device)[-count:]
            keys = torch.arange(self.num_common_keys(self.kv_len - count), self.kv_len, device=device)
            return rows, self.may_attend(rows, keys)

        return self._cached(f"last_rows {count}", device, make)

    def spread_rows(self, count: int, each: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """``each`` query rows in each of ``count`` query blocks at equal distances, or of all blocks if they are fewer.

        Returns the blocks, int64 [m], the rows, int64 [m * each], and which keys these may attend, bool
        [B, 1, m * each, kv_len]. Kept with the prompt, since every layer asks for the same.
        """

        def make(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
            m, size = min(count, self.n_q), self.block_size
            blocks = torch.arange(1, m + 1, device=device) * self.n_q // (m + 1)
            within = torch.arange(1, 2 * each, 2, device=device) * size // (2 * each)
            rows = (blocks[:, None] * size + within).flatten().clamp(max=self.q_len - 1)
            return blocks, rows, self.may_attend(rows + self.offset, torch.arange(self.kv_len, device=device))

        return self._cached(f"spread_rows {count} {each}", device, make)

    def real_keys(self, device: torch.device | str = "cpu") -> Tensor:
        """Slots of the key grid with a real token, neither padding nor behind the end: bool [B, n_k * block_size]."""
        return self._cached("real_keys", device, self._real_keys)

    def real_queries(self, device: torch.device | str = "cpu") -> Tensor:
        """Slots of the query grid with a real token: bool [B, n_q * block_size]."""
        return self._cached("real_queries", device, self._real_queries)

    # Blocks -----------------------------------------------------------------------------------------------

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs with at least one allowed token pair: bool [B, 1, n_q, n_k]."""
        return self._cached("visible", device, self._visible)

    def visible_rows(self, rows: slice, device: torch.device | str = "cpu") -> Tensor:
        """:meth:`visible` of some query blocks alone, where the table of all would be too large: not kept."""
        return self._visible(torch.device(device), rows)

    def fully_visible(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs in which every token pair is allowed and the key block isn't ragged: bool [B, 1, n_q, n_k]."""
        return self._cached("fully_visible", device, self._fully_visible)

    def diagonal(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs that hold a token's own position, the least that any row must keep: bool [B, 1, n_q, n_k]."""
        return self._cached("diagonal", device, self._diagonal)

    def local_blocks(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs with a token pair less than ``tokens`` apart, causality aside: bool [1, 1, n_q, n_k]."""
        q_lo, _, _, k_hi = self._edges(device)
        return (q_lo[:, None] - k_hi < tokens)[None, None]

    def sink_blocks(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs whose keys hold one of the first ``tokens`` real tokens: bool [B, 1, n_q, n_k].

        First of the prompt, or, where there are documents, of each document.
        """
        return self._cached(f"first {tokens}", device, lambda device: self._first(tokens, device))

    def tail_blocks(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs whose queries hold one of the last ``tokens`` of the whole prompt: bool [1, 1, n_q, n_k]."""
        _, q_hi, _, _ = self._edges(device)
        whole = self.kv_len if self.total_len is None else self.total_len
        return (q_hi >= whole - tokens)[None, None, :, None].expand(-1, -1, -1, self.n_k)

    def guards(self, sink: int, local: int, last: int, device: torch.device | str = "cpu") -> Tensor:
        """What a strategy keeps in any case: :meth:`diagonal`, and what is visible of :meth:`first`, :meth:`near` and
        :meth:`tail_blocks` of these numbers of tokens, none for 0: bool [B, 1, n_q, n_k]. The same for every layer.
        """

        def make(device: torch.device) -> Tensor:
            kept = self.diagonal(device)
            for find, tokens in ((self.sink_blocks, sink), (self.local_blocks, local), (self.tail_blocks, last)):
                if tokens:
                    kept = kept | find(tokens, device)
            return kept & self.visible(device)

        return self._cached(f"guards {sink} {local} {last}", device, make)

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
        """What :meth:`mask_mod` captures: int32 offset [], first real token [B], and where rows begin at other tokens
        than that (documents, a window, padding behind), else None, the first token in each query row's sight,
        int32 [B, slots], which reach beyond the last row as whole tiles do.
        """
        rows = self.batch if batch is None else batch
        return self._cached(f"mask_tensors {rows}", device, lambda device: self._mask_tensors(device, rows))

    pieces = former_name("Prompt.pieces", split_sequences)
    near = former_name("Prompt.near", local_blocks)
    first = former_name("Prompt.first", sink_blocks)
    last = former_name("Prompt.last", tail_blocks)

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

    def _end(self, device: torch.device) -> Tensor:
        if self.right_padding is None:
            return torch.full((self.batch,), self.kv_len, dtype=torch.int64, device=device)
        return self.kv_len - cast(Tensor, self.right_padding).to(device)

    def _real_keys(self, device: torch.device) -> Tensor:
        slots = torch.arange(self.n_k * self.block_size, device=device)
        return (slots >= self.start(device)[:, None]) & (slots < self.end(device)[:, None])

    def _real_queries(self, device: torch.device) -> Tensor:
        slots = torch.arange(self.n_q * self.block_size, device=device)
        real = (slots + self.offset >= self.start(device)[:, None]) & (slots < self.q_len)
        return real & (slots + self.offset < self.end(device)[:, None])

    def _first(self, tokens: int, device: torch.device) -> Tensor:
        _, _, k_lo, k_hi = self._edges(device)
        if self.documents is None:
            start = self.start(device)[:, None]  # [B, 1]
            held = (k_lo < start + tokens) & (k_hi >= start) & (tokens > 0)
            return held[:, None, None].expand(-1, -1, self.n_q, -1)
        age = torch.arange(self.kv_len, device=device) - self._document_starts(device)
        young = self._any_in_block(age < tokens, self.n_k)
        return young[:, None, None].expand(-1, -1, self.n_q, -1)

    def _split_sequences(self) -> list[SubPrompt]:
        found = []
        for b in range(self.batch):
            rows = slice(b, b + 1) if self.batch > 1 else slice(None)
            if self.documents is None:
                spans = [(int(self.start()[b]), int(self.end()[b]))]
            else:
                lengths = self._ids("cpu")[b].unique_consecutive(return_counts=True)[1].tolist()
                ends = list(accumulate(lengths))
                spans = list(zip([0, *ends], ends, strict=False))
            for begin, end in spans:
                first = max(begin, self.offset)
                if first < end:
                    queries, keys = slice(first - self.offset, end - self.offset), slice(begin, end)
                    found.append(SubPrompt(rows, queries, keys, self._piece(first, begin, end)))
        return found

    def _piece(self, first: int, begin: int, end: int) -> Prompt:
        """The prompt of keys [begin, end), whose queries begin at ``first``."""
        total_len = None
        if self.is_single:  # what follows is the same prompt, whether given or not
            total_len = self.kv_len if self.total_len is None else self.total_len
        elif self.total_len is not None:  # a document that ends within the chunk is complete
            total_len = (self.total_len if end == self.kv_len else end) - begin
        return Prompt(end - first, end - begin, self.block_size, total_len=total_len, window=self.window)

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

    def _visible(self, device: torch.device, rows: slice = slice(None)) -> Tensor:
        q_lo, q_hi, k_lo, k_hi = self._edges(device)
        q_lo, q_hi = q_lo[rows], q_hi[rows]
        start, end = (bound[:, None, None] for bound in (self.start(device), self.end(device)))  # [B, 1, 1]
        first_key, last_key = torch.maximum(k_lo, start), torch.minimum(k_hi, end - 1)  # [B, 1, n_k]
        last_row = torch.minimum(q_hi[:, None], end - 1)  # [B, n_q, 1]
        visible = (first_key <= last_key) & (first_key <= last_row) & (q_lo[:, None] < end)
        if self.window is not None:  # the nearest pair
            visible = visible & (q_lo[:, None] - last_key < self.window)
        if self.documents is not None:
            # Ids don't decrease, so an earlier key block meets the query block's documents at its last token.
            q_doc, _, _, k_doc = self._document_edges(device)
            visible = visible & (k_doc >= q_doc[:, rows])
        return visible[:, None]

    def _fully_visible(self, device: torch.device) -> Tensor:
        q_lo, q_hi, k_lo, k_hi = self._edges(device)
        start, end = (bound[:, None, None] for bound in (self.start(device), self.end(device)))
        whole = k_lo + self.block_size <= self.kv_len
        full = whole & (k_hi <= q_lo[:, None]) & (k_lo >= start) & (q_hi[:, None] < end)
        if self.window is not None:  # the farthest pair
            full = full & (q_hi[:, None] - k_lo < self.window)
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
        offset = torch.full((), self.offset, dtype=torch.int32, device=device)  # torch.tensor would wait for a GPU
        start = self.start(device).int().expand(batch).contiguous()
        if self.documents is None and self.window is None and self.right_padding is None:
            return offset, start, None
        begin = self._begin(device)
        tile = max(self.block_size, 128)  # no kernel tile is larger
        slots = max(LEAST_SLOTS, 1 << (self.q_len + tile - 1).bit_length())
        begin = torch.nn.functional.pad(begin.int(), (0, slots - self.q_len)).expand(batch, -1).contiguous()
        # The kernel checks each look-up against the sizes of this table, and the CPU kernel of torch 2.13 can't spell
        # symbolic ones: they are constants, few of them as they are powers of two, and one for all up to 128K tokens.
        torch._dynamo.mark_static(begin)
        return offset, start, begin

    def _begin(self, device: torch.device) -> Tensor:
        """First key in sight of each query row, behind the row where there is none: int64 [B, q_len]."""
        rows = self.query_positions(device)
        if self.documents is None:
            begin = self.start(device)[:, None].expand(-1, self.q_len)
        else:
            begin = self._document_starts(device)[:, self.offset :]
        if self.window is not None:
            begin = begin.clamp(min=rows - self.window + 1)
        if self.right_padding is not None:
            begin = torch.where(rows < self.end(device)[:, None], begin, self.kv_len)
        return begin

    def _whole_blocks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, begin, size = self.query_positions(device), self._begin(device), self.block_size
        stop = torch.where(rows == self.kv_len - 1, self.n_k, (rows + 1) // size)
        first = (begin + size - 1) // size if self.documents is not None else begin // size
        first = torch.where(begin == self.kv_len, self.n_k, first)
        return first.int(), stop.expand(len(first), -1).int()


class SubPrompt(NamedTuple):
    """One prompt of a padded batch or of packed documents.

    Shapes: of q, k and v it is ``q[rows, :, queries]``, ``k[rows, :, keys]`` and ``v[rows, :, keys]``.
    """

    rows: slice
    queries: slice
    keys: slice
    prompt: Prompt


def mask_mod(offset: Tensor, start: Tensor, begin: Tensor | None) -> MaskMod:
    """The rule of a prompt over absolute positions; captures tensors only, so that new values don't recompile."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx + offset >= kv_idx) & (kv_idx >= start[b])

    row_begin = cast(Tensor, begin)

    def from_begin(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx + offset >= kv_idx) & (kv_idx >= row_begin[b, q_idx])

    return causal if begin is None else from_begin


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless ``block_size`` is a power of two, at least 16."""
    whole = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not whole or block_size < 16 or block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two, at least 16, got {block_size!r}: 128 is fast everywhere, 64 selects "
            "more finely."
        )
