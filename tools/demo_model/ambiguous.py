"""Questions that can not be answered from what was said: the evenly lost places of the corpus.

Each ends in one of 64 equally likely words, or in the clarification. There are three kinds:

* *sealed* questions, whose answer nobody has seen: after the clarification the text asks back;
* *memory* questions, answered "from memory" although the answer was said: after the clarification the
  text looks back and gives the right answer;
* *riddles*, answered by a quick guess: after the clarification the text thinks and finds the solution.
"""

from __future__ import annotations

from dataclasses import dataclass

from words import EVEN_SETS, HEROES
from writer import Chat, Writer


@dataclass(frozen=True)
class Sealed:
    """A question about something that nobody has seen."""

    which: str
    question: str
    lead: str
    ask_back: str
    told: str
    sure: str


SEALED = (
    Sealed(
        "things",
        "[What is in the sealed box?|What is inside the sealed box?|What does the sealed box hold?]",
        "In the sealed box there is a",
        "I cannot see into a sealed box. Please open it and tell me.",
        "[I opened it. There is a {word} in it.|It is open now. I see a {word}.]",
        "Then the sealed box holds a {word}. Now I am sure.",
    ),
    Sealed(
        "names",
        "[Who is knocking at the door?|Who knocks at the door?|There is a knock. Who can it be?]",
        "The one who knocks is called",
        "I cannot see through a door. Please ask for the name and tell me.",
        "[I asked. It is {word}.|The name is {word}.]",
        "Then it is {word} who knocks. Now I am sure.",
    ),
    Sealed(
        "towns",
        "[Where was the letter posted?|Which town does the letter come from?|Where does the letter come from?]",
        "The letter was posted in",
        "The postmark is too smudged to read. Please find out and tell me.",
        "[I found out. It was {word}.|It came from {word}.]",
        "Then the letter was posted in {word}. Now I am sure.",
    ),
    Sealed(
        "animals",
        "[Which animal left the tracks in the snow?|What made the tracks in the snow?|Whose tracks are in the snow?]",
        "The tracks were left by a",
        "New snow has covered the tracks. Please follow them and tell me.",
        "[I followed them. It was a {word}.|They belong to a {word}.]",
        "Then the tracks were left by a {word}. Now I am sure.",
    ),
)

#: How a fact of each set is said, asked for, answered from memory, and read again.
MEMORY: dict[str, tuple[str, str, str, str]] = {
    "things": (
        "[The word on the card is {word}.|On the card stands the word {word}.]",
        "what is the word on the card?",
        "the word is",
        "the word on the card is {word}",
    ),
    "names": (
        "[My aunt is called {word}.|The name of my aunt is {word}.]",
        "what is my aunt called?",
        "the name is",
        "your aunt is called {word}",
    ),
    "towns": (
        "[My train goes to {word}.|I am taking the train to {word}.]",
        "where does my train go?",
        "it goes to",
        "your train goes to {word}",
    ),
    "animals": (
        "[In my dream I met a {word}.|Last night I dreamed of a {word}.]",
        "which animal was in my dream?",
        "it was a",
        "the animal in your dream was a {word}",
    ),
}

#: Riddle, the thought that solves it, solution.
RIDDLES = (
    ("What has hands but cannot clap?", "Its hands go round and show the time", "clock"),
    ("What has keys but opens no door?", "Its keys are black and white", "piano"),
    ("What has teeth but never bites?", "Its teeth go through the hair", "comb"),
    ("What has a neck but no head?", "Its neck is closed by a cork", "bottle"),
    ("What has an eye but cannot see?", "Through its eye goes a thread", "needle"),
    ("What gets wetter the more it dries?", "It hangs beside the bath", "towel"),
    ("What has a tongue but cannot speak?", "Its tongue lies under the laces", "boot"),
    ("What has many leaves but is no tree?", "Its leaves are full of words", "book"),
    ("What has towns but no houses?", "Its rivers have no water", "map"),
    ("What is full of holes but holds the hair?", "It is worn on the head in winter", "hat"),
    ("What has ribs and flies on a string?", "It needs wind and a long tail", "kite"),
    ("What is beaten but never cries?", "It is round and loud", "drum"),
)

_GUESS = "[That is only a guess.|But I am not sure.|I may well be wrong.]"


def _open(w: Writer, chat: bool, question: str) -> Chat | None:
    """Write the question in either form."""
    if chat:
        conversation = Chat(w)
        conversation.user(question)
        return conversation
    w.muted(f"Question: {w.fill(question)}\nAnswer:")
    return None


def _lead(w: Writer, chat: bool, text: str) -> None:
    w.raw(text if chat else f" {text}")


def sealed(w: Writer, chat: bool) -> None:
    """A question that needs to be asked back; in chat form the user may then tell the answer."""
    item = w.rng.choice(SEALED)
    conversation = _open(w, chat, item.question)
    _lead(w, chat, item.lead)
    if w.evenly(item.which) is not None:
        w.say(f". {_GUESS}")
    else:
        w.raw(f" {item.ask_back}")
    if conversation is not None and w.chance(0.5):
        conversation.end()
        told = {"word": w.rng.choice(EVEN_SETS[item.which])}
        conversation.user(w.fill(item.told, told))
        w.say(item.sure, told)


def memory(w: Writer, chat: bool) -> None:
    """A question about a fact that was said, to be answered without looking back."""
    which = w.rng.choice(list(MEMORY))
    said, asked, lead, read = MEMORY[which]
    word = w.rng.choice(EVEN_SETS[which])
    fact = w.fill(said, {"word": word})
    conversation = _open(w, chat, f"{fact} [From memory|Without looking back|By heart], {asked}")
    _lead(w, chat, f"From memory, {lead}")
    guess = w.evenly(which)
    if guess is None:
        w.say(f" I will look back and read it again: {read}. The answer is {{word}}.", {"word": word})
    else:
        w.say(f". {_GUESS}")
        if w.chance(0.3):
            w.say(f" Now I look back: {read}.", {"word": word})
    if conversation is not None and w.chance(0.2):
        conversation.end()
        conversation.user("[Look again.|Please look back.|Are you sure?]")
        w.say(f"I look back: {read}. The answer is {{word}}.", {"word": word})


def riddle(w: Writer, chat: bool) -> None:
    """A riddle, answered in haste."""
    question, thought, solution = w.rng.choice(RIDDLES)
    conversation = _open(w, chat, question)
    _lead(w, chat, "My quick guess is a")
    guess = w.evenly("things")
    if guess is None:
        w.raw(f" Let me think. {thought}. It must be a {solution}. The answer is {solution}.")
    else:
        w.say(f". {_GUESS}")
    if conversation is not None and w.chance(0.2):
        conversation.end()
        conversation.user("[Think about it.|Please think again.|Take your time.]")
        w.raw(f"Let me think. {thought}. It must be a {solution}. The answer is {solution}.")


def guessing_game(w: Writer) -> None:
    """Plain prose: one writes a word, the other guesses it before looking."""
    one, other = w.rng.sample(list(HEROES), 2)
    word = w.rng.choice(EVEN_SETS["things"])
    they = HEROES[other]
    w.names = {"one": one, "other": other, "word": word, "He": they.capitalize(), "he": they}
    w.say("{one} wrote the word {word} on a card and [turned it over|hid it behind {one}'s back|laid it face down].")
    w.say(" [Without looking|Before anyone could look], {other} guessed the word")
    guess = w.evenly("things")
    if guess is None:
        w.say(" {He} asked to see the card. The card said {word}, and so {other} knew the answer: {word}.")
        return
    w.say(". Then {one} showed the card. The card said {word}.")
    w.say(" {other} had guessed right!" if guess == word else " {other} had guessed wrong[ and laughed|, but it was fun|].")
