"""Settings that stand where nobody reads them, without a server."""

import pytest

from vllm_entropix.engine.placement import misplaced, refusal

XARGS = "vllm_xargs"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"vllm_xargs": {"entropix_trace": 1}}, None),
        ({"entropix_trace": 1}, "entropix_trace"),
        ({"entropix": {"trace": 1}}, "entropix"),
        ({"entropix.trace": 1}, "entropix.trace"),
        ({"Entropix-Trace": 1}, "Entropix-Trace"),
        ({"metadata": {"entropix_trace": "1"}}, "metadata.entropix_trace"),
        ({"extra_body": {"vllm_xargs": {"entropix_trace": 1}}}, "extra_body.vllm_xargs.entropix_trace"),
        ({"vllm_xargs": {"other": {"entropix_trace": 1}}}, None),  # a value of another plugin's
        ({"stream_options": {"entropix_trace": 1}}, "stream_options.entropix_trace"),
        # A user's own words.
        ({"messages": [{"role": "user", "content": "entropix", "entropix_trace": 1}]}, None),
        ({"response_format": {"json_schema": {"schema": {"properties": {"entropix_trace": {}}}}}}, None),
        ({"tools": [{"function": {"parameters": {"properties": {"entropix": {}}}}}]}, None),
    ],
)
def test_what_nobody_reads_is_found(body, found):
    assert misplaced(body, XARGS) == found


def test_another_place_and_none():
    assert misplaced({"sampling_params": {"extra_args": {"entropix": "off"}}}, "sampling_params.extra_args") is None
    assert misplaced({"sampling_params": {"entropix": "off"}}, "sampling_params.extra_args") == "sampling_params.entropix"
    assert misplaced({"vllm_xargs": {"entropix": "off"}}, None) == "vllm_xargs.entropix"


def test_depth_ends_the_search():
    body = {}
    for _ in range(10_000):
        body = {"a": body}
    assert misplaced(body, XARGS) is None


def test_the_refusal_is_short_and_names_the_place():
    assert refusal("metadata.entropix_trace", XARGS).endswith("go into vllm_xargs")
    assert len(refusal("entropix" + "x" * 10_000, XARGS)) < 250
    assert "takes no settings" in refusal("vllm_xargs.entropix", None)
