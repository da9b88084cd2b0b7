"""What reads traces agrees with the engine that made them."""

import pandas as pd
import pytest

from tests.support.engine import engine, generate
from vllm_entropix.observability.export import columns, to_pandas
from vllm_entropix.observability.report import Source, report
from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.observability.whatif import transitions
from vllm_entropix.records.line import TraceLine, write_traces
from vllm_entropix.records.trace import TokenRecord
from vllm_entropix.samplers.entropix.record import EntropixPart
from vllm_entropix.samplers.entropix.settings import EntropixConfig

pytestmark = pytest.mark.engine

PROMPTS = ["The quick brown fox", "0123456789" * 8, "a"]


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory):
    """Outputs of an engine, two sequences each, and a file of their traces."""
    from vllm import SamplingParams

    llm = engine(tiny, sampler="entropix")
    params = SamplingParams(max_tokens=24, n=2, seed=5, ignore_eos=True, extra_args={"entropix_trace": "on"})
    outputs = generate(llm, PROMPTS, [params] * len(PROMPTS))
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for output in outputs:
            write_traces(
                file,
                (
                    TraceLine.from_completion(
                        request_id=output.request_id,
                        prompt_token_ids=output.prompt_token_ids,
                        completion=completion,
                        trace=completion.entropix_trace,
                        sampler=EntropixPart.from_config(EntropixConfig()),
                        tokenizer=llm.get_tokenizer(),
                    )
                    for completion in output.outputs
                ),
            )
    return outputs, path


def test_a_line_says_what_was_generated(traced):
    outputs, path = traced
    lines = list(read_traces(path))
    completions = [completion for output in outputs for completion in output.outputs]
    assert [line.token_ids for line in lines] == [list(completion.token_ids) for completion in completions]
    for line, completion in zip(lines, completions, strict=True):
        # vLLM leaves out a last character of which it has only some bytes.
        assert "".join(line.texts).rstrip("\ufffd") == completion.text.rstrip("\ufffd")
        assert [TokenRecord(**_record(entry)) for entry in line.records] == list(completion.entropix_trace)
        assert {token for entry in line.records for token, _ in entry.alternatives} == set(line.alternative_texts)


def _record(entry):
    values = entry.model_dump(exclude={"token_id"})
    return values | {"alternatives": tuple(tuple(pair) for pair in entry.alternatives)}


def test_the_rule_gives_the_engines_regimes_again(traced):
    _, path = traced
    found = transitions(read_traces(path), EntropixConfig())
    assert found.tokens == 2 * 24 * len(PROMPTS)
    assert found.changed == 0
    assert sum(count > 0 for count in found.before.values()) >= 2, "one regime alone would agree with anything"


def test_tables_of_outputs_and_of_the_file_are_the_same(traced):
    outputs, path = traced
    of_file, of_outputs = to_pandas(path), to_pandas(outputs)
    unknown = ["model", "sampler", "preset", "fidelity", "prompt_hash", "text"]
    pd.testing.assert_frame_equal(of_outputs.drop(columns=unknown), of_file.drop(columns=unknown))
    assert of_outputs[unknown].isna().all().all()
    assert tuple(of_file.columns) == columns()


def test_they_can_be_reported(traced):
    _, path = traced
    assert "deflate" in report([Source(path.name, read_traces(path))])
