"""Trains the tokenizer: byte-level BPE in which every digit and every option word is one token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from corpus import TRAIN_SEED, Corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from words import CLARIFICATION, option_words

VOCABULARY = 3072

#: Longest text the model is trained on.
MAX_LENGTH = 1024

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip

#: The same form as ``writer.Chat`` writes.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

#: Documents shown to the tokenizer trainer.
SAMPLE_DOCUMENTS = 30_000

#: How often each option word is shown on its own, so that rare ones are merged to one token as well.
WORD_REPEATS = 300


def _texts() -> Iterator[str]:
    for doc in islice(Corpus(TRAIN_SEED).mixed(), SAMPLE_DOCUMENTS):
        text = doc.text
        for special in SPECIAL_TOKENS:
            text = text.replace(special, "\n")
        yield text
    for word in option_words():
        yield from [f" {word}"] * WORD_REPEATS
    yield from [CLARIFICATION] * WORD_REPEATS


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the demo model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, token_id(tokenizer, BOS))]
    )
    _check(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a token that must exist."""
    found: int | None = tokenizer.token_to_id(name)
    if found is None:
        raise KeyError(name)
    return found


def _check(tokenizer: Tokenizer) -> None:
    """The corpus relies on these properties."""
    for word in option_words():
        if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) != 1:
            raise AssertionError(f"{word!r} is not one token")
    if len(tokenizer.encode("2047", add_special_tokens=False).ids) != 4:
        raise AssertionError("digits are not split")
    first = tokenizer.encode(CLARIFICATION, add_special_tokens=False).tokens[0]
    if first != "Ġ...":
        raise AssertionError(f"the clarification begins with {first!r}")
    for text in ("Añb  ¿…? \n\t日本 'tis 12.5%", CLARIFICATION, " two  spaces ", "don't\r\n"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise AssertionError(f"{text!r} does not survive the round trip")
    if tokenizer.get_vocab_size() > VOCABULARY:
        raise AssertionError("the vocabulary is too large")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    The second is written by hand, because its fields (not their meaning) differ between the major versions of
    transformers; these are understood by versions 4 and 5, and keep the chat template inside the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
