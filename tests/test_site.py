"""The documentation site is built without a warning, and its pages ask no other host for anything."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Attributes by which a page loads something on its own; links that a reader follows are none.
LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class Loaded(HTMLParser):
    """The addresses that a page loads something from."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADING.get(tag, ""))
        if address:
            self.addresses.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's pages, by path."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        # No proxy leads out: what would be fetched can't be.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return {page.relative_to(folder).as_posix(): page.read_text(encoding="utf-8") for page in folder.rglob("*.html")}


def test_every_page_is_there(site):
    pages = [ROOT / "README.md", *ROOT.glob("[CS]*.md"), *ROOT.glob("docs/*.md")]
    assert len(pages) > 10
    paths = {page.relative_to(ROOT).with_suffix("").as_posix() for page in pages}
    assert {"index.html" if path == "README" else f"{path}/index.html" for path in paths} - set(site) == set()


def test_a_page_loads_nothing_from_elsewhere(site):
    loaded = {address for page in site.values() for address in Loaded(page).addresses}
    assert any(address.endswith(".css") for address in loaded)
    assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == []


def test_lists_and_tables_are_no_running_text(site):
    # A code host takes a list that follows a line of text; the site's dialect wants an empty line between them.
    left = {path: re.findall(r"<p>[^<]*(?:<(?!/?p>)[^<]*)*?\n(?:- |\d+\. |\|).*", page) for path, page in site.items()}
    assert {path: lines for path, lines in left.items() if lines} == {}


def test_the_public_names_have_a_reference(site):
    for name in ("EntropixConfig", "TokenRecord", "traces", "client.trace_of", "sampling.EntropixSampler"):
        assert f'id="vllm_entropix.{name}"' in site["docs/api/index.html"], name
