"""Statistics for every way the CPU backend packs keys, and for every choice of layers."""

import math

import pytest
import torch

from tests.support.dense import METRICS, Dense, assert_equal_to_dense, observed, params, prompt
from tests.support.engine import adapter_of, close_engine, engine, generate
from tests.support.models import tiny_llama, tiny_model
from vllm_entropix.attention import UnsupportedAttentionError

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


@pytest.fixture(scope="module")
def dense(tiny):
    return Dense(tiny)


def test_head_size_that_is_no_multiple_of_32(tmp_path):
    # The CPU backend packs such heads for the instruction set vec16.
    folder = tiny_llama(tmp_path, head_dim=80)
    llm = engine(folder, sampler="entropix", sampler_config={"attention": {"layers": "all"}}, block_size=32)
    assert {layer.isa for layer in adapter_of(llm).observer.layers.values()} == {"vec16"}
    outputs, per_layer = observed(llm, [prompt(40, 1), prompt(70, 2)], max_tokens=8)
    assert assert_equal_to_dense(outputs, per_layer, Dense(folder)) == 2 * 8


WINDOW = 24


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Mistral", {"sliding_window": WINDOW}),
        # One layer with a window and one without, scores capped, scaled by another number than the head size.
        (
            "Gemma2",
            {
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 24,
                "attn_logit_softcapping": 5.0,
                "tie_word_embeddings": True,
            },
        ),
    ],
)
def test_windows_and_capped_scores(tmp_path, family, config):
    folder = tiny_model(tmp_path, family, **config)
    llm = engine(folder, sampler="entropix", sampler_config={"attention": {"layers": "all"}}, block_size=32)
    outputs, per_layer = observed(llm, [prompt(70, 1), prompt(11, 2)], max_tokens=30)
    dense = Dense(folder)
    assert assert_equal_to_dense(outputs, per_layer, dense) == 2 * 30
    # What lies outside the window was really left out.
    scores_seen = dense.run(outputs[0].prompt_token_ids)["attention_entropy"][0, -1]
    assert scores_seen < math.log2(WINDOW)


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX, for which bf16 keys are packed")
def test_keys_packed_for_amx(tiny, dense):
    llm = engine(tiny, sampler="entropix", sampler_config={"attention": {"layers": "all"}}, dtype="bfloat16", block_size=32)
    assert {layer.isa for layer in adapter_of(llm).observer.layers.values()} == {"amx"}
    outputs, per_layer = observed(llm, [prompt(40, 1), prompt(70, 2)], max_tokens=8)
    # In bf16 the model's own scores are off by percents; keys read in a wrong order are off by everything.
    dense_scores, paged = [], []
    for ids, lengths, found in per_layer:
        for row, length in enumerate(lengths.tolist()):
            output = next(o for o in outputs if ids[row].startswith(o.request_id + "-"))
            tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            dense_scores.append(dense.run(tokens)["interaction_strength"][:, length - 1])
            paged.append(found.interaction_strength[:, row])
    torch.testing.assert_close(torch.stack(paged)[:, 0], torch.stack(dense_scores)[:, 0], rtol=0.03, atol=0.03)


def test_listed_and_last_layers(tiny, dense):
    for layers, expected in (("last", [1]), ([0], [0]), ("all", [0, 1])):
        llm = engine(tiny, sampler="entropix", sampler_config={"attention": {"layers": layers}}, block_size=32)
        [output] = generate(llm, [{"prompt_token_ids": prompt(40, 3)}], [params(max_tokens=1)])
        [record] = output.outputs[0].entropix_trace
        want = dense.run(output.prompt_token_ids)
        for metric in METRICS:
            assert getattr(record, metric) == pytest.approx(want[metric][expected, -1].mean().item(), abs=1e-5)


def test_what_attends_to_less_than_its_window_leaves_the_logits(tiny, monkeypatch):
    from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend

    from vllm_entropix.engine import adapter

    said = []
    monkeypatch.setattr(adapter.logger, "warning_once", lambda message, *args: said.append(message % args))
    llm = engine(tiny, sampler="entropix", sampler_config={"attention": {"layers": "all"}}, block_size=32)
    ours = adapter_of(llm)
    # What no model for a CPU has: the engine's own description of its layers is changed.
    [[group]] = ours.runner.attn_groups
    with monkeypatch.context() as changed:
        changed.setattr(group, "backend", create_fast_prefill_custom_backend("FastPrefill", group.backend))
        ours.observe()
    assert ours.observer is None
    with monkeypatch.context() as changed:
        changed.setattr(ours.vllm_config.model_config.model_arch_config, "rswa_window", 16)
        ours.observe()
    assert ours.observer is None
    ours.observe()
    assert len(ours.observer.layers) == 2
    [chosen_by_itself, sliding] = said
    assert "FastPrefillCPUAttentionBackend chooses by itself what CPU_ATTN attends to" in chosen_by_itself
    assert "R-SWA" in sliding


def test_a_cache_that_cannot_be_read_leaves_the_logits(tiny, monkeypatch):
    from vllm_entropix.engine import adapter

    # Such caches (MLA, packed fp8) need hardware that isn't everywhere; only the reader's refusal is made up here.
    def refuse(layer):
        raise UnsupportedAttentionError("its keys are packed")

    monkeypatch.setattr("vllm_entropix.attention.observer.key_reader", refuse)
    said = []
    monkeypatch.setattr(adapter.logger, "warning_once", lambda message, *args: said.append(message % args))
    llm = engine(tiny, sampler="entropix", fresh=True)
    outputs = [generate(llm, ["logits alone"], [params(max_tokens=4)])[0] for _ in range(2)]
    assert said == ["entropix runs on the logits alone: its keys are packed."]
    for record in (record for output in outputs for record in output.outputs[0].entropix_trace):
        assert record.entropy is not None
        assert [getattr(record, metric) for metric in METRICS] == [None] * 4
    close_engine()
