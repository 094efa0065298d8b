"""``python -m sparse_prefill.cli``."""

import sys

from sparse_prefill.cli import main

sys.exit(main())
