"""Which of a tokenizer's tokens end a sentence or a line, and which end the text; without an engine."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_entropix.engine import clarification
from vllm_entropix.samplers.entropix.settings import EntropixConfig

TEXTS = ["The", ".", " cat.", "3.1", '!"', "?)", "\n", " \n\n ", "。", "...", ",", " Mr", ".\n", "a\nb", "", "…"]
SENTENCES = {".", " cat.", '!"', "?)", "\n", " \n\n ", "。", "...", ".\n", "…"}
LINES = {"\n", " \n\n ", ".\n"}


class Tokenizer:
    eos_token_id = 3

    def __len__(self):
        return len(TEXTS)

    def decode(self, token_ids):
        return "".join(TEXTS[token] for token in token_ids)


@pytest.fixture
def vllm_config(monkeypatch):
    monkeypatch.setattr(clarification, "_tokenizer", lambda _: Tokenizer())
    model = SimpleNamespace(
        get_vocab_size=lambda: len(TEXTS) + 3, skip_tokenizer_init=False, try_get_generation_config=lambda: told
    )
    told = {"eos_token_id": [1, 5, 10_000]}
    return SimpleNamespace(model_config=model)


def places(vllm_config, **settings):
    return clarification.clarification_places(vllm_config, EntropixConfig.preset(clarification=settings))


@pytest.mark.parametrize(("place", "ending"), [("sentences", SENTENCES), ("lines", LINES)])
def test_tokens_that_end_one(vllm_config, place, ending):
    after = places(vllm_config, place=place).after
    assert {TEXTS[token] for token in np.flatnonzero(after)} == ending
    assert len(after) == len(TEXTS) + 3, "the logits are wider than the tokenizer"


def test_tokens_that_end_the_text(vllm_config):
    assert places(vllm_config, end_below=0.1).ends == (1, 3, 5)
    anywhere = places(vllm_config)
    assert (anywhere.after, anywhere.ends) == (None, ())


def test_a_place_that_no_token_ends_is_said_once(vllm_config, monkeypatch):
    told = []
    monkeypatch.setattr(clarification.logger, "warning", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(Tokenizer, "decode", lambda self, token_ids: "a")
    places(vllm_config, place="lines")
    assert told == [
        "entropix: the clarification can never be inserted: no token of this model ends what clarification.place lines names; "
        "set another."
    ]
