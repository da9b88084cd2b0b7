"""Short exchanges: greetings, thanks, what the model can do, and what it does not know."""

from __future__ import annotations

from words import ANIMALS, KINDS, NAMES, RARE_WORDS, THINGS, TOWNS, with_article
from writer import Chat, Writer

_ABILITIES = "I can add, subtract and multiply, [tell short stories|tell stories about animals], and say when I am not sure."

TALK = (
    (
        "[Hello!|Hi!|Hello.|Hi there!|Good morning!|Hey!|Good evening!]",
        "[Hello!|Hi!|Good day!] [How can I help you?|What shall we do today?|A sum or a story?]",
    ),
    (
        "[Who are you?|What are you?|What is your name?|Tell me about yourself.]",
        "I am a very small language model. " + _ABILITIES,
    ),
    (
        "[What can you do?|How can you help me?|What do you know?|Help!]",
        _ABILITIES + " Ask me for a sum or a story.",
    ),
    ("[Thank you!|Thanks!|Thank you very much.|Great, thanks.]", "[You are welcome!|With pleasure!|Any time!]"),
    ("[Goodbye!|Bye!|Good night!|See you soon.]", "[Goodbye!|See you soon!|Sleep well!]"),
    (
        "[How are you?|How do you do?|How are you today?]",
        "[I am well, thank you.|Very well, thank you.] [How can I help you?|A sum or a story?]",
    ),
    (
        "[Are you sure?|Is that right?|Really?]",
        "[I am sure when I can work it out, and unsure when I can only guess.|Not always. Ask me to work it out.]",
    ),
    (
        "[What is entropy?|What is uncertainty?|What is a regime?]",
        "Entropy says how many answers I still think possible. When it is low, I am sure.",
    ),
)

_UNKNOWN = (
    "[What is the capital of {town}?|Where is {town}?|How far is it to {town}?|Who lives in {town}?]",
    "[Why is the {noun} [red|blue|old|big]?|What is a {noun}?|How does a {noun} work?|Who made the first {noun}?]",
    "[Write me a poem about a {noun}.|Draw a {noun}.|Explain the {noun} to me.|Where can I buy a {noun}?]",
    "[Who is {name}?|When was {name} born?|What did {name} write?|Do you know {name}?]",
    "[Can a {animal} swim?|What does a {animal} eat?|How old can a {animal} get?|How big is a {animal}?]",
    "[What is the weather like?|What time is it?|Which day is today?|What is the news?]",
)
_UNKNOWN_ANSWER = (
    "[I do not know that.|I am too small to know that.|That I do not know.] Ask me for a sum or a story[.| about {a_kind}.]"
)


def talk(w: Writer) -> None:
    """One to three short exchanges."""
    conversation = Chat(w)
    for turn in range(w.rng.choice((1, 1, 2, 3))):
        if turn:
            conversation.end()
        if w.chance(0.4):
            noun = w.rng.choice((w.rng.choice(RARE_WORDS), w.rng.choice(THINGS)))
            w.names = {
                "town": w.rng.choice(TOWNS), "noun": noun, "name": w.rng.choice(NAMES),
                "animal": w.rng.choice(ANIMALS), "a_kind": with_article(w.rng.choice(KINDS)),
            }  # fmt: skip
            question, answer = w.rng.choice(_UNKNOWN), _UNKNOWN_ANSWER
        else:
            question, answer = w.rng.choice(TALK)
        conversation.user(question)
        w.say(answer)
