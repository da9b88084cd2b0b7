"""The corpus of the demo model: which families of text it has, and in what proportion.

Run it to read a few documents::

    python tools/demo_model/corpus.py --family story --count 3
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from functools import partial

import ambiguous
import smalltalk
import stories
from problems import PROBLEMS
from rich.console import Console
from rich.rule import Rule
from writer import Decks, Doc, Writer

#: Writes the text of a document in plain (False) or chat (True) form.
Family = Callable[[Writer, bool], None]

#: Relative frequency of each family, counted in documents.
WEIGHTS: dict[str, float] = {
    "story": 30,
    "addition": 9,
    "subtraction": 9,
    "multiplication": 6,
    "word problem": 11,
    "two steps": 5,
    "who has what": 4,
    "who is who": 3,
    "repeating": 6,
    "sealed": 6,
    "memory": 9,
    "riddle": 5,
    "guessing game": 4,
    "small talk": 6,
    "conversation": 6,
}

#: Families which contain evenly lost places, and the share of their documents in which the clarification is
#: forced (see ``Writer.forced``).
EVEN_FAMILIES = ("story", "sealed", "memory", "riddle", "guessing game", "conversation")
FORCED_DOCUMENTS = 0.15

#: The training text and the held-out text come from different seeds; the worked problems of the two differ
#: in their operands as well.
TRAIN_SEED, HELD_OUT_SEED = 20240, 777


def _families(held_out: bool) -> dict[str, Family]:
    """All families, with the problems taken from the wanted split."""

    def problem(write: Callable[[Writer, bool, bool], None]) -> Family:
        return lambda w, chat: write(w, chat, held_out)

    families = {name: problem(write) for name, write in PROBLEMS.items()}
    families["story"] = stories.story
    families["sealed"] = ambiguous.sealed
    families["memory"] = ambiguous.memory
    families["riddle"] = ambiguous.riddle
    families["guessing game"] = lambda w, chat: ambiguous.guessing_game(w)
    families["small talk"] = lambda w, chat: smalltalk.talk(w)
    families["conversation"] = partial(_conversation, dict(families))
    return families


#: Families that exist in one form only.
ONLY_PLAIN, ONLY_CHAT = ("guessing game",), ("small talk", "conversation")


def _conversation(families: dict[str, Family], w: Writer, chat: bool) -> None:
    """Two to four exchanges of different families in one chat."""
    names = [name for name in families if name not in (*ONLY_PLAIN, "conversation")]
    for turn, name in enumerate(w.rng.sample(names, w.rng.choice((2, 2, 3, 4)))):
        if turn:
            w.raw("<|end|>")
        families[name](w, True)


class Corpus:
    """An endless, reproducible stream of documents."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self._rng = random.Random(seed)
        self._decks = Decks(self._rng)
        self._families = _families(held_out)

    def write(self, family: str, chat: bool | None = None, forced: bool = False) -> Doc:
        """One document of this family; the form is chosen if not given."""
        if chat is None:
            chat = self._rng.random() < 0.5
        chat = (chat or family in ONLY_CHAT) and family not in ONLY_PLAIN
        writer = Writer(self._rng, self._decks, forced)
        self._families[family](writer, chat)
        writer.raw("<|end|>" if chat else "<|eos|>")
        return writer.done(f"{family} (chat)" if chat else family)

    def mixed(self) -> Iterator[Doc]:
        """Documents of all families in the proportions of the corpus."""
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        while True:
            family = self._rng.choices(names, weights)[0]
            yield self.write(family, forced=family in EVEN_FAMILIES and self._rng.random() < FORCED_DOCUMENTS)


def main() -> None:
    """Print documents of one family, or of all."""
    parser = argparse.ArgumentParser(description="Print documents of the demo corpus.")
    parser.add_argument("--family", choices=list(WEIGHTS), help="only this family (default: the corpus mixture)")
    parser.add_argument("--count", type=int, default=5, help="number of documents (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the generator (default: %(default)s)")
    parser.add_argument("--forced", action="store_true", help="answer evenly lost places by the clarification")
    parser.add_argument("--held-out", action="store_true", help="draw problems of the held-out split")
    args = parser.parse_args()
    console = Console()
    corpus = Corpus(args.seed, args.held_out)
    stream = corpus.mixed()
    for _ in range(args.count):
        doc = corpus.write(args.family, forced=args.forced) if args.family else next(stream)
        console.print(Rule(doc.family))
        console.print(doc.text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
