"""The earlier path of names that are now in ``sparse_prefill.kernel.block_lists``."""

from sparse_prefill.kernel.block_lists import BlockTables, block_tables, to_block_mask

__all__ = ["BlockTables", "block_tables", "to_block_mask"]
