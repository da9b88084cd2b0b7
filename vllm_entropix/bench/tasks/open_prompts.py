"""Open prompts: nothing is right or wrong, and what counts is how different the answers are."""

from __future__ import annotations

from vllm_entropix.bench.tasks.base import Graded, Item, Task, chosen
from vllm_entropix.settings.section import Section

_PROMPTS = (
    "Write the first four sentences of a story about a lighthouse keeper.",
    "Write a short poem about rain in a city.",
    "Suggest an unusual use for a brick, and explain it.",
    "Invent an animal and describe how it lives.",
    "Describe a market on another planet.",
    "Write a letter from a tree to the person who planted it.",
    "Think of a name for a bakery, and say why it fits.",
    "Give me an idea for a weekend without any screens.",
    "Write a dialogue between a clock and a calendar.",
    "Describe the smell of an old library.",
    "Invent a holiday and tell how it is celebrated.",
    "Write the opening of a detective story that begins in a kitchen.",
    "Propose a science experiment for children that needs only water and paper.",
    "Write a speech for the last day of a small village school.",
    "Describe a dream in which someone can speak to birds.",
    "Suggest a plot for a film about two rival gardeners.",
    "Write a riddle, and give its answer.",
    "Invent a game for three players and a single coin.",
    "Describe a meal for someone who has never tasted salt.",
    "Write a diary entry of an explorer who has found a door in the ice.",
    "Make up a proverb and explain what it means.",
    "Write a product review of a time machine.",
    "Describe a road in autumn without naming a colour.",
    "Tell how the moon got its craters, as a fairy tale.",
)


class OpenPrompts(Task[Section]):
    """Short stories, ideas and descriptions."""

    kind = "open_prompts"
    max_tokens = 120
    rule = ""

    def items(self, count: int, seed: str) -> list[Item]:
        """Prompts in random order."""
        asked = [Item(f"{number:02}", prompt) for number, prompt in enumerate(_PROMPTS)]
        return chosen(self.kind, asked, count, seed)

    def grade(self, item: Item, text: str) -> Graded:
        """The text is the answer."""
        return Graded(" ".join(text.split()) or None, None)
