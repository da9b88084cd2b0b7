"""Attention statistics computed densely by transformers, to compare those from the paged cache with."""

import sys

import torch

from tests.support.engine import adapter_of, generate
from vllm_entropix import EntropixConfig
from vllm_entropix.sampling import AttentionStatistics

METRICS = ("attention_entropy", "attention_varentropy", "agreement", "interaction_strength")
TRACED = {"entropix_trace": "on"}


class Dense:
    """Scores of every layer before the softmax, from transformers' own projections and rotations."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.scores = []

    @torch.inference_mode()
    def run(self, token_ids):
        """Statistics at every position of a sequence: metric → [layers, positions]."""
        source = sys.modules[type(self.model).__module__]  # its own copy of the attention function
        captured, original = [], source.eager_attention_forward

        def eager(module, query, key, value, mask, *, scaling=None, softcap=None, sliding_window=None, **kwargs):
            repeated = source.repeat_kv(key, module.num_key_value_groups)
            scores = torch.matmul(query, repeated.transpose(2, 3)) * (module.scaling if scaling is None else scaling)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            captured.append((scores[0].transpose(0, 1), sliding_window))
            if softcap:
                kwargs["softcap"] = softcap
            return original(module, query, key, value, mask, scaling=scaling, sliding_window=sliding_window, **kwargs)

        interface = source.ALL_ATTENTION_FUNCTIONS
        before = interface._global_mapping.get("eager")
        interface._global_mapping["eager"] = eager
        source.eager_attention_forward = eager
        try:
            self.model.base_model(torch.tensor([token_ids]))  # nobody looks at the logits, of a large vocabulary a gigabyte
        finally:
            source.eager_attention_forward = original
            if before is None:
                interface._global_mapping.pop("eager", None)
            else:
                interface._global_mapping["eager"] = before
        assert len(captured) == self.model.config.num_hidden_layers
        layers = [statistics_of_positions(*layer) for layer in captured]
        return {metric: torch.stack([getattr(layer, metric) for layer in layers]) for metric in METRICS}


def statistics_of_positions(scores, window):
    """Statistics at every position from causal ``scores [positions, heads, positions]`` of a layer, seen through its window."""
    positions = len(scores)
    lengths = torch.arange(1, positions + 1)
    if window is not None:
        # Everything to the left of the window falls out: what is in it moves to the front.
        shifted = [row.roll(-max(0, end - window), dims=-1) for end, row in enumerate(scores, 1)]
        scores, lengths = torch.stack(shifted), lengths.clamp_max(window)
    return AttentionStatistics.from_scores(scores.contiguous(), lengths, EntropixConfig())


def params(**parameters):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, ignore_eos=True, extra_args=TRACED, **parameters)


def observed(llm, prompts, **parameters):
    """Run prompts greedily; the outputs, and (request ids, lengths, statistics per layer) of each step."""
    adapter = adapter_of(llm)
    per_layer = []
    original = adapter.observer.statistics_per_layer

    def spy(requests, positions, wanted):
        found = original(requests, positions, wanted)
        ids = batch or adapter.runner.input_batch.req_ids
        measured = AttentionStatistics(*(getattr(found, metric)[:, wanted] for metric in METRICS))
        per_layer.append(([ids[i] for i in requests[wanted].tolist()], positions[wanted] + 1, measured))
        return found

    def note_batch():
        # Model Runner V2 gives its sampler the batch without request ids.
        state = adapter.runner.execute_model_state
        if hasattr(state, "input_batch"):
            batch[:] = state.input_batch.req_ids
        after_forward()

    batch = []
    after_forward = adapter.after_forward
    adapter.after_forward = note_batch
    adapter.observer.statistics_per_layer = spy
    try:
        outputs = generate(llm, [{"prompt_token_ids": p} for p in prompts], [params(**parameters)] * len(prompts))
    finally:
        adapter.observer.statistics_per_layer = original
        adapter.after_forward = after_forward
    return outputs, per_layer


def of_kept_tokens(outputs, per_layer):
    """What :func:`observed` saw, without rows of drafts: there is one row for each token of an answer.

    The row of a rejected draft stands for a token that the answer doesn't have. Its place runs again: the last row of a place
    is the one that the answer's token was drawn from. No token was drawn from a row at the answer's end or behind it.
    """
    ends = {output.request_id: len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in outputs}
    seen, kept = set(), []
    for ids, lengths, found in reversed(per_layer):
        places = list(zip(map(_request_of, ids), lengths.tolist(), strict=True))
        rows = [row for row, (request, length) in enumerate(places) if length < ends[request] and places[row] not in seen]
        seen.update(places)
        measured = AttentionStatistics(*(getattr(found, metric)[:, rows] for metric in METRICS))
        kept.append(([ids[row] for row in rows], lengths[rows], measured))
    return kept[::-1]


def _request_of(internal):
    """The request's id as outputs have it: the engine adds a part of its own."""
    return internal.rpartition("-")[0] or internal


def _beside_dense(outputs, per_layer, dense):
    """(metric, what was observed, what is right) of every observed row of every request, all layers."""
    sequences = {}
    for output in outputs:
        sequences[output.request_id] = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    expected = {request: dense.run(tokens) for request, tokens in sequences.items()}
    for ids, lengths, found in per_layer:
        for row, (internal, length) in enumerate(zip(ids, lengths.tolist(), strict=True)):
            request = _request_of(internal)
            for metric in METRICS:
                yield metric, getattr(found, metric)[:, row], expected[request][metric][:, length - 1]


def assert_equal_to_dense(outputs, per_layer, dense, tolerance=1e-5):
    """Every observed row of every request, all layers; returns how many."""
    values = 0
    for metric, got, want in _beside_dense(outputs, per_layer, dense):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, msg=lambda m, metric=metric: f"{metric}: {m}")
        values += 1
    return values // len(METRICS)


def errors_to_dense(outputs, per_layer, dense):
    """:func:`relative_errors` of each metric, ``[rows, layers]``: of every row that :func:`observed` saw."""
    errors = {metric: [] for metric in METRICS}
    for metric, got, want in _beside_dense(outputs, per_layer, dense):
        errors[metric].append(relative_errors(got, want))
    return {metric: torch.stack(values) for metric, values in errors.items()}


def relative_errors(got, want):
    """``|got - want| / (1 + |want|)``, float64."""
    got, want = got.double(), want.double()
    return (got - want).abs() / (1 + want.abs())


def quantiles(errors):
    """The median, 97 % and the largest; NaN is an error without bound."""
    return errors.flatten().nan_to_num(torch.inf).quantile(torch.tensor([0.5, 0.97, 1.0], dtype=errors.dtype)).tolist()


def assert_within(errors, bars, name):
    """Hold the quantiles of ``errors`` to the bars.

    A rounding error is small in nearly all rows and large in few; statistics of a wrong row are wrong in most.
    """
    found = quantiles(errors)
    assert all(one <= bar for one, bar in zip(found, bars, strict=True)), f"{name}: {found}, the bars are {bars}"


def prompt(length, seed):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
