"""Names of the rules that a setting chooses among and a computation follows."""

from typing import Literal

Fidelity = Literal["corrected", "original"]
ClarificationRule = Literal["cooldown", "last-token", "ever"]
BaseSource = Literal["preset", "request"]
AttentionVarentropy = Literal["heads", "heads-unbiased", "zero"]
