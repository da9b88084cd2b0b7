"""What HTML files that open without a network are made of: templates, charts, and data that can't become a script."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

# Browsers compile a function when it is first called, and the charts call most of theirs at once. Chromium takes this comment
# as advice to compile all of them together, which takes less time; to others it is a comment.
COMPILE_ALL = "//# allFunctionsCalledOnLoad\n"


def template(name: str) -> str:
    """A file of the folder of templates."""
    return (files("vllm_entropix.observability") / "templates" / name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """plotly.js's smallest bundle: the one that Python's plotly brings takes a browser a second longer to start."""
    return COMPILE_ALL + template("plotly/plotly-basic.min.js")


def json_for_script(data: Any) -> str:
    """JSON that can stand in a ``script`` element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_hash(script: str) -> str:
    """A script's entry in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
