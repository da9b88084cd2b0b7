"""Tasks whose answer is a number: chains of arithmetic and word problems, made, and GSM8K and SVAMP, read from files."""

from __future__ import annotations

import json
import operator
import random
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from vllm_entropix.bench.extract import number, same_number
from vllm_entropix.bench.tasks.base import Graded, Item, OptionsT, Task, chosen, generated
from vllm_entropix.settings.errors import ConfigError, cut, quoted
from vllm_entropix.settings.section import Section

_RULE = (
    'The number behind "####", in \\boxed{}, or behind the last "answer", and otherwise the last number of the text; '
    "right if it equals the expected one."
)


class _Numbers(Task[OptionsT]):
    rule: ClassVar[str] = _RULE

    def grade(self, item: Item, text: str) -> Graded:
        """Compare numbers."""
        found = number(text)
        # Written in one way only: a majority counts equal answers.
        shown = None if found is None else f"{found.normalize():f}"
        return Graded(shown, same_number(found, item.expected))


# --- arithmetic chains ------------------------------------------------------------------------------------------------

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class ArithmeticOptions(Section):
    """How hard the chains are."""

    terms: tuple[Annotated[int, Field(ge=2, le=10)], Annotated[int, Field(ge=2, le=10)]] = (2, 4)
    largest: int = Field(50, ge=2, le=10_000, description="Greatest term of a sum; factors are at most 12.")
    operations: str = Field("+-*", pattern=r"^[-+*]+$", description="Those that are used.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.terms[0] > self.terms[1]:
            raise ValueError("terms should be the smallest and the largest number of terms, in this order")
        return self


class Arithmetic(_Numbers[ArithmeticOptions]):
    """Sums, differences and products of whole numbers, evaluated by the usual precedence."""

    kind = "arithmetic"
    Options = ArithmeticOptions
    max_tokens = 128

    def items(self, count: int, seed: str) -> list[Item]:
        """Random chains."""
        return generated(self.kind, self._make, count, seed)

    def _make(self, rng: random.Random) -> tuple[str, str]:
        low, high = self.options.terms
        sums: list[list[int]] = [[rng.randint(2, self.options.largest)]]
        signs: list[str] = []
        for _ in range(rng.randint(low, high) - 1):
            sign = rng.choice(self.options.operations)
            if sign == "*":
                sums[-1] = [*(min(factor, rng.randint(2, 12)) for factor in sums[-1]), rng.randint(2, 12)]
            else:
                signs.append(sign)
                sums.append([rng.randint(2, self.options.largest)])
        terms = [" * ".join(map(str, factors)) for factors in sums]
        value = 0
        for sign, factors in zip(["+", *signs], sums, strict=True):
            product = 1
            for factor in factors:
                product *= factor
            value = _OPERATIONS[sign](value, product)
        text = " ".join(part for pair in zip(["", *signs], terms, strict=True) for part in pair).strip()
        return f'What is {text}? Work it out, and end with the line "Answer:" and the number.', str(value)


# --- word problems ----------------------------------------------------------------------------------------------------

_NAMES = ("Ana", "Ben", "Chen", "Dana", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Jo", "Kofi", "Lena", "Mara", "Nils", "Olga")
_THINGS = ("apples", "books", "stamps", "coins", "marbles", "pencils", "cards", "shells", "buttons", "stickers")
# Text and rule, over numbers a to d with a > b.
_PROBLEMS: tuple[tuple[str, str], ...] = (
    ("{name} has {a} {things} and gives {b} of them to {other}. How many {things} does {name} have left?", "a - b"),
    ("{name} has {a} {things}. {other} has {b} more. How many {things} do they have together?", "2 * a + b"),
    ("{name} buys {c} boxes of {d} {things} each and loses {c} {things}. How many are left?", "c * d - c"),
    ("A shop has {a} {things} in the morning, sells {b} and gets {c} new ones. How many does it have now?", "a - b + c"),
    ("{name} puts {a} {things} into each of {c} bags and has {d} left over. How many {things} were there?", "a * c + d"),
    ("{name} earns {c} coins a day for {d} days and spends {b}. How many coins are left, if there were {a} before?",
     "a + c * d - b"),
    ("{name} is {a} years old. {other} is {b} years younger. How old is {other}?", "a - b"),
    ("{name} and {other} share {c} bags of {d} {things} and {c} bags of {a} {things}. How many {things} are there in all?",
     "c * d + c * a"),
    ("A train has {c} wagons with {d} seats each. {b} seats are taken. How many are free, if {a} seats are added?",
     "c * d - b + a"),
    ("{name} reads {c} pages a day. How many pages are read after {d} weeks?", "7 * c * d"),
)  # fmt: skip


class WordProblems(_Numbers[Section]):
    """Short word problems of one to three steps, with random names and numbers."""

    kind = "word_problems"

    def items(self, count: int, seed: str) -> list[Item]:
        """Random problems."""
        return generated(self.kind, self._make, count, seed)

    def _make(self, rng: random.Random) -> tuple[str, str]:
        text, rule = rng.choice(_PROBLEMS)
        name, other = rng.sample(_NAMES, 2)
        b = rng.randint(2, 20)
        numbers = {"a": b + rng.randint(1, 60), "b": b, "c": rng.randint(3, 9), "d": rng.randint(3, 12)}
        value = _evaluate(rule, numbers)
        if value < 0:
            return self._make(rng)
        told = text.format(name=name, other=other, things=rng.choice(_THINGS), **numbers)
        return f'{told} Think step by step, and end with the line "Answer:" and the number.', str(value)


def _evaluate(rule: str, numbers: dict[str, int]) -> int:
    """A rule of _PROBLEMS: sums and differences of products."""
    total, sign = 0, 1
    for part in rule.replace("- ", "+ -").split("+"):
        product, sign = 1, -1 if part.strip().startswith("-") else 1
        for factor in part.replace("-", "").split("*"):
            factor = factor.strip()
            product *= numbers[factor] if factor in numbers else int(factor)
        total += sign * product
    return total


# --- files ------------------------------------------------------------------------------------------------------------


class FileOptions(Section):
    """Where the items are."""

    path: Path = Field(description="The file, as it is published.")


def _read(kind: str, path: Path, published: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the task {kind} can't read {cut(str(path))}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"the task {kind} can't read {cut(str(path))} ({error.strerror}); get the file {published}") from None


class Gsm8k(_Numbers[FileOptions]):
    """Word problems of GSM8K (Cobbe et al., arXiv 2110.14168)."""

    kind = "gsm8k"
    Options = FileOptions
    max_tokens = 320
    published = "test.jsonl of https://github.com/openai/grade-school-math"

    def items(self, count: int, seed: str) -> list[Item]:
        """Problems of the file in random order; an item's id is its line, from 0."""
        text = _read(self.kind, self.options.path, self.published)
        try:
            lines = [json.loads(line) for line in text.splitlines() if line]
            found = [_item(n, line["question"], str(line["answer"]).rpartition("####")[2]) for n, line in enumerate(lines)]
        except (ValueError, KeyError, TypeError) as error:
            raise _other_file(self.kind, self.options.path, self.published, error) from None
        return chosen(self.kind, found, count, seed)


class Svamp(_Numbers[FileOptions]):
    """Word problems of SVAMP (Patel et al., arXiv 2103.07191)."""

    kind = "svamp"
    Options = FileOptions
    max_tokens = 256
    published = "SVAMP.json of https://github.com/arkilpatel/SVAMP"

    def items(self, count: int, seed: str) -> list[Item]:
        """Problems of the file in random order; an item's id is its place in the file, from 0."""
        text = _read(self.kind, self.options.path, self.published)
        try:
            entries = json.loads(text)
            found = [
                _item(n, f"{str(one['Body']).strip().removesuffix('.')}. {one['Question']}", str(one["Answer"]))
                for n, one in enumerate(entries)
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise _other_file(self.kind, self.options.path, self.published, error) from None
        return chosen(self.kind, found, count, seed)


def _item(place: int, question: str, answer: str) -> Item:
    value = number(answer)
    if value is None:
        raise ValueError(f"item {place} has the answer {quoted(answer)}, which is no number")
    asked = f'{question.strip()} Think step by step, and end with the line "Answer:" and the number.'
    return Item(f"{place:04}", asked, f"{value.normalize():f}")


def _other_file(kind: str, path: Path, published: str, error: Any) -> ConfigError:
    return ConfigError(f"the task {kind} can't use {cut(str(path))} ({cut(str(error))}); it should be {published}")
