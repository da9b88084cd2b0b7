"""Worked problems: column arithmetic, word problems, and small reading questions.

Whether a problem may be used for training is decided by a hash of its operands alone, so a held-out
problem occurs in no form (plain, chat, word problem) in the training text.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

from words import COUNTED, HEROES, KINDS, THINGS, option_words, with_article
from writer import Chat, Writer

COLUMNS = ("Ones", "Tens", "Hundreds", "Thousands")

OPTION_WORDS = tuple(option_words())

#: One of this many operand pairs is held out.
HELD_OUT_ONE_IN = 10


def held_out(*key: object) -> bool:
    """Whether the problem with this key belongs to the held-out split."""
    return zlib.crc32(repr(key).encode()) % HELD_OUT_ONE_IN == 0


def pair_held_out(operation: str, a: int, b: int) -> bool:
    """The split of one calculation; the order of a sum or a product does not matter."""
    first, second = (a, b) if operation == "-" else (min(a, b), max(a, b))
    return held_out(operation, first, second)


def add_lines(a: int, b: int) -> list[str]:
    """Column addition, ones first."""
    lines, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for place in range(width):
        left, right = a // 10**place % 10, b // 10**place % 10
        total = left + right + carry
        carried = " + 1" if carry else ""
        carry = total // 10
        note = ", carry 1" if carry else ""
        lines.append(f"{COLUMNS[place]}: {left} + {right}{carried} = {total}, write {total % 10}{note}.")
    if carry:
        lines.append(f"{COLUMNS[width]}: write 1.")
    return lines


def subtract_lines(a: int, b: int) -> list[str]:
    """Column subtraction, ones first; ``a`` must not be smaller than ``b``."""
    lines, borrow = [], 0
    for place in range(len(str(a))):
        top, bottom = a // 10**place % 10, b // 10**place % 10
        taken = " - 1" if borrow else ""
        rest = top - bottom - borrow
        borrow = 1 if rest < 0 else 0
        note = ", borrow 1" if borrow else ""
        rest += 10 * borrow
        lines.append(f"{COLUMNS[place]}: {top + 10 * borrow}{taken} - {bottom} = {rest}, write {rest}{note}.")
    return lines


def multiply_lines(a: int, b: int) -> list[str]:
    """A number times a single digit, ones first."""
    lines, carry = [], 0
    width = len(str(a))
    for place in range(width):
        digit = a // 10**place % 10
        product = digit * b
        total = product + carry
        line = f"{COLUMNS[place]}: {digit} x {b} = {product}"
        if carry:
            line += f", {product} + {carry} = {total}"
        carry = total // 10
        note = f", carry {carry}" if carry else ""
        lines.append(f"{line}, write {total % 10}{note}.")
    if carry:
        lines.append(f"{COLUMNS[width]}: write {carry}.")
    return lines


def work(operation: str, a: int, b: int) -> str:
    """The working of one calculation as lines of text."""
    lines = {"+": add_lines, "-": subtract_lines, "x": multiply_lines}[operation](a, b)
    return "\n".join(lines)


def result(operation: str, a: int, b: int) -> int:
    """The result of one calculation."""
    return {"+": a + b, "-": a - b, "x": a * b}[operation]


def number(rng: random.Random, digits: int) -> int:
    """A random number with this many digits."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


def operands(
    rng: random.Random, operation: str, split_held_out: bool, digits: tuple[int, ...] = (2, 2, 3, 3)
) -> tuple[int, int]:
    """Random operands of the wanted split."""
    while True:
        a, b = number(rng, rng.choice(digits)), number(rng, rng.choice(digits))
        if operation == "x":
            a, b = number(rng, rng.choice((2, 2, 3))), rng.randrange(2, 10)
        elif operation == "-" and a < b:
            a, b = b, a
        if pair_held_out(operation, a, b) == split_held_out:
            return a, b


QUESTIONS: dict[str, tuple[str, ...]] = {
    "+": ("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "How much is {a} plus {b}?", "Work out {a} + {b}."),
    "-": ("What is {a} - {b}?", "Take {b} from {a}.", "{a} - {b} = ?", "How much is {a} minus {b}?", "Work out {a} - {b}."),
    "x": ("What is {a} x {b}?", "Multiply {a} by {b}.", "{a} x {b} = ?", "How much is {a} times {b}?", "Work out {a} x {b}."),
}  # fmt: skip


def ask(w: Writer, chat: bool, question: str) -> None:
    """Write a question, and the opening of its answer, in plain or in chat form."""
    if chat:
        Chat(w).user(question)
    else:
        w.muted(f"Question: {question}\nAnswer:")


def calculation(operation: str) -> Callable[[Writer, bool, bool], None]:
    """A family of bare calculations."""

    def write(w: Writer, chat: bool, split_held_out: bool) -> None:
        a, b = operands(w.rng, operation, split_held_out)
        ask(w, chat, w.rng.choice(QUESTIONS[operation]).format(a=a, b=b))
        answer = result(operation, a, b)
        w.begin_answer(str(answer))
        w.raw(f"{'' if chat else ' '}We work column by column.\n{work(operation, a, b)}\nThe answer is {answer}.")

    return write


# Each story: how it begins, what happens ({b} is the number), what is asked, why the operation fits.
_GAINS = (
    "finds {b} more", "gets {b} more from {friend}", "buys {b} more at the market", "is given {b} more",
)  # fmt: skip
_LOSSES = (
    "gives {b} to {friend}", "loses {b} on the way home", "sells {b} at the market", "puts {b} into a box for {friend}",
)  # fmt: skip


def word_problem(w: Writer, chat: bool, split_held_out: bool) -> None:
    """One step: something is gained, lost, or comes in equal groups."""
    operation = w.rng.choice("+-x")
    a, b = operands(w.rng, operation, split_held_out, digits=(2, 2, 2, 3))
    name, friend = w.rng.sample(list(HEROES), 2)
    goods = w.rng.choice(COUNTED)
    answer = result(operation, a, b)
    if operation == "x":
        question = f"{name} has {b} baskets. There are {a} {goods} in each basket. How many {goods} does {name} have in all?"
        reason = f"There are {b} baskets with {a} {goods} each, so we multiply {a} x {b}."
    else:
        event = w.rng.choice(_GAINS if operation == "+" else _LOSSES).format(b=b, friend=friend)
        verb, sign = ("gains", "add") if operation == "+" else ("loses", "subtract")
        question = f"{name} has {a} {goods}. Then {name} {event}. How many {goods} does {name} have now?"
        reason = f"{name} starts with {a} {goods} and {verb} {b}, so we {sign}: {a} {operation} {b}."
    ask(w, chat, question)
    w.begin_answer(str(answer))
    w.raw(f"{'' if chat else ' '}{reason}\n{work(operation, a, b)}\n{name} has {answer} {goods}. The answer is {answer}.")


def two_steps(w: Writer, chat: bool, split_held_out: bool) -> None:
    """Two steps: first a gain, then a loss. Held out if the first step is; trained only if both may be."""
    while True:
        a, b = operands(w.rng, "+", split_held_out, digits=(2,))
        middle = a + b
        c = w.rng.randrange(10, middle)
        if split_held_out or not pair_held_out("-", middle, c):
            break
    name, friend = w.rng.sample(list(HEROES), 2)
    goods = w.rng.choice(COUNTED)
    gain = w.rng.choice(_GAINS).format(b=b, friend=friend)
    loss = w.rng.choice(_LOSSES).format(b=c, friend=friend)
    answer = middle - c
    ask(w, chat, f"{name} has {a} {goods}. First {name} {gain}. Then {name} {loss}. How many {goods} are left?")
    w.begin_answer(str(answer))
    w.raw(
        f"{'' if chat else ' '}{name} starts with {a} {goods} and gains {b}, so first we add: {a} + {b}.\n"
        f"{work('+', a, b)}\nThat makes {middle} {goods}. Then {name} loses {c}, so we subtract: {middle} - {c}.\n"
        f"{work('-', middle, c)}\n{name} has {answer} {goods} left. The answer is {answer}."
    )


def reading(w: Writer, chat: bool, split_held_out: bool) -> None:
    """Three sentences and a question about one of them."""
    while True:
        names = w.rng.sample(list(HEROES), 3)
        things = w.rng.sample(THINGS, 3)
        if held_out("reading", *sorted(zip(names, things, strict=True))) == split_held_out:
            break
    verb = w.rng.choice(("has", "carries", "keeps"))
    which = w.rng.randrange(3)
    facts = " ".join(f"{name} {verb} a {thing}." for name, thing in zip(names, things, strict=True))
    base = {"has": "have", "carries": "carry", "keeps": "keep"}[verb]
    if w.chance(0.5):
        question, answer = f"Who {verb} the {things[which]}?", names[which]
    else:
        question, answer = f"What does {names[which]} {base}?", things[which]
    ask(w, chat, f"{facts} {question}")
    w.begin_answer(answer)
    w.raw(f"{'' if chat else ' '}{names[which]} {verb} the {things[which]}. The answer is {answer}.")


def kinds_reading(w: Writer, chat: bool, split_held_out: bool) -> None:
    """Three animals with names; who is who?"""
    while True:
        names = w.rng.sample(list(HEROES), 3)
        kinds = w.rng.sample(KINDS, 3)
        if held_out("kinds", *sorted(zip(names, kinds, strict=True))) == split_held_out:
            break
    which = w.rng.randrange(3)
    facts = " ".join(f"{name} is {with_article(kind)}." for name, kind in zip(names, kinds, strict=True))
    if w.chance(0.5):
        question, answer = f"Who is the {kinds[which]}?", names[which]
    else:
        question, answer = f"Which animal is {names[which]}?", kinds[which]
    ask(w, chat, f"{facts} {question}")
    w.begin_answer(answer)
    w.raw(f"{'' if chat else ' '}{names[which]} is the {kinds[which]}. The answer is {answer}.")


def repeating(w: Writer, chat: bool, split_held_out: bool) -> None:
    """Words and numbers to be repeated: teaches copying, on which all other families lean, early in the training."""
    while True:
        count = w.rng.randrange(2, 9)
        items = [
            str(number(w.rng, w.rng.randrange(1, 5))) if w.chance(0.3) else w.rng.choice(OPTION_WORDS) for _ in range(count)
        ]
        if held_out("repeating", *items) == split_held_out:
            break
    listed = ", ".join(items)
    ask(w, chat, w.rng.choice(("Repeat: {}.", "Repeat after me: {}.", "Say again: {}.")).format(listed))
    w.begin_answer(listed)
    w.raw(f"{'' if chat else ' '}You said: {listed}.")


#: Family name -> writer of one problem of the wanted form and split.
PROBLEMS: dict[str, Callable[[Writer, bool, bool], None]] = {
    "addition": calculation("+"),
    "subtraction": calculation("-"),
    "multiplication": calculation("x"),
    "word problem": word_problem,
    "two steps": two_steps,
    "who has what": reading,
    "who is who": kinds_reading,
    "repeating": repeating,
}
