"""Photograph a report for the documentation: report-light.png and report-dark.png.

    vllm-entropix demo --report /tmp/report.html && python scripts/report_pictures.py /tmp/report.html docs/images

Needs playwright and a Chromium in the path.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


def photograph(page: Page, report: Path, picture: Path, sequence: str, token: str) -> None:
    """The report with the sequence of this id chosen and the details of its first token of this text shown."""
    page.goto(report.resolve().as_uri())
    page.wait_for_selector("html[data-ready]")
    page.locator("#filter").fill(sequence)
    page.locator("#sequences [role=option]").first.click()
    page.locator(".pane .id", has_text=sequence).wait_for()
    page.locator("#filter").fill("")
    page.locator("#filter").blur()
    page.wait_for_selector(".along .main-svg")
    page.locator(".text bdi", has_text=token).first.hover()
    page.wait_for_timeout(500)
    page.screenshot(path=picture)


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequence", default="mist")
    parser.add_argument("--token", default="Fernmere")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1360, "height": 1020}, color_scheme=scheme)
            photograph(page, arguments.report, arguments.folder / f"report-{scheme}.png", arguments.sequence, arguments.token)
        browser.close()


if __name__ == "__main__":
    main()
