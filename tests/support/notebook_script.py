"""Runs the code cells of a notebook one after the other, as a kernel does; prints how many, and how many ended in a value."""

import ast
import json
import sys
from pathlib import Path


def main() -> None:
    notebook = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": "__main__"}
    values = 0
    for number, source in enumerate(cells, 1):
        body = ast.parse(source, f"cell {number}").body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
            shown = getattr(value, "_repr_html_", value.__repr__)()
            assert shown, f"cell {number} shows nothing"
            values += 1
    print("RESULT", json.dumps({"cells": len(cells), "values": values}))


if __name__ == "__main__":
    main()
