"""What can go wrong in a running engine, one test for each; most step the engine by hand to hit the moment.

Held elsewhere, on both runners too: a batch that mixes entropix, opted-out and greedy rows, and a crowd that changes while a
seeded request runs (test_features, test_speculation); a forced token that waits for the grammar, and preemption for want of
cache (test_clarification, test_speculation); statistics of prefix-cache hits and of chunked prefills
(test_attention_statistics); sampled logprobs (test_logprobs); batch-sharded sampling, which is refused (test_arguments).
"""

import json
import random

import pytest
import torch

from tests.support.dense import Dense
from tests.support.engine import adapter_of, engine, generate, scheduler_of, worker_of
from vllm_entropix import traces

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

TRACED = {"entropix_trace": "on"}
# Every position is HELV: nothing is below an entropy of 0 or a varentropy of 0.
LOST = {"lelv": {"entropy_below": 0.0}, "helv": {"entropy_above": 0.0, "varentropy_below": 4096.0}}
CLARIFICATION = "hm?"  # three tokens of the test models' tokenizer
CHUNK = 64
METRICS = ("entropy", "varentropy", "attention_entropy", "attention_varentropy", "agreement", "interaction_strength")


def lost(cooldown):
    return {
        "thresholds": LOST,
        "clarification": {"text": CLARIFICATION, "cooldown": cooldown, "max_per_request": 1000},
        "forks": {"floor": 0, "inside_words": True, "distance": 4},
    }


def params(**settings):
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "extra_args": TRACED, **settings})


def ids(llm, text):
    return llm.get_tokenizer().encode(text, add_special_tokens=False)


def prompt_of(token_ids):
    return {"prompt_token_ids": list(token_ids)}


def forced(output):
    """F for each forced token, . for others."""
    return "".join("F" if record.forced else "." for record in traces(output)[0])


def assert_same(output, other):
    """The same tokens, and records that differ by the rounding of another batch at most."""
    assert list(output.outputs[0].token_ids) == list(other.outputs[0].token_ids)
    [mine], [theirs] = traces(output), traces(other)
    assert (mine is None) == (theirs is None)
    for one, two in zip(mine or (), theirs or (), strict=True):
        assert (one.regime, one.forced, one.top_k) == (two.regime, two.forced, two.top_k)
        for metric in (*METRICS, "temperature"):
            assert getattr(one, metric) == pytest.approx(getattr(two, metric), abs=1e-3), metric


class Driver:
    """Steps an in-process engine by hand."""

    def __init__(self, llm):
        self.engine = llm.llm_engine
        self.outputs = {}

    def add(self, name, prompt, asked, **more):
        self.engine.add_request(name, prompt, asked, **more)

    def step(self, times=1):
        for _ in range(times):
            for output in self.engine.step():
                self.outputs[output.request_id] = output

    def abort(self, *names):
        self.engine.abort_request(list(names))

    def finish(self):
        while self.engine.has_unfinished_requests():
            self.step()
        return self.outputs


@pytest.fixture
def llm(tiny):
    return engine(
        tiny,
        sampler="entropix",
        sampler_config=lost(cooldown=2),
        max_num_seqs=8,
        max_num_batched_tokens=CHUNK,
        enable_chunked_prefill=True,
        block_size=32,
    )


def test_a_recycled_slot_begins_anew(llm):
    """A request in a slot whose last owner stopped in the middle of the clarification, one position behind."""
    drive, table = Driver(llm), adapter_of(llm).batch.sequences
    off = params(seed=3, temperature=0.8, top_k=20, extra_args={"entropix": "off"})
    [alone] = generate(llm, ["opted out"], [off])
    drive.add("first", prompt_of(range(5)), params())
    drive.step(3)
    assert forced(drive.outputs["first"]) == "FFF"
    [slot] = table._slot_of.values()
    drive.abort("first")
    # Its prompt ends in the token that was forced where the prompt ends: not placed by us, so nothing is continued.
    drive.add("second", prompt_of([1, 2, 3, 4, 5, ids(llm, "h")[0]]), params())
    drive.step(2)
    assert list(table._slot_of.values()) == [slot]
    assert list(drive.outputs["second"].outputs[0].token_ids) == ids(llm, "hm")
    drive.abort("second")
    drive.add("third", "opted out", off)
    assert_same(drive.finish()["third"], alone)


def test_a_partial_prefill_leaves_no_trace(llm):
    """The sampler sees the end of a prompt's first chunk, where it would force; the next chunk is one token: just that one."""
    token_ids = torch.randint(0, 256, (CHUNK,), generator=torch.Generator().manual_seed(1)).tolist()
    [output] = generate(llm, [prompt_of([*token_ids, ids(llm, "h")[0]])], [params()])
    assert forced(output) == "FFF..FFF..FF"
    assert list(output.outputs[0].token_ids)[:3] == ids(llm, CLARIFICATION)


def test_a_seed_gives_the_same_however_its_prompt_is_cut(llm):
    """On a CPU, Model Runner V1 alone ends at a seeded prompt in chunks; the rows of others go on beside it, too."""
    generator = torch.Generator().manual_seed(2)
    prompts = [prompt_of(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in (3 * CHUNK, 2 * CHUNK + 9, 5)]
    free = {**TRACED, "entropix_clarification": "off"}
    asked = [params(seed=1, extra_args=free), params(seed=2, extra_args={"entropix": "off"}), params(seed=3, extra_args=free)]
    assert llm.reset_prefix_cache()
    cut = generate(llm, prompts, asked)
    whole = generate(llm, prompts, asked)  # all but their last blocks are in the prefix cache
    assert whole[0].num_cached_tokens > 2 * CHUNK
    assert [tokens.outputs[0].token_ids for tokens in cut] == [tokens.outputs[0].token_ids for tokens in whole]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_preemption_within_the_clarification(llm, steps):
    """All are preempted after 1, 2, 3 and 4 tokens, and resume in other slots."""
    drive = Driver(llm)
    prompts, asked = [prompt_of(range(5)), prompt_of(range(9, 12)), prompt_of([7])], [params(seed=i) for i in range(3)]
    undisturbed = generate(llm, prompts, asked)
    for name, (prompt, settings) in enumerate(zip(prompts, asked, strict=True)):
        drive.add(str(name), prompt, settings)
    drive.step(steps)
    assert llm.reset_prefix_cache(reset_running_requests=True)
    outputs = drive.finish()
    for name, other in enumerate(undisturbed):
        assert forced(outputs[str(name)]) == "FFF..FFF..FF"
        assert_same(outputs[str(name)], other)


def test_a_reordered_batch(llm):
    """Requests that end early make others take their rows; each has settings and cooldowns of its own."""
    asked = [
        params(seed=0, max_tokens=3),
        params(seed=1, extra_args={**TRACED, "entropix_temperature": 0.2}),
        params(seed=2, max_tokens=4, extra_args={**TRACED, "entropix_clarification": "off"}),
        params(seed=3, extra_args={**TRACED, "entropix_preset": "torch-2024-10", "entropix_clarification": "off"}),
        params(seed=4, max_tokens=5, extra_args={"entropix": "off"}),
        params(temperature=0.0),
    ]
    prompts = [prompt_of([30 + i] * (1 + i)) for i in range(len(asked))]
    together = generate(llm, prompts, asked)
    for output, prompt, settings in zip(together, prompts, asked, strict=True):
        [alone] = generate(llm, [prompt], [settings])
        assert_same(output, alone)


def test_an_abort_storm(llm):
    """Three times as many requests as there are slots, aborted at any moment; what goes on is as it would be alone."""
    rng, drive, table = random.Random(0), Driver(llm), adapter_of(llm).batch.sequences
    kept = {f"kept {i}": (prompt_of([40 + i] * (2 + i)), params(seed=i)) for i in range(3)}
    alone = {name: generate(llm, [prompt], [settings])[0] for name, (prompt, settings) in kept.items()}
    victims = [f"victim {i}" for i in range(24)]
    names = [*victims, *kept]
    rng.shuffle(names)
    for name in names:
        prompt, settings = kept.get(name) or (prompt_of([rng.randrange(256)] * rng.randint(1, 4)), params(max_tokens=100))
        drive.add(name, prompt, settings)
    while victims:
        drive.step(rng.randint(0, 2))
        count = min(len(victims), rng.randint(1, 5))
        drive.abort(*(victims.pop(rng.randrange(len(victims))) for _ in range(count)))
    outputs = drive.finish()
    for name, other in alone.items():
        assert_same(outputs[name], other)
    generate(llm, ["a"], [params(max_tokens=1)])  # the engine tells of the ended ones with the next step
    assert len(table) <= 1
    assert len(table._free) + len(table) == table.slots - 1
    assert len(scheduler_of(llm)._entropix_sent) <= 1


def test_a_prompt_that_holds_part_of_a_clarification(llm):
    """As in the next turn of a chat, read from the prefix cache: only what was forced in this answer is continued."""
    first = generate(llm, [prompt_of(range(100, 162))], [params(seed=1, max_tokens=2)])[0]
    turn = prompt_of([*range(100, 162), *first.outputs[0].token_ids])
    [fresh] = generate(llm, [turn], [params(max_tokens=5)])
    assert list(first.outputs[0].token_ids) == ids(llm, "hm")
    assert fresh.num_cached_tokens == 32
    assert list(fresh.outputs[0].token_ids)[:3] == ids(llm, CLARIFICATION)


def test_sleep_and_wake(llm):
    """After waking the cache may be elsewhere, and nothing of its old content counts."""
    prompts, asked = [prompt_of(range(40)), prompt_of(range(50, 60))], [params(seed=1), params(seed=2, max_tokens=8)]
    before = generate(llm, prompts, asked)
    llm.sleep(level=1)
    kept = worker_of(llm).model_runner.kv_caches  # where vLLM copies blocks
    for layer in adapter_of(llm).observer.layers.values():
        # What the CPU's worker leaves out: here sleeping frees nothing.
        asleep, layer.kv_cache = layer.kv_cache, torch.full_like(layer.kv_cache, 7.0)
        [index] = [index for index, cache in enumerate(kept) if cache.data_ptr() == asleep.data_ptr()]
        kept[index] = layer.kv_cache.as_strided(kept[index].size(), kept[index].stride())
    llm.wake_up()
    after = generate(llm, prompts, asked)
    assert [output.num_cached_tokens for output in after] == [0, 0]
    for output, other in zip(after, before, strict=True):
        assert_same(output, other)


def test_asynchronous_scheduling(llm, tiny, monkeypatch):
    """The next step is prepared before its tokens are known: on the host there are placeholders."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    prompts, asked = [prompt_of(range(5)), prompt_of(range(9, 12)), "abc"], [params(seed=i) for i in range(3)]
    # So many branches that no bound is met: which of them fork first doesn't matter. Each goes on with its parent's cooldown.
    forks = {"entropix_forks": 64, "entropix_fork_entropy": 0, "entropix_fork_select": "all"}
    forked = [prompts[0]], [params(seed=7, extra_args=forks)]
    synchronous = generate(llm, prompts, asked)
    [of_branches] = generate(llm, *forked)
    original = CpuPlatform.check_and_update_config

    def keep_it(vllm_config):
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    # The platform turns it off, because a CPU gains nothing by it.
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(keep_it))
    overlapping = engine(tiny, sampler="entropix", sampler_config=lost(cooldown=2), async_scheduling=True, block_size=32)
    assert isinstance(scheduler_of(overlapping), AsyncScheduler)
    outputs = generate(overlapping, prompts, asked)
    for output, other in zip(outputs, synchronous, strict=True):
        assert forced(output) == "FFF..FFF..FF"
        assert_same(output, other)
    # The token after a fork is under way when its branches begin.
    [overlapped] = generate(overlapping, *forked)
    found, expected = (
        sorted(list(completion.token_ids) for completion in output.outputs) for output in (overlapped, of_branches)
    )
    assert found == expected
    assert len(found) > 2


def test_the_thinking_budget_wins_over_the_clarification(tiny):
    """The budget ends in the middle of the clarification, which goes on afterwards."""
    llm = engine(
        tiny,
        sampler="entropix",
        sampler_config=lost(cooldown=1),
        reasoning_config={"reasoning_start_str": "<300>", "reasoning_end_str": "<301>"},
    )
    [output] = generate(llm, ["a<300>"], [params(seed=1, max_tokens=8, thinking_token_budget=5)])
    [h, m, mark], [end] = ids(llm, CLARIFICATION), ids(llm, "<301>")
    drawn = list(output.outputs[0].token_ids)
    assert drawn == [h, m, mark, drawn[3], h, end, m, mark]


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_scores_in_every_mode(tiny, mode):
    """The prompt's tokens have the model's own, drawn ones have what the mode says, and asking changes no token."""
    from transformers import AutoModelForCausalLM

    llm = engine(tiny, sampler="entropix", logprobs_mode=mode, max_logprobs=512)
    token_ids = [5, 80, 200, 33, 7]
    asked = [params(seed=1, max_tokens=4, logprobs=512, prompt_logprobs=512), params(seed=1, max_tokens=4)]
    [scored, plain] = generate(llm, [prompt_of(token_ids)] * 2, asked)
    assert_same(scored, plain)
    completion = scored.outputs[0]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[*token_ids, *completion.token_ids]])).logits[0, :-1]
    own = logits if mode.endswith("logits") else logits.log_softmax(-1)

    def dense(position):
        row = torch.full((512,), -torch.inf)
        for token, score in position.items():
            row[token] = score.logprob
        return row

    prompt_scores = torch.stack([dense(position) for position in scored.prompt_logprobs[1:]])
    torch.testing.assert_close(prompt_scores, own[: len(token_ids) - 1], atol=2e-3, rtol=1e-4)
    drawn = torch.stack([dense(position) for position in completion.logprobs])
    if mode.startswith("raw"):
        torch.testing.assert_close(drawn, own[len(token_ids) - 1 :], atol=2e-3, rtol=1e-4)
    else:  # log-probabilities of what is drawn from, whatever they are called
        kept = (drawn > -torch.inf).sum(-1).tolist()
        assert all(0 < count <= record.top_k for count, record in zip(kept, traces(scored)[0], strict=True))
        torch.testing.assert_close(drawn.exp().sum(-1), torch.ones(4), atol=1e-4, rtol=0)


def lora_adapter(folder, rank=4):
    """An adapter of the query and key projections of the tiny model, and the same change as weights."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.parent)
    generator = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    for layer in range(config.num_hidden_layers):
        for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            down = torch.randn(rank, config.hidden_size, generator=generator) * 0.5
            up = torch.randn(heads * config.head_dim, rank, generator=generator) * 0.5
            module = f"model.layers.{layer}.self_attn.{name}"
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            changes[f"{module}.weight"] = up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": ["q_proj", "k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return changes


def test_lora(tmp_path):
    """A row with an adapter and one without, in a batch: each has the statistics of its own model."""
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    from tests.support.models import tiny_llama

    base = tiny_llama(tmp_path)
    changes = lora_adapter(tmp_path / "adapter")
    llm = engine(
        base,
        sampler="entropix",
        sampler_config={"attention": {"layers": "all"}, "forks": {"floor": 0, "inside_words": True}},
        enable_lora=True,
        max_lora_rank=8,
        # On a CPU vLLM gives rows without an adapter the one in the last place, in a batch with others: leave that empty.
        max_loras=2,
    )
    request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    drive, token_ids = Driver(llm), list(range(20, 50))
    for name, more in (("plain", {}), ("adapted", {"lora_request": request}), ("plain again", {})):
        drive.add(name, prompt_of(token_ids), params(temperature=0.0, max_tokens=4), **more)
    outputs = drive.finish()
    assert_same(outputs["plain"], outputs["plain again"])
    for name, change in (("plain", {}), ("adapted", changes)):
        dense = Dense(base)
        with torch.no_grad():
            for weight, delta in change.items():
                dense.model.get_parameter(weight).add_(delta)
        [trace] = traces(outputs[name])
        wanted = dense.run([*token_ids, *outputs[name].outputs[0].token_ids])
        for index, record in enumerate(trace):
            for metric, values in wanted.items():
                expected = values[:, len(token_ids) - 1 + index].mean().item()
                assert getattr(record, metric) == pytest.approx(expected, abs=1e-4), (name, metric)
    assert outputs["plain"].outputs[0].token_ids != outputs["adapted"].outputs[0].token_ids

    # Branches have the adapter of their answer.
    forks = {"entropix_forks": 4, "entropix_fork_entropy": 0, "entropix_fork_select": "all"}
    asked = params(temperature=0.0, max_tokens=12, output_kind=RequestOutputKind.FINAL_ONLY, extra_args=forks)
    drive.add("forked", prompt_of(token_ids), asked, lora_request=request)
    branches = drive.finish()["forked"].outputs
    assert len(branches) > 2
    for completion in branches:
        shared = [*token_ids, *completion.token_ids[: completion.entropix_forks.chosen.position + 1]]
        left = len(token_ids) + 12 - len(shared)
        if left:
            drive.add(
                f"fresh {completion.index}", prompt_of(shared), params(temperature=0.0, max_tokens=left), lora_request=request
            )
    for name, output in drive.finish().items():
        if name.startswith("fresh"):
            tokens = list(output.outputs[0].token_ids)
            assert list(branches[int(name.split()[1])].token_ids)[-len(tokens) :] == tokens
