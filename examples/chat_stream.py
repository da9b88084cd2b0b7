"""Colour an answer by what the model is unsure of, while it streams in.

Start a server, here with the shipped model, then ask it:

    MODEL=$(vllm-entropix demo --print-model-path)
    vllm serve $MODEL --host 127.0.0.1 --sampler entropix --sampler-config $MODEL/entropix.toml \\
        --max-model-len 1024 --kv-cache-memory-bytes 268435456
    python examples/chat_stream.py "Tell me a story about a brave fox called Finn."

Needs the openai client, which comes with vLLM.
"""

import argparse
import sys
from typing import Any

import openai
from rich.console import Console
from rich.text import Text

from vllm_entropix.client import ASK, StreamTraces, trace_of
from vllm_entropix.observability.terminal import FORCED_STYLE, legend, printable
from vllm_entropix.records.regimes import regime_of


def stream(client: openai.OpenAI, question: str, console: Console, **parameters: Any) -> StreamTraces:
    """Print the answer as it comes, each piece in the colour of its last token's regime; returns its records."""
    traces = StreamTraces()
    chunks = client.chat.completions.create(
        messages=[{"role": "user", "content": question}], stream=True, extra_body=ASK, **parameters
    )
    for chunk in chunks:
        traces.add(chunk)
        for choice in chunk.choices:
            trace = trace_of(choice)
            style = ""
            if trace is not None and trace.tokens:
                last = trace.tokens[-1]
                regime = regime_of(last)
                style = FORCED_STYLE if last.forced else regime.style if regime is not None else ""
            console.print(Text(printable(choice.delta.content or ""), style), end="")
    console.print()
    return traces


def main() -> None:
    """Ask one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="Tell me a story about a brave fox called Finn.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="default: the first that the server has")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, help="of the draws (default: another each time)")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.url, api_key="none", max_retries=0)
    console = Console(highlight=False)
    try:
        model = options.model or client.models.list().data[0].id
        traces = stream(client, options.question, console, model=model, max_tokens=options.max_tokens, seed=options.seed)
    except openai.APIConnectionError:
        sys.exit(f"no server answers at {options.url}; `python {sys.argv[0]} --help` shows how to start one")
    except openai.APIError as error:
        sys.exit(f"the server refused: {error.message}")
    tokens = traces[0].tokens
    if not tokens:
        sys.exit("the answer has no trace; was the server started with --sampler entropix?")
    console.print(legend())
    unsure = sum(token.regime != "LELV" for token in tokens)
    console.print(f"{len(tokens)} tokens, {unsure} of them outside LELV, {sum(token.forced for token in tokens)} forced")


if __name__ == "__main__":
    main()
