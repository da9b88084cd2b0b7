"""Short Python functions, judged by running them on examples."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from vllm_entropix.bench.confined import run_python
from vllm_entropix.bench.extract import code
from vllm_entropix.bench.tasks.base import Graded, Item, Task, chosen
from vllm_entropix.settings.section import Section


@cache
def functions() -> list[dict[str, Any]]:
    """What is in functions.toml: each a signature, what it does, and conditions that must hold."""
    text = files("vllm_entropix.bench.tasks").joinpath("functions.toml").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = tomllib.loads(text)["functions"]
    return found


class Functions(Task[Section]):
    """Short Python functions, run on examples in a process of its own with limits."""

    kind = "python_functions"
    max_tokens = 320
    rule = (
        "The first fenced block that defines the function, or else what is valid Python from the first def or import on, "
        "without calls at its outermost level; right if all conditions hold in a process with limits on time and memory and "
        "no network."
    )

    def items(self, count: int, seed: str) -> list[Item]:
        """Functions in random order."""
        asked = [
            Item(
                one["signature"].partition("(")[0],
                f"Write a Python function `{one['signature']}` that {one['does']}. Give the code only, in one block.",
                one["conditions"],
            )
            for one in functions()
        ]
        return chosen(self.kind, asked, count, seed)

    def grade(self, item: Item, text: str) -> Graded:
        """Run it."""
        source = code(text, item.id)
        if source is None:
            return Graded(None, False)
        checks = "\n".join(f"assert {condition}" for condition in item.expected)
        ended = run_python(f"{source}\n\n{checks}\n")
        return Graded(source, ended.succeeded, ended.problem)
