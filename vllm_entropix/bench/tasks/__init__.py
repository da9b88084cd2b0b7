"""The kinds of tasks that a study may have."""

from __future__ import annotations

from typing import Any

from vllm_entropix.bench.tasks.base import Graded, Item, Task
from vllm_entropix.bench.tasks.facts import Animals, Capitals
from vllm_entropix.bench.tasks.functions import Functions
from vllm_entropix.bench.tasks.gym import Gym
from vllm_entropix.bench.tasks.numbers import Arithmetic, Gsm8k, Svamp, WordProblems
from vllm_entropix.bench.tasks.open_prompts import OpenPrompts

__all__ = ["KINDS", "Graded", "Item", "Task"]

KINDS: dict[str, type[Task[Any]]] = {
    task.kind: task for task in (Arithmetic, WordProblems, Gsm8k, Svamp, Capitals, Animals, Functions, Gym, OpenPrompts)
}
