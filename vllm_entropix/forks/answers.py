"""Where the answer stands in a text: named rules, by which branches are compared by what they answer.

A rule is a function: text → (begin, end) of the answer in it, or None. It runs on whatever a model writes, so each takes time
that is linear in the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from vllm_entropix.settings.errors import ConfigError, quoted

Rule = Callable[[str], tuple[int, int] | None]

# A sign belongs to a number unless it stands behind something that it subtracts from. Thousands have three digits each.
_NUMBER = re.compile(r"(?<![\w.,)\]])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\d+(?:\.\d+)?")
_BOXED = "\\boxed{"
_AFTER = "after:"
# Longer numbers are compared as texts.
_DIGITS = 40
# What stands around an answer and is none of it.
_AROUND = " .,;:!?\"'`*$"


def last_number(text: str) -> tuple[int, int] | None:
    """The last number of the text."""
    span = None
    for match in _NUMBER.finditer(text):
        span = match.span()
    return span


def boxed(text: str) -> tuple[int, int] | None:
    r"""What stands in the last ``\boxed{...}``, braces within it included."""
    begin = text.rfind(_BOXED)
    if begin < 0:
        return None
    begin += len(_BOXED)
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return _trimmed(text, begin, place)
    return None


def last_line(text: str) -> tuple[int, int] | None:
    """The last line that isn't empty."""
    end = len(text.rstrip())
    return _trimmed(text, text.rfind("\n", 0, end) + 1, end)


def after(mark: str) -> Rule:
    """What follows the last occurrence of a text, to the end of its line."""

    def rule(text: str) -> tuple[int, int] | None:
        begin = text.rfind(mark)
        if begin < 0:
            return None
        begin += len(mark)
        end = text.find("\n", begin)
        return _trimmed(text, begin, len(text) if end < 0 else end)

    return rule


def _trimmed(text: str, begin: int, end: int) -> tuple[int, int] | None:
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return (begin, end) if begin < end else None


RULES: dict[str, Rule] = {"last-number": last_number, "boxed": boxed, "last-line": last_line}


def register(name: str, extract: Callable[[str], str | None]) -> None:
    """Let requests of this process name a function of one's own as ``entropix_fork_answer``.

    Args:
        name: of the rule; none that ships.
        extract: text of a branch → its answer, a part of the text; None: there is none.

    Raises:
        ConfigError: the name is taken.
    """
    if name in (*_SHIPPED, "") or name.startswith(_AFTER):
        raise ConfigError(f"{quoted(name)} is the name of a rule that ships; give yours another")

    def rule(text: str) -> tuple[int, int] | None:
        answer = extract(text)
        begin = -1 if answer is None else text.rfind(answer)
        return None if begin < 0 or not answer else (begin, begin + len(answer))

    RULES[name] = rule


_SHIPPED = tuple(RULES)


def rule_of(name: str) -> Rule:
    """The rule of a name.

    Raises:
        ConfigError: there is none.
    """
    mark = name.removeprefix(_AFTER)
    if mark != name and mark:
        return after(mark)
    if name not in RULES:
        raise ConfigError(f"there is no rule {quoted(name)} for answers; there are {', '.join(RULES)}, and after:TEXT")
    return RULES[name]


def normalised(answer: str) -> str:
    """An answer as it is compared: without what stands around it, in small letters; numbers by their value."""
    plain = " ".join(answer.split()).strip(_AROUND).casefold()
    if len(plain) <= _DIGITS and _NUMBER.fullmatch(plain):
        return str(Decimal(plain.replace(",", "")).normalize())
    return plain
