"""Python imports this when it starts (tests/support/collector.py)."""

import gc

gc.set_threshold(50_000)
