"""What stands out among many traces: names that people know, what there is to see, figures over all."""

import numpy as np
import pytest

from tests.support.traces import CENTRES, line
from vllm_entropix.observability.overview import BINS, Overview, interest, sequence_title

CHATS = {
    "demo": "<|user|>What is 2 + 3?<|end|><|assistant|>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting off: 2023<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<bos><start_of_turn>user\nWhat is 2 + 3?<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] What is 2 + 3? [/INST]",
    "deepseek": "<\uff5cUser\uff5c>What is 2 + 3?<\uff5cAssistant\uff5c>",
    "without special tokens": "system\nBe brief.\nuser\nWhat is 2 + 3?\nassistant\n",
    "plain": "What is 2 + 3?",
}


@pytest.mark.parametrize("prompt", CHATS.values(), ids=CHATS)
def test_a_sequence_is_named_by_the_last_message_of_its_prompt(prompt):
    assert sequence_title(line(["5"], name="chatcmpl-1", prompt_text=prompt)) == "What is 2 + 3?"


def test_otherwise_by_its_answer_and_at_last_by_its_id():
    assert sequence_title(line(["\n", "Once", " upon", "<|end|>"], name="chatcmpl-1")) == "Once upon"
    assert sequence_title(line(["", " ", "<|end|>"], name="chatcmpl-1")) == "chatcmpl-1"
    assert sequence_title(line(["word "] * 50)) == "word " * 12 + "…"
    assert sequence_title(line(["x" * 5000])) == "x" * 62 + " …"


def test_more_kinds_of_tokens_are_more_to_see():
    sure = line(["a"] * 500, metrics=CENTRES[:1])
    between = line(["a"] * 100, metrics=[*CENTRES[:1], *CENTRES[4:]])
    lost = line(["a"] * 50, metrics=CENTRES)
    asked = line(["a"] * 50, metrics=CENTRES, forced=[3])
    unmeasured = line(["a"] * 500, metrics=[(None, None)])
    assert sorted([asked, lost, between, sure, unmeasured], key=interest)[2:] == [between, lost, asked]


def test_figures_over_all_files_are_numpys():
    first, second = line(["a"] * 10), line(["b"] * 7, metrics=[(None, None), (3.0, 2.0), (None, 2.0)])
    overview = Overview()
    for file, traced in enumerate((first, second)):
        overview.add(file, traced)
    entropy = overview.histograms()[0]
    values = [[entry.entropy for entry in first.records], [3.0, 3.0]]
    assert entropy["field"] == "entropy"
    assert entropy["top"] == 6
    for counts, of_file in zip(entropy["counts"], values, strict=True):
        assert counts == np.histogram(np.sqrt(of_file), np.linspace(0, 6**0.5, BINS + 1))[0].tolist()
        assert sum(counts) == len(of_file)
    assert entropy["means"] == [pytest.approx(np.mean(values[0]), rel=1e-3), 3.0]
    assert [metric["field"] for metric in overview.histograms()] == ["entropy", "varentropy", "attention_entropy"]
    uncertain = overview.uncertain()
    assert [(token["sequence"], token["token"]) for token in uncertain[:6]] == [(0, 1), (0, 3), (0, 6), (0, 8), (1, 1), (1, 4)]
    assert (uncertain[0]["before"], uncertain[0]["text"], uncertain[0]["behind"]) == ("a", "a", "a" * 8)
    assert [token["entropy"] for token in uncertain] == sorted((token["entropy"] for token in uncertain), reverse=True)


def test_nothing_measured_gives_no_histograms():
    overview = Overview()
    overview.add(0, line(["a"], metrics=[(0.0, 0.0)]))
    assert [metric["field"] for metric in overview.histograms()] == ["attention_entropy"]
    assert overview.uncertain() == []
