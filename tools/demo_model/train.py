"""Trains the demo model (or its small sibling) from nothing: corpus, tokenizer, model.

python tools/demo_model/train.py --output vllm_entropix/demo_model
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import TRAIN_SEED, Corpus
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rows import IGNORED, POOL, Encoded, Rows, encode, pack_long, pack_short
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocab import BOS, END, EOS, MAX_LENGTH, PAD, save_tokenizer, token_id, train_tokenizer


@dataclass(frozen=True)
class Size:
    """Shape of a model, and how it is trained."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    learning_rate: float


SIZES = {
    "demo": Size(hidden=256, intermediate=704, layers=5, heads=4, kv_heads=2, head_dim=64, learning_rate=3e-3),
    "draft": Size(hidden=96, intermediate=256, layers=2, heads=4, kv_heads=2, head_dim=32, learning_rate=6e-3),
}

#: Tokens in one step.
STEP_TOKENS = 4096

#: Most steps use short rows, in which documents can not see each other. Every so many steps the rows are
#: long and documents see what came before, so that the model also learns to ignore old text.
SHORT, LONG, LONG_EVERY = 256, MAX_LENGTH, 8

#: Steps of the warm-up, and the share of the training after which the learning rate falls.
WARM_UP, DECAY_FROM = 100, 0.4

WEIGHT_DECAY = 0.05


def quiet_malloc() -> None:
    """Let glibc keep freed memory: giving large tensors back to the system at each step costs a third."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def build_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model."""
    ids = {name: token_id(tokenizer.backend_tokenizer, name) for name in (BOS, EOS, PAD, END)}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=ids[BOS], eos_token_id=[ids[EOS], ids[END]], pad_token_id=ids[PAD])
    return model


def batches(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Iterator[Rows]:
    """One batch for each step, short or long."""
    backend = tokenizer.backend_tokenizer
    pad = token_id(backend, PAD)
    rng = random.Random(seed)
    stream = encode(backend, Corpus(seed).mixed())
    short: list[Rows] = []
    long: list[Encoded] = []
    ready: list[Rows] = []
    long_rows = STEP_TOKENS // LONG

    for step in range(steps):
        want_long = step % LONG_EVERY == LONG_EVERY - 1
        while (sum(len(item.tokens) for item in long) < 2 * STEP_TOKENS) if want_long else not short:
            pool = [next(stream) for _ in range(POOL)]
            rng.shuffle(pool)
            # Documents that fit no short row come first, then so many others that long rows get their share.
            total = sum(len(item.tokens) for item in pool)
            fits = [item for item in pool if len(item.tokens) <= SHORT]
            part = [item for item in pool if len(item.tokens) > SHORT]
            taken = sum(len(item.tokens) for item in part)
            while taken * LONG_EVERY < total:
                part.append(fits.pop())
                taken += len(part[-1].tokens)
            rng.shuffle(part)
            long.extend(part)
            rows = pack_short(fits, SHORT, pad)
            order = list(range(len(rows)))
            rng.shuffle(order)
            size = STEP_TOKENS // SHORT
            for first in range(0, len(order) - size + 1, size):
                index = np.array(order[first : first + size])
                short.append(Rows(rows.tokens[index], rows.labels[index], rows.owner[index]))
        if not want_long:
            yield short.pop()
            continue
        if not ready:
            rows = pack_long(long, LONG, pad)
            count = len(rows) // long_rows
            ready = [
                Rows(*(table[at * long_rows : (at + 1) * long_rows] for table in (rows.tokens, rows.labels, rows.owner)))
                for at in range(count)
            ]
            long = []
        yield ready.pop()


def attention_mask(owner: Tensor, apart: bool) -> Tensor:
    """What each token may see, as an additive mask: earlier tokens, of the same document if ``apart``."""
    length = owner.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if apart:
        seen = seen & (owner[:, :, None] == owner[:, None, :])
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None].expand(len(owner), 1, length, length)


def loss_function(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The mean cross entropy in nats of the labelled tokens."""

    def loss(tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        # A CPU without instructions for bfloat16 emulates it, several times slower than float32.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    return loss


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: a warm-up, level until ``DECAY_FROM``, then straight down to nothing."""
    return min(1.0, (step + 1) / WARM_UP, (1 - step / steps) / (1 - DECAY_FROM))


def make_optimizers(model: LlamaForCausalLM, size: Size) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    return [
        Muon(matrices, lr=size.learning_rate, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=size.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def train(size: Size, tokenizer: PreTrainedTokenizerFast, steps: int, compiled: bool, console: Console) -> LlamaForCausalLM:
    """Train a model of this size."""
    torch.manual_seed(TRAIN_SEED)
    model = build_model(size, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{count / 1e6:.2f} million parameters, {steps} steps of {STEP_TOKENS} tokens")
    optimizers = make_optimizers(model, size)
    loss_of = loss_function(model)
    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)
    average = 0.0
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step, batch in enumerate(batches(tokenizer, steps, TRAIN_SEED)):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = size.learning_rate * rate(step, steps)
            owner = torch.from_numpy(batch.owner)
            mask = attention_mask(owner, apart=owner.shape[1] == SHORT)
            loss = loss_of(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels), mask)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
            progress.update(task, advance=1, description=f"training, loss {average:.3f}")
            if (step + 1) % 100 == 0:
                speed = (step + 1) * STEP_TOKENS / (time.monotonic() - began)
                console.print(f"step {step + 1}: loss {average:.4f}, {speed:.0f} tokens/s")
    return model


def main() -> None:
    """Train and write a model folder."""
    parser = argparse.ArgumentParser(description="Train the demo model on this machine.")
    parser.add_argument("--size", choices=list(SIZES), default="demo", help="which model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder the model is written to")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile (no C++ compiler needed, slower)")
    args = parser.parse_args()
    console = Console()
    quiet_malloc()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    with console.status("training the tokenizer"):
        tokenizer = train_tokenizer()
    model = train(SIZES[args.size], tokenizer, args.steps, not args.no_compile, console)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(args.output)
    save_tokenizer(tokenizer, args.output)
    minutes = (time.monotonic() - began) / 60
    record = {
        "size": args.size,
        "parameters": model.num_parameters(),
        "steps": args.steps,
        "tokens": args.steps * STEP_TOKENS,
        "minutes": round(minutes, 1),
        "cpu_minutes": round(time.process_time() / 60, 1),
    }
    (args.output / "model.safetensors").chmod(0o644)
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {args.output} after {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
