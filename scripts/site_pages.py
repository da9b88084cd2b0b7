"""Hook of mkdocs.yml: which files of the repository the site has, each at its place in the repository.

MkDocs takes pages from one folder. Ours stand beside what they describe, and link to each other by relative paths; with every
page at its own path these links hold as they are.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "*/README.md", "deploy/*/README.md", "tools/*/README.md", "vllm_entropix/*/README.md")
# Linked from pages: pictures, schemas, scripts to copy.
LINKED = (
    "docs/*.svg",
    "docs/*.json",
    "docs/images/*",
    "examples/*.py",
    "examples/*.sh",
    "examples/*.ipynb",
    "benchmarks/evidence/*.toml",
)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Replace what MkDocs found in its folder by the repository's pages and what they link to."""
    from mkdocs.structure.files import File

    for file in list(files.documentation_pages()) + list(files.media_files()):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in PAGES + LINKED for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
