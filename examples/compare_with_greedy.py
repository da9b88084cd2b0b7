"""Compare entropix with greedy decoding, prompt by prompt: where they part, and how unsure the model was there.

Start a server, here with the shipped model, then ask it:

    MODEL=$(vllm-entropix demo --print-model-path)
    vllm serve $MODEL --host 127.0.0.1 --sampler entropix --sampler-config $MODEL/entropix.toml \\
        --max-model-len 1024 --kv-cache-memory-bytes 268435456
    python examples/compare_with_greedy.py
    python examples/compare_with_greedy.py --prompts prompts.txt       # a prompt per line

Needs the openai client, which comes with vLLM.
"""

import argparse
import sys
from pathlib import Path

import openai

from vllm_entropix.client import trace_of
from vllm_entropix.observability.terminal import printable

PROMPTS = [
    "What is 384 + 259?",
    "Mia has 81 apples. Then Mia gives 24 to Otto. How many apples does Mia have now?",
    "I am taking the train to Maplewick. From memory, where does my train go?",
    "What has keys but opens no door?",
]


def answer(client: openai.OpenAI, model: str, prompt: str, max_tokens: int, *, greedy: bool):
    """The choice that answers a prompt, with its token ids and its trace. Both are traced: tracing changes no token."""
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        temperature=0 if greedy else openai.omit,  # a request of temperature 0 stays greedy under entropix
        seed=0,
        extra_body={"vllm_xargs": {"entropix_trace": "on"}},
    ).choices[0]


def parting(one: list[int], other: list[int]) -> int | None:
    """The first place at which two sequences differ, None if they don't."""
    if one == other:
        return None
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def main() -> None:
    """Print both answers to each prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="file with a prompt per line (default: four for the shipped model)")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="default: the first that the server has")
    parser.add_argument("--max-tokens", type=int, default=120)
    options = parser.parse_args()
    try:
        text = options.prompts.read_text(encoding="utf-8") if options.prompts else "\n".join(PROMPTS)
    except OSError as error:
        sys.exit(f"can't read {options.prompts}: {error.strerror}")
    prompts = [line for line in text.splitlines() if line.strip()]
    client = openai.OpenAI(base_url=options.url, api_key="none", max_retries=0)
    same = 0
    try:
        model = options.model or client.models.list().data[0].id
        for prompt in prompts:
            choices = [answer(client, model, prompt, options.max_tokens, greedy=greedy) for greedy in (True, False)]
            greedy, entropix = map(trace_of, choices)
            if greedy is None or entropix is None:
                sys.exit("the answers have no traces; was the server started with --sampler entropix?")
            print(f"\n{printable(prompt)}")
            for name, choice in zip(("greedy", "entropix"), choices, strict=True):
                print(f"  {name:9}{printable(' '.join((choice.message.content or '').split()))}")
            place = parting(*([token.token_id for token in trace.tokens] for trace in (greedy, entropix)))
            if place is None:
                same += 1
                print("  the same, token for token")
            elif place < len(entropix.tokens):
                token = entropix.tokens[place]
                entropy = "unknown" if token.entropy is None else f"{token.entropy:.2f} bits"
                print(
                    f"  they part at token {place + 1}: {token.regime}, entropy {entropy}{', forced' if token.forced else ''}"
                )
            else:
                print(f"  greedy goes on after token {place}")
    except openai.APIConnectionError:
        sys.exit(f"no server answers at {options.url}; `python {sys.argv[0]} --help` shows how to start one")
    except openai.APIError as error:
        sys.exit(f"the server refused: {error.message}")
    print(f"\n{same} of {len(prompts)} answers are the same")


if __name__ == "__main__":
    main()
