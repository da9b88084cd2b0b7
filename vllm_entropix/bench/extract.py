"""Answers out of texts: one rule per kind of answer, written down here and nowhere else.

The rules run on whatever a model writes, so each is linear in the text's length.
"""

from __future__ import annotations

import ast
import re
import textwrap
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

# A sign belongs to a number unless it stands behind something that it subtracts from. Thousands have three digits each.
_NUMBER = re.compile(r"(?<![\w.,)\]])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\d+(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER = re.compile(r"\banswer\b", re.IGNORECASE)
_TOLD = re.compile(r"[^:\n]*?(?::|\bis\b)")
_SUM = re.compile(r"[^\d=]*[\d\s.,+\-*/\u00d7\u00f7x()]*=")
_FENCE = re.compile(r"^[ \t]*```[^\n]*$", re.MULTILINE)
# Longer numbers are no answer, and comparing them would take time.
_DIGITS = 40
_CODE_LINES = 200


def number(text: str) -> Decimal | None:
    """The number that a text gives as its answer.

    The first of these that there is: the first number behind the last ``####``; the first in the last ``\\boxed{...}``; the
    first behind the last word "answer", on its line and behind the "is" or ":" that follows it; the last number of the text.
    Where that number begins a sum that is worked out ("answer: 3 + 4 = 7"), it is the sum's result.
    Signs of currency, per cent and markup around it don't matter, nor do commas between thousands.
    """
    text = _plain(text)
    _, mark, behind = text.rpartition("####")
    if mark and (found := _numbers(behind)):
        return found[0]
    boxed = list(_BOXED.finditer(text))
    if boxed and (found := _numbers(text[boxed[-1].end() :].partition("}")[0])):
        return found[0]
    named = list(_ANSWER.finditer(text))
    if named:
        line = text[named[-1].end() :].partition("\n")[0]
        if told := _TOLD.match(line):
            line = line[told.end() :]
        while worked_out := _SUM.match(line):
            line = line[worked_out.end() :]
        if found := _numbers(line):
            return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def _plain(text: str) -> str:
    """Without what typesetting puts into numbers."""
    return text.replace("\u2212", "-").replace("{,}", ",").replace("\\,", "").replace("\\$", "$").replace("$", " ")


def _numbers(text: str) -> list[Decimal]:
    found = (match[0].replace(",", "") for match in _NUMBER.finditer(text))
    return [Decimal(digits) for digits in found if len(digits) <= _DIGITS]


def same_number(found: Decimal | None, expected: str) -> bool:
    """Whether it is the expected number; 12.0 is 12."""
    return found is not None and found == Decimal(expected)


def named(text: str, names: Mapping[str, str]) -> str | None:
    """The thing that a text names first, behind its last word "answer" if there is any there, and elsewhere otherwise.

    A name right behind "not" or "isn't" doesn't count. Case and accents don't matter; names are whole words.

    Args:
        text: of the model.
        names: every spelling, in small letters and without accents → the thing.
    """
    folded = fold(text)
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:(not|isn't)\s+(?:an?\s+|the\s+)?)?({alternatives})(?!\w)")
    parts = [folded]
    marks = list(_ANSWER.finditer(folded))
    if marks:
        parts.insert(0, folded[marks[-1].end() :])
    for part in parts:
        for match in pattern.finditer(part):
            if match[1] is None:
                return names[match[2]]
    return None


def fold(text: str) -> str:
    """Small letters without accents."""
    decomposed = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    return "".join(sign for sign in decomposed if not unicodedata.combining(sign)).casefold()


def code(text: str, function: str) -> str | None:
    """The Python source that defines a function.

    The first fenced block that has ``def function``; a block that isn't closed ends with the text. Without such a block:
    from the first line that defines or imports something, as many lines as are valid Python. Calls at its outermost level are
    left out: examples of use, which may raise what they are to show.
    """
    define = re.compile(rf"^[ \t]*def[ \t]+{re.escape(function)}[ \t]*\(", re.MULTILINE)
    fences = list(_FENCE.finditer(text))
    for opening, closing in zip(fences[::2], [*fences[1::2], None], strict=False):
        block = text[opening.end() : len(text) if closing is None else closing.start()]
        if define.search(block):
            block = textwrap.dedent(block).strip("\n")
            valid = _valid_start(block)
            return block if valid is None or not define.search(valid) else _definitions(valid)
    lines = text.splitlines()
    begin = next((n for n, line in enumerate(lines) if line.startswith(("def ", "import ", "from "))), None)
    if begin is None:
        return None
    found = _valid_start("\n".join(lines[begin:]))
    return _definitions(found) if found is not None and define.search(found) else None


def _definitions(source: str) -> str:
    """What a source defines, imports and assigns at its outermost level."""
    kept = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    tree = ast.parse(source)
    try:
        return ast.unparse(ast.Module([node for node in tree.body if isinstance(node, kept)], []))
    except RecursionError:
        return source


def _valid_start(source: str) -> str | None:
    """The most lines from the first on that are valid Python; None if not even some are."""
    lines = source.splitlines()[:_CODE_LINES]
    while lines:
        try:
            ast.parse("\n".join(lines))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # What stands from the wrong line on isn't part of it, and at least the last line goes.
            wrong = error.lineno if isinstance(error, SyntaxError) and error.lineno else len(lines)
            lines = lines[: min(wrong - 1, len(lines) - 1)]
        else:
            return "\n".join(lines)
    return None


def last_line(text: str) -> str | None:
    """What stands in the last ``<answer>`` tag, or behind the last "answer:" or "answer is" on its line, or the last line.

    Markup around it and a full stop at its end are left out.
    """
    _, tag, behind = text.rpartition("<answer>")
    if tag:
        return _bare(behind.partition("</answer>")[0]) or None
    marks = list(re.finditer(r"\banswer\b[*_ \t]*(?::|is\b)", text, re.IGNORECASE))
    if marks and (found := _bare(text[marks[-1].end() :].partition("\n")[0])):
        return found
    return next((found for line in reversed(text.splitlines()) if (found := _bare(line))), None)


def _bare(text: str) -> str:
    return text.strip().strip("*_`$ \t:").removesuffix(".").strip("*_`$ \t")
