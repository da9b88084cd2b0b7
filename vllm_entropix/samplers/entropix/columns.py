"""Where each of entropix's numbers stands among a row's: its name, with "_" for ".", → its column.

One named tuple, which kernels take for a constant.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from vllm_entropix.samplers.entropix.settings import EntropixConfig

_NAMES = [name.replace(".", "_") for name, _ in EntropixConfig.preset().numbers()]
COLUMN: Any = namedtuple("Column", _NAMES)(*range(len(_NAMES)))
