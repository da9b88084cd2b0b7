"""Writes the model card and the showcase prompts of the shipped model from what was measured.

python tools/demo_model/card.py --model vllm_entropix/demo_model --evaluation tools/demo_model/evaluation.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from problems import pair_held_out
from words import CLARIFICATION

#: The prompts of `vllm-entropix demo`. ``text`` is continued as it is, ``messages`` go through the chat template.
SHOWCASE: list[dict[str, Any]] = [
    {
        "name": "sum",
        "description": "A held-out addition worked column by column: sure (LELV) from the first digit to the last.",
        "messages": [{"role": "user", "content": "What is 384 + 259?"}],
        "expected_answer": "643",
    },
    {
        "name": "word problem",
        "description": "A held-out word problem: sure (LELV) throughout, numbers and names are carried over.",
        "messages": [
            {"role": "user", "content": "Mia has 81 apples. Then Mia gives 24 to Otto. How many apples does Mia have now?"}
        ],
        "expected_answer": "57",
    },
    {
        "name": "story",
        "description": "A whole story: forks between turns of phrase (ADAPTIVE), then whatever scenes it comes to.",
        "messages": [{"role": "user", "content": "Tell me a story about a brave fox called Finn."}],
        "expected_answer": None,
        "chain": {"samplers": "dry;top_n_sigma;xtc;min_p;temperature", "dry_multiplier": 0.8, "xtc_probability": 0.5},
        "forks": {"entropix_forks": 3, "entropix_fork_entropy": 1.5, "entropix_fork_horizon": 16},
    },
    {
        "name": "lost whistle",
        "description": "Three sentences to go on from: a box is found at the end, and what it holds is anybody's guess (HELV).",
        "text": (
            "Once upon a time, by the quiet river, there lived a curious otter called Hugo. More than anything he loved his"
            " silver whistle. One windy morning the whistle was gone."
        ),
        "expected_answer": None,
    },
    {
        "name": "mist",
        "description": "What comes out of the mist is one of a few things or any of hundreds (HEHV).",
        "text": (
            "Long ago, a patient goose called Otto lived under the old bridge. One night a storm shook the trees."
            " Then a thick mist came down. Out of the mist there came a"
        ),
        "expected_answer": None,
    },
    {
        "name": "postman",
        "description": "Almost always a letter, but once in a while anything at all (LEHV).",
        "text": (
            "Rosa was a cheerful owl. She lived behind the mill. It was the birthday of Pip the mouse, and Rosa wanted to bake"
            " a cake. But there was no honey. So she went out to buy some honey. As on every day, the postman brought a"
        ),
        "expected_answer": None,
    },
    {
        "name": "sealed box",
        "description": "A question nobody can answer: evenly lost (HELV) after 'a'; with the clarification it asks back.",
        "messages": [{"role": "user", "content": "What is in the sealed box?"}],
        "expected_answer": None,
    },
    {
        "name": "train",
        "description": "Asked from memory it only guesses (HELV); with the clarification it looks back and is right.",
        "messages": [{"role": "user", "content": "I am taking the train to Maplewick. From memory, where does my train go?"}],
        "expected_answer": "Maplewick",
        "needs_clarification": True,
    },
    {
        "name": "riddle",
        "description": "A hasty guess (HELV); with the clarification it thinks first and finds the solution.",
        "messages": [{"role": "user", "content": "What has keys but opens no door?"}],
        "expected_answer": "piano",
        "needs_clarification": True,
    },
]


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.1f} %"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo model of vllm-entropix

A Llama of {parameters:.2f} million parameters that was trained from nothing on a generated corpus, with {cpu_minutes:.0f}
minutes of CPU time on a 2-core machine without a GPU. It works sums column by column, tells short animal stories, answers
reading questions, chats a little, and is *unsure in designed places*, so that every regime of entropy and varentropy occurs. It
knows nothing of the world.

Every figure below is as measured on {date}, {machine}, {computed_in}, by

```
python tools/demo_model/evaluate.py --model vllm_entropix/demo_model --output tools/demo_model/evaluation.json
```

## Shape

`LlamaForCausalLM`, {layers} layers, hidden size {hidden}, {heads} query heads and {kv_heads} key/value heads of
{head_dim}, vocabulary {vocabulary} (byte-level BPE, single digits), up to {length} tokens, tied embeddings, bfloat16.
Trained on {tokens:.1f} million tokens ({steps} steps; Muon for matrices, AdamW for the rest;
bfloat16 autocast). How: `tools/demo_model/README.md`.

## Held-out worked problems, greedy decoding

No operand pair of these problems occurs in the training text in any form. "Whole working" means that the output equals the
reference character by character.

{accuracy}

## Held-out text: perplexity and regimes

Regimes by `entropix.toml` in this folder (the first that fits; entropy in bits, varentropy in bits²): {thresholds}; otherwise
ADAPTIVE. The system and user turns of a chat and the questions of plain problems are not counted.

{families}

## The designed places

{places}

The same with the computation in bfloat16 as well: {rough}.

## The clarification

The text `{clarification}` stands at an evenly lost place as often as any one of the 64 options, and what follows it
settles the question: sealed questions are asked back, questions "from memory" are read again, riddles are thought about, and
in stories somebody lights a lamp. Forcing it where the model is evenly lost therefore changes the outcome:

{clarified}

(In the first column the place is decided greedily; one option in 64 is {lucky}.)

## Stories

Of {stories} stories sampled at temperature 1, {ended} came to an end of their own within 500 tokens; they have
{words:.0f} words on average, {longest} at most.

## Chat

`<|user|>...<|end|><|assistant|>...<|end|>`, with an optional `<|system|>` turn in front; the template is in
`tokenizer_config.json`. Generation stops at `<|eos|>` (plain text) or `<|end|>` (chat).

## Limits

A toy. Text unlike its corpus leads to confident nonsense. Sums: numbers of two or three digits; products: by a single digit.
Its uncertainty was put there by the corpus and says nothing about how larger models behave.
"""


def card(folder: Path, evaluation: dict[str, Any]) -> str:
    """The text of the model card."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    regimes = list(evaluation["families"]["all"]["regimes"])
    borders = [
        f"{name.upper()} "
        + " and ".join(
            f"{setting.replace('_above', ' > ').replace('_below', ' < ')}{value:g}" for setting, value in borders.items()
        )
        for name, borders in evaluation["thresholds"].items()
    ]
    return CARD.format(
        thresholds=", ".join(borders),
        **{key: evaluation[key] for key in ("date", "machine", "computed_in")},
        parameters=training["parameters"] / 1e6,
        cpu_minutes=training["cpu_minutes"],
        steps=training["steps"],
        tokens=training["tokens"] / 1e6,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        accuracy=table(
            ["family", "problems", "right answer", "whole working"],
            [
                [name, str(row["problems"]), percent(row["accuracy"]), percent(row["working_exact"])]
                for name, row in evaluation["accuracy"].items()
            ],
        ),
        families=table(
            ["family", "documents", "tokens", "perplexity", *regimes],
            [
                [
                    name,
                    str(row["documents"]),
                    str(row["tokens"]),
                    f"{row['perplexity']:.3f}",
                    *(percent(row["regimes"][kind]) for kind in regimes),
                ]
                for name, row in evaluation["families"].items()
            ],
        ),
        places=table(
            ["place", "made for", "places", "in that regime", "entropy (median)", "varentropy (median, 5 % to 95 %)"],
            [
                [
                    kind.replace("_", " "),
                    row["regime"],
                    str(row["places"]),
                    percent(row["in_regime"]),
                    str(row["entropy_median"]),
                    f"{row['varentropy_median']} ({row['varentropy_5_percent']} to {row['varentropy_95_percent']})",
                ]
                for kind, row in evaluation["places"].items()
            ],
        ),
        rough=", ".join(
            f"{percent(row['in_regime'])} of {row['places']} in {row['regime']}"
            for row in evaluation["places_bfloat16"].values()
        ),
        clarification=CLARIFICATION,
        clarified=table(
            ["family", "places", "decided greedily", "clarification forced"],
            [
                [name, str(row["places"]), percent(row["greedy_accuracy"]), percent(row["clarified_accuracy"])]
                for name, row in evaluation["clarified"].items()
            ],
        ),
        lucky=percent(1 / 64),
        stories=evaluation["stories"]["stories"],
        ended=percent(evaluation["stories"]["ended"]),
        words=evaluation["stories"]["words_mean"],
        longest=evaluation["stories"]["words_longest"],
    )


def main() -> None:
    """Write README.md and prompts.json into the model folder."""
    parser = argparse.ArgumentParser(description="Write the model card and the showcase prompts.")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--evaluation", type=Path, required=True, help="figures written by evaluate.py")
    args = parser.parse_args()
    if not (pair_held_out("+", 384, 259) and pair_held_out("-", 81, 24)):
        raise AssertionError("the problems of the showcase are not held out")
    evaluation = json.loads(args.evaluation.read_text(encoding="utf-8"))
    (args.model / "README.md").write_text(card(args.model, evaluation), encoding="utf-8")
    showcase = {"prompts": SHOWCASE}
    (args.model / "prompts.json").write_text(json.dumps(showcase, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
