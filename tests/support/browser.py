"""A real browser without a window, for pages that the software writes."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A running Chromium, playwright's Browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is none of {', '.join(BROWSERS)} here")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page: Any, condition: str, seconds: float = 10) -> None:
    """Wait for a JavaScript expression to be true. playwright's own wait needs ``eval``, which a report's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"not true after {seconds} s: {condition}"
        page.wait_for_timeout(20)


@contextmanager
def opened(browser: Any, path: Path, *, width: int = 1400, height: int = 1000, scheme: str = "light") -> Iterator[Any]:
    """A report in a tab of its own, drawn to the end; fails if the page has an error, asks for anything, or opens a dialog."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("console", lambda message: problems.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda asked: problems.append(f"request: {asked.url}") if asked.url != path.as_uri() else None)
    try:
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        yield page
        page.wait_for_timeout(50)
        assert problems == []
    finally:
        page.close()
