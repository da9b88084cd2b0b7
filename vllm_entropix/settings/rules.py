"""Names of the rules that a setting chooses among and a computation follows."""

from typing import Literal

Fidelity = Literal["corrected", "original"]
ClarificationRule = Literal["cooldown", "last-token", "ever"]
# Where a clarification may begin.
Place = Literal["anywhere", "lines", "sentences"]
BaseSource = Literal["preset", "request"]
AttentionVarentropy = Literal["heads", "heads-unbiased", "zero"]
