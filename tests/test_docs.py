"""What a page of the documentation links to and names is there: files, folders, tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_entropix"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")})
PAGES = [page for page in PAGES if not page.relative_to(ROOT).parts[0].startswith(".")]
FOLDERS = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
# A path is one that begins with a folder of the repository, a file of a folder, or a folder with its slash. Names without
# a folder are a reader's own files.
PATH = re.compile(
    rf"`((?:{FOLDERS})/[\w.*/-]+|[\w-]+(?:/[\w.*-]+)*/(?:[\w*-]+\.(?:py|toml|md|sh|lock|json|ya?ml))?)(?:::(\w+))?`"
)


def named(text: str) -> list[tuple[str, str]]:
    """(path, test in it or "") of everything in a text that looks like a file or a folder of the repository."""
    return PATH.findall(text)


def found(path: str, page: Path) -> set[Path]:
    """What a path means: from the root, from the package, or from the page; NAME stands for any name."""
    pattern = path.replace("NAME", "*").rstrip("/")
    return {match for folder in (ROOT, PACKAGE, page.parent) for match in folder.glob(pattern)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    missing = []
    for path, test in named(page.read_text(encoding="utf-8")):
        files = found(path, page)
        if not files or (test and not any(f"def {test}(" in file.read_text(encoding="utf-8") for file in files)):
            missing.append((path, test))
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_copy_of_a_file_is_that_file(page):
    text = page.read_text(encoding="utf-8")
    for path, copy in re.findall(r"<!-- copy of (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        assert copy == (ROOT / path).read_text(encoding="utf-8")


def test_paths_are_found_in_a_text():
    text = "`tests/engine`, `rows/batch.py`, `samplers/`, `tests/test_docs.py::test_x`, `kernels/*/decide.py`"
    assert [path for path, _ in named(text)] == [
        "tests/engine",
        "rows/batch.py",
        "samplers/",
        "tests/test_docs.py",
        "kernels/*/decide.py",
    ]
    assert named("`my-model.toml`, `/metrics`, `/v1/completions`, `/var/log/traces.jsonl`, `torch.float32`, `and/or`") == []
    assert found("tests/test_docs.py", PAGES[0]) == {Path(__file__).resolve()}
    assert found("nowhere/test_docs.py", PAGES[0]) == set()
