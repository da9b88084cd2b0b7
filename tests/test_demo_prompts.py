"""The demo's prompts: those for any model have answers that can be checked, and go through its chat template."""

from pathlib import Path

import pytest

from tests.support.models import tokenizer
from vllm_entropix.cli import demo
from vllm_entropix.cli.demo import Prompt, load_prompts

FACTS = load_prompts(Path(demo.__file__).with_name("prompts.json"))


def test_any_model_is_asked_for_facts_in_a_chat():
    assert sum(prompt.expected is not None for prompt in FACTS) >= 8
    assert all(prompt.messages and prompt.text is None for prompt in FACTS)
    assert len({prompt.name for prompt in FACTS}) == len(FACTS)


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("Paris", "It is paris.", True),
        ("12", "7 + 5 = 12", True),
        ("12", "120", False),
        ("12", "112", False),
        ("7|seven", "Seven days", True),
        ("7|seven", "seventy", False),
        ("100", "100°C", True),
        ("cold", "", False),
    ],
)
def test_whole_words_are_right(expected, text, right):
    assert Prompt("x", expected=expected).is_right(text) is right


def test_a_chat_goes_through_the_template_where_there_is_one():
    encoder = tokenizer()
    prompt = Prompt("x", messages=[{"role": "user", "content": "Hi?"}])
    assert encoder.decode(prompt.token_ids(encoder)) == "user: Hi?\nassistant:"
    encoder.chat_template = None
    assert encoder.decode(prompt.token_ids(encoder)) == "Hi?\n"
    assert encoder.decode(Prompt("x", text="Hi").token_ids(encoder)) == "Hi"
