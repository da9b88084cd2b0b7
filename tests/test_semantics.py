"""docs/semantics.md has what the code, README and the tests cite of it: sections by number, defects of the original by id."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
SECTIONS = set(re.findall(r"^## (\d+)\. ", PAGE, flags=re.MULTILINE))
DEFECTS = set(re.findall(r"^\| (D\d+) \|", PAGE, flags=re.MULTILINE))


def citations(text: str) -> Iterator[tuple[str, str]]:
    """(kind, what is cited) in a text: SEMANTICS 3 and 4, D5."""
    for cited in re.findall(r"SEMANTICS (\d+(?:(?:, | and )\d+)*)", text):
        for section in re.findall(r"\d+", cited):
            yield "section", section
    for defect in re.findall(r"\bD[1-9]\d?\b", text):
        yield "defect", defect


# Where somebody may cite the page. Notebooks have base64 in their outputs, and the report's plotting library is not ours.
SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".js", ".css", ".j2", ".json"}
FOLDERS = ("benchmarks", "deploy", "docs", "examples", "patches", "scripts", "tests", "tools", "vllm_entropix")


def citing() -> list[Path]:
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES}
    left_out = {path for path in files if "plotly" in path.parts or "data" in path.parts}
    return sorted({*files, *ROOT.glob("*.md"), ROOT / "pyproject.toml"} - left_out - {Path(__file__).resolve()})


def test_what_is_cited_is_there() -> None:
    known = {*(("section", number) for number in SECTIONS), *(("defect", defect) for defect in DEFECTS)}
    cited = {(str(path.relative_to(ROOT)), what) for path in citing() for what in citations(path.read_text(encoding="utf-8"))}
    assert {what for _, what in cited} & known, "nothing cites the page: is it read at all?"
    assert [entry for entry in sorted(cited) if entry[1] not in known] == []


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("(SEMANTICS 3 and 4)", [("section", "3"), ("section", "4")]),
        ("SEMANTICS 1, 2 and 9.", [("section", "1"), ("section", "2"), ("section", "9")]),
        ("has no cap (D14), nor D25", [("defect", "D14"), ("defect", "D25")]),
        ("ID5, D1x, DRY", []),
    ],
)
def test_citations_are_found(text: str, cited: list[tuple[str, str]]) -> None:
    assert list(citations(text)) == cited
