"""Where a clarification may begin: after tokens that end a sentence or a line, and not where the text is about to end."""

import math

import numpy as np
import torch

from vllm_entropix.rows.forcing import Clarification, Places
from vllm_entropix.samplers.entropix.settings import EntropixConfig

VOCABULARY, STOP, END = 10, 4, 9


def forced(fed, after=(STOP,), end=0.0, end_below=1.0, cooldown=0, most=100):
    """What is forced, row after row, into a text that is fed these tokens until something is forced: F or a dot each.

    Every row asks. ``end`` is the probability of the token that ends the text.
    """
    limits = {"cooldown": cooldown, "max_per_request": most, "end_below": end_below}
    allowed = None if after is None else np.isin(np.arange(VOCABULARY), after)
    config = EntropixConfig.preset(clarification=limits)
    clarification = Clarification((7, 8), config, 2, places=Places(allowed, (END,)))
    logits = torch.full((1, VOCABULARY), math.log((1 - end) / (VOCABULARY - 1)))
    logits[0, END] = math.log(end) if end else -math.inf
    yes, slot, found, waiting = torch.tensor([True]), torch.tensor([1]), "", list(fed)
    position, token = 0, waiting.pop(0)
    while True:
        rows = clarification.force(
            logits, slot, torch.tensor([position]), torch.tensor([token]), yes, yes, yes, yes, logits.logsumexp(dim=-1)
        )
        next_token = int(rows.token_ids)
        found += "F" if next_token >= 0 else "."
        if next_token < 0:
            if not waiting:
                return found
            next_token = waiting.pop(0)
        position, token = position + 1, next_token


def test_it_begins_after_what_ends_a_sentence_and_goes_on_wherever_it_is():
    assert forced([1, 2, STOP, 3, 3]) == "..FF..."
    assert forced([1, 2, 3]) == "..."
    assert forced([1, 2, 3], after=None)[:2] == "FF"


def test_it_waits_for_the_next_place_after_its_cooldown():
    assert forced([STOP, 1, STOP, 1, STOP, 1], cooldown=4) == "FF....FF.."
    assert forced([STOP, 1, STOP, 1], most=1) == "FF...."


def test_it_isnt_inserted_where_the_text_is_about_to_end():
    assert forced([STOP, 1], end=0.4, end_below=0.3) == ".."
    assert forced([STOP, 1], end=0.2, end_below=0.3) == "FF.."
    assert forced([STOP, 1], end=0.999, end_below=1.0) == "FF..", "1 is no bound"


def test_a_token_beyond_the_vocabulary_stands_for_none():
    """As images have, in a prompt."""
    assert forced([VOCABULARY + 3, 1]) == ".."
