"""A toy language model of five tokens, and answers of it that fork: what an engine would do, in plain Python."""

import math
import random

from vllm_entropix.forks.choice import chooser
from vllm_entropix.forks.tree import Tree
from vllm_entropix.records.fields import names
from vllm_entropix.records.trace import TokenRecord
from vllm_entropix.samplers import registry
from vllm_entropix.settings.server import Forks

registry.known()  # entropix's own fields are looked at, too
VOCABULARY = 5


def probabilities(prefix):
    """Of the next token; they depend on all before it."""
    draw = random.Random(repr(tuple(prefix)))
    weights = [draw.expovariate(1.0) for _ in range(VOCABULARY)]
    return [weight / sum(weights) for weight in weights]


def record(alternatives, **values):
    """A record of these alternatives, most probable first; nothing else is known unless ``values`` say it."""
    ordered = sorted(alternatives, key=lambda one: -one[1])
    entropy = -sum(p * math.log2(p) for _, p in ordered if p)
    known = {"forced": False, "entropy": entropy, **values}
    return TokenRecord(**{**dict.fromkeys(names()), **known}, alternatives=tuple(ordered))


def record_after(prefix, **values):
    return record(list(enumerate(probabilities(prefix))), **values)


def greedy(prefix):
    of = probabilities(prefix)
    return of.index(max(of))


def run(length, draw=greedy, seen=None, **settings):
    """An answer's tree once all its branches have ended, each with ``length`` tokens at most.

    Args:
        length: of an answer.
        draw: prefix → the next token.
        seen: called with the tree after each step.
        settings: of its forks.
    """
    forks = Forks(**{"entropy": 0, "floor": 0, "distance": 1, "budget": 10**6, **settings})
    tree = Tree(forks, chooser(forks.select))
    while tree.live:
        for branch in list(tree.live):
            prefix = branch.token_ids
            births = tree.feed(branch.id, [draw(prefix)], [record_after(prefix)], ended=len(prefix) + 1 == length)
            for birth in births:
                if birth.position + 1 == length:
                    tree.end(birth.branch)
        tree.settle()
        if seen is not None:
            seen(tree)
    return tree
