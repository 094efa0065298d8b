"""What papers say of their methods, to stand beside what was measured. <q> marks their numbers as theirs."""

CLAIMS = {
    "minference": (
        "prefill <q>up to 10x</q> as fast at 1M tokens and <q>1.8x</q> at 100K on one A100; about even at 10K",
        "2407.02490",
    ),
    "flex_prefill": (
        "attention <q>6.0x</q> as fast as FlashInfer's at 128K, <q>1.0x</q> at 16K and <q>0.2x</q> at 8K, as the paper "
        "of XAttention measured it",
        "2503.16428",
    ),
    "xattention": (
        "attention <q>13.5x</q> as fast as FlashInfer's at 256K and <q>1.5x</q> at 8K (stride 16), there at a density "
        "of <q>0.44</q>",
        "2503.16428",
    ),
    "flash_prefill": (
        "attention <q>27.78x</q> as fast at 256K, and <q>1.71x</q> at 4K already",
        "2603.06199",
    ),
    "prism": ("<q>up to 5.1x</q> as fast as full attention, at its accuracy", "2602.08426"),
    "proxy_attn": (
        "attention <q>up to 10.3x</q> and prefill <q>2.4x</q> as fast without significant loss",
        "2509.24745",
    ),
    "delta": (
        "<q>36</q> points more on RULER at 131K around a window with sinks, <q>88 %</q> of full attention's",
        "2505.11254",
    ),
}
