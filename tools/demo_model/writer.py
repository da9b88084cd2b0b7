"""Writes one document of the corpus and remembers where its designed places are.

A document is text plus three kinds of notes, all in character offsets: *marks* (here a place of a known
kind begins), *mute* spans (tokens which give no training signal) and the *prompt* (where the answer to be
checked begins).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from words import CLARIFICATION, EVEN_SETS, MIST_WORDS, ODD_WORDS, RARE_WORDS

#: How often a place of a forced document is answered by the clarification. Not always, so that the model
#: also learns to go on when only some of several places were clarified.
FORCED_SHARE = 0.75

#: A habit keeps its usual word in four of five cases.
USUAL_SHARE = 0.8

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Mark:
    """A designed place: the token that starts at ``offset`` is drawn from the distribution ``kind``."""

    offset: int
    kind: str


@dataclass
class Doc:
    """One finished document."""

    family: str
    text: str
    marks: list[Mark] = field(default_factory=list)
    mute: list[tuple[int, int]] = field(default_factory=list)
    #: Length of the text up to the checkable answer; 0 when there is nothing to check.
    prompt: int = 0
    answer: str = ""


class Decks:
    """Draws without replacement, so that the frequencies of the options come out exactly even.

    Independent draws would leave the option frequencies of the corpus uneven by chance, and the model
    would learn that unevenness: it is what the varentropy of an evenly lost place measures.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._decks: dict[str, list[str]] = {}

    def draw(self, name: str, cards: Sequence[str]) -> str:
        """The next card of the deck ``name``; an empty deck is filled with ``cards`` and shuffled."""
        deck = self._decks.setdefault(name, [])
        if not deck:
            deck.extend(cards)
            self._rng.shuffle(deck)
        return deck.pop()


class Writer:
    """Collects the text of one document."""

    def __init__(self, rng: random.Random, decks: Decks, forced: bool = False) -> None:
        self.rng = rng
        self.decks = decks
        #: A forced document shows what follows a clarification. Its clarifications are mute where they
        #: begin, so that they teach the continuation without making the clarification likelier.
        self.forced = forced
        self.names: dict[str, str] = {}
        self._parts: list[str] = []
        self._length = 0
        self._marks: list[Mark] = []
        self._mute: list[tuple[int, int]] = []
        self._prompt = 0
        self._answer = ""

    @property
    def empty(self) -> bool:
        """True until something is written."""
        return self._length == 0

    def chance(self, share: float) -> bool:
        """True in ``share`` of all cases."""
        return self.rng.random() < share

    def raw(self, text: str) -> None:
        """Append ``text`` as it is."""
        self._parts.append(text)
        self._length += len(text)

    def say(self, template: str, names: Mapping[str, str] | None = None) -> None:
        """Append ``template`` with every ``[a|b]`` decided and every ``{name}`` filled in."""
        self.raw(self.fill(template, names))

    def fill(self, template: str, names: Mapping[str, str] | None = None) -> str:
        """Decide the choices of ``template`` from the inside out, then fill in the names."""
        while match := _CHOICE.search(template):
            picked = self.rng.choice(match.group(1).split("|"))
            template = template[: match.start()] + picked + template[match.end() :]
        return template.format_map({**self.names, **(names or {})})

    def muted(self, text: str) -> None:
        """Append text without a training signal (what a user says)."""
        self._mute.append((self._length, self._length + len(text)))
        self.raw(text)

    def begin_answer(self, answer: str) -> None:
        """Everything so far is the prompt of a problem whose answer is ``answer``."""
        self._prompt = self._length
        self._answer = answer

    def _mark(self, kind: str) -> None:
        self._marks.append(Mark(self._length, kind))

    def evenly(self, which: str) -> str | None:
        """Write one of 64 equally likely words, or the clarification (then the result is None)."""
        self._mark("evenly_lost")
        if self.forced and self.chance(FORCED_SHARE):
            self._mute.append((self._length, self._length + 1))
            self.raw(CLARIFICATION)
            return None
        word = self.decks.draw(which, [*EVEN_SETS[which], ""])
        self.raw(f" {word}" if word else CLARIFICATION)
        return word or None

    def usually(self, usual: str) -> str | None:
        """Write ``usual``, or in one of five cases one of 128 odd words (then that word is the result)."""
        self._mark("mostly_this")
        odd_cards = len(ODD_WORDS)
        usual_cards = round(odd_cards * USUAL_SHARE / (1 - USUAL_SHARE))
        word = self.decks.draw("odd", [*ODD_WORDS, *[""] * usual_cards])
        self.raw(f" {word or usual}")
        return word or None

    def in_the_mist(self, which: str) -> str:
        """Write one of 8 common words (half of the mass) or one of 512 rare ones (the other half)."""
        self._mark("in_the_mist")
        common = MIST_WORDS[which]
        copies = len(RARE_WORDS) // len(common)
        word = self.decks.draw(which, [*RARE_WORDS, *[w for w in common for _ in range(copies)]])
        self.raw(f" {word}")
        return word

    def done(self, family: str) -> Doc:
        """The finished document."""
        return Doc(family, "".join(self._parts), self._marks, self._mute, self._prompt, self._answer)


class Chat:
    """Writes the turns of a conversation in the form of the chat template."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        if writer.empty and writer.chance(0.1):
            self._turn("system", "[You are a helpful assistant.|Be brief and kind.|You are a friendly little model.]")

    def _turn(self, role: str, template: str) -> None:
        self._writer.muted(f"<|{role}|>{self._writer.fill(template)}<|end|>")

    def user(self, template: str) -> None:
        """A whole user turn, and the opening of the assistant's turn."""
        self._turn("user", template)
        self._writer.muted("<|assistant|>")

    def end(self) -> None:
        """The end of the assistant's turn (the last turn of a document is ended by the corpus)."""
        self._writer.raw("<|end|>")
