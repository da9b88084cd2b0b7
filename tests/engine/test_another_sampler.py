"""An engine whose sampler is another package's, with rows of other samplers beside it."""

import json
import math

import pytest

from tests.support.engine import close_engine
from tests.support.example import installed_example
from tests.support.server import generate_in_process

pytestmark = pytest.mark.engine

SAMPLED = {"max_tokens": 16, "ignore_eos": True, "seed": 3}


def asked(**extra_args):
    return {**SAMPLED, "extra_args": {"entropix_trace": "on", **extra_args}}


OPTED_OUT = ["abc", {**SAMPLED, "temperature": 0.8, "top_k": 20}]
REQUESTS = [
    ["The quick brown fox", asked()],
    ["0123456789", asked(narrowing_per_bit=1)],
    ["a", {**asked(samplers="min_p"), "min_p": 0.3}],
    ["b", asked(samplers="entropix")],
    [OPTED_OUT[0], {**OPTED_OUT[1], "extra_args": {"entropix": "off"}}],
    ["c", {**asked(), "temperature": 0.0}],
]


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """Results of the requests, and the lines of the file of traces by sampler."""
    close_engine()
    folder = tmp_path_factory.mktemp("example")
    path = folder / "traces.jsonl"
    config = {"narrowing": {"most": 12}, "trace": {"alternatives": 20, "path": str(path)}}
    arguments = {"sampler": "narrowing", "sampler_config": config, "disable_log_stats": False}
    results = generate_in_process(tiny, arguments, REQUESTS, PYTHONPATH=installed_example(folder))
    [written] = folder.glob("traces*.jsonl")
    return results, [json.loads(line) for line in written.read_text().splitlines()]


def test_its_tokens_are_those_that_it_allows(served):
    for result, per_bit in zip(served[0][:2], (2, 1), strict=True):
        widths = set()
        for token, record in zip(result["token_ids"], result["trace"], strict=True):
            allowed = min(12, 1 + math.floor(per_bit * record["entropy"] + 0.3))
            assert record["candidates"] == record["top_k"] == allowed
            assert token in [candidate for candidate, _ in record["alternatives"][:allowed]]
            assert record["regime"] is record["confidence"] is None
            widths.add(allowed)
        assert len(widths) > 2


def test_rows_of_other_samplers_stand_beside_it(served):
    _, _, min_p, entropix, opted_out, greedy = served[0]
    for token, record in zip(min_p["token_ids"], min_p["trace"], strict=True):
        probability = dict(map(tuple, record["alternatives"]))
        assert probability[token] >= 0.3 * max(probability.values()) * (1 - 1e-5)
        assert record["min_p"] == pytest.approx(0.3)
        assert record["regime"] is record["candidates"] is None
    assert {record["regime"] for record in entropix["trace"]} <= {"LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE"}
    assert {record["candidates"] for record in entropix["trace"]} == {None}
    assert opted_out["trace"] is None
    assert [record["alternatives"][0][0] for record in greedy["trace"]] == greedy["token_ids"]


def test_rows_that_opt_out_are_vllms_own(served, tiny):
    [plain] = generate_in_process(tiny, {}, [OPTED_OUT], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert served[0][4]["token_ids"] == plain["token_ids"]


def test_lines_tell_the_sampler_of_each(served):
    told = {tuple(line["token_ids"]): line["sampler"] for line in served[1]}
    expected = [{"name": "narrowing", "per_bit": 2, "most": 12}, {"name": "narrowing", "per_bit": 1, "most": 12}]
    assert [told[tuple(result["token_ids"])] for result in served[0][:2]] == expected
    assert told[tuple(served[0][2]["token_ids"])] == {"name": "min_p", "min_p": 0.05}
    part = told[tuple(served[0][3]["token_ids"])]
    assert (part["name"], part["preset"]) == ("entropix", "jax-2024-10")
    assert len(told) == 5
