"""Releases of vLLM that this package works with: what else names them is held to this file by tests/test_versions.py.

Plain values, which scripts/set_up.py reads before anything is installed.
"""

# 0.31, 0.32 and 0.33, without a gap.
MINORS = (31, 32, 33)
SUPPORTED = f">=0.{MINORS[0]},<0.{MINORS[-1] + 1}"
# The release that set-up installs, so that the tests run on it; images and the chart are made for it, and the source patches.
TESTED = "0.32.0"
# The torch that it is built for.
TORCH = "2.13.0"
