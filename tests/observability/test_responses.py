"""Saved HTTP responses, read as traces."""

import json

import pytest
from typer.testing import CliRunner

from tests.support.traces import entry
from vllm_entropix.cli.main import app
from vllm_entropix.observability.tracefile import TraceFileError, read_traces

PIECES = ["It", " is", " 4"]
ENTRIES = [entry(10 + place, 2.0, 1.0).model_dump() for place in range(len(PIECES))]


def trace(entries=ENTRIES, **more):
    return {"version": 1, "tokens": entries, "not_kept": 0, **more}


def completion(*choices, **more):
    body = {"id": "cmpl-1", "object": "text_completion", "created": 1767323045, "model": "demo", "choices": list(choices)}
    return {**body, "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}, **more}


def choice(**changed):
    return {"index": 0, "text": "".join(PIECES), "logprobs": None, "finish_reason": "stop", "entropix": trace(), **changed}


def read(tmp_path, text):
    path = tmp_path / "answer.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return list(read_traces(path))


@pytest.mark.parametrize("indent", [None, 2], ids=["a line", "indented"])
def test_a_completion(tmp_path, indent):
    second = choice(index=1, finish_reason="length", entropix=trace(not_kept=5), logprobs={"tokens": ["the prompt", *PIECES]})
    lines = read(tmp_path, json.dumps(completion(choice(), second), indent=indent))
    assert [(line.request_id, line.index, line.model, line.prompt_tokens) for line in lines] == [
        ("cmpl-1", 0, "demo", 7),
        ("cmpl-1", 1, "demo", 7),
    ]
    assert lines[0].created == "2026-01-02T03:04:05.000+00:00"
    assert [line.finish_reason for line in lines] == ["stop", "length"]
    assert [line.not_kept for line in lines] == [0, 5]
    for line in lines:
        assert line.token_ids == [10, 11, 12]
        assert [record.model_dump() for record in line.records] == ENTRIES
        assert (line.sampler, line.prompt_hash) == (None, None)
    assert lines[0].texts == ["", "", "It is 4"], "without logprobs nobody knows whose the text is"
    assert lines[1].texts == PIECES


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("min_p", {"name": "min_p"}),
        ("vllm", {"name": "vllm"}),
        ("dry;min_p", {"name": "chain", "samplers": "dry;min_p"}),
        ("", {"name": "chain", "samplers": ""}),
        ("entropix", {"name": "entropix", "preset": None, "fidelity": None, "thresholds": None}),
    ],
)
def test_the_sampler_is_read(tmp_path, name, told):
    [line] = read(tmp_path, completion(choice(entropix=trace(sampler=name))))
    assert line.sampler.model_dump() == told
    assert line.drawn_by == name
    part = completion({"index": 0, "text": "", "finish_reason": None, "entropix": trace(ENTRIES[:1], sampler=name)}, usage=None)
    [streamed] = read(tmp_path, chunks([part, part]))
    assert streamed.drawn_by == name


def test_a_chat_answer(tmp_path):
    message = {"role": "assistant", "content": " 4", "reasoning": "It is", "tool_calls": []}
    content = [{"token": piece, "logprob": -1.0, "bytes": None, "top_logprobs": []} for piece in PIECES]
    chosen = {"index": 0, "message": message, "finish_reason": "stop", "entropix": trace()}
    [line] = read(tmp_path, completion({**chosen, "logprobs": {"content": content}}, id="chatcmpl-2"))
    assert line.texts == PIECES
    [line] = read(tmp_path, completion({**chosen, "logprobs": None}, id="chatcmpl-2"))
    assert line.texts == ["", "", "It is 4"]


def chunks(made, ended="data: [DONE]\n\n"):
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in made) + ended


@pytest.mark.parametrize("ended", ["data: [DONE]\n\n", ""], ids=["whole", "cut"])
def test_a_stream(tmp_path, ended):
    made = []
    for place, piece in enumerate(PIECES):
        for index in range(2):  # one after the other, as servers send the choices of n > 1
            part = trace([{**ENTRIES[place], "token_id": 100 * index + place}])
            made.append(completion({"index": index, "text": piece, "finish_reason": None, "entropix": part}, usage=None))
    late = {"index": 1, "text": "!", "finish_reason": "length", "entropix": trace([], not_kept=2)}
    made += [completion(late, usage=None), completion()]
    lines = read(tmp_path, ": a comment\n" + chunks(made, ended))
    assert [line.token_ids for line in lines] == [[0, 1, 2], [100, 101, 102]]
    assert [line.texts for line in lines] == [PIECES, ["It", " is", " 4!"]]
    assert (lines[1].finish_reason, lines[1].not_kept, lines[1].prompt_tokens) == ("length", 2, 7)


def test_a_stream_of_a_chat(tmp_path):
    first = completion({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}, usage=None)
    both = {"index": 0, "delta": {"content": "It is"}, "finish_reason": None, "entropix": trace(ENTRIES[:2])}
    last = {"index": 0, "delta": {"content": " 4"}, "finish_reason": "stop", "entropix": trace(ENTRIES[2:])}
    made = [first, completion(both, usage=None), completion(last, usage=None)]
    [line] = read(tmp_path, chunks(made))
    assert line.texts == ["", "It is", " 4"]
    assert line.finish_reason == "stop"


def test_answers_without_choices(tmp_path):
    """Answers of /v1/responses and /v1/messages, whole and streamed."""
    usage = {"input_tokens": 7, "output_tokens": 3}
    parts = [{"type": "reasoning", "content": [{"text": "It is"}]}, {"type": "message", "content": [{"text": " 4"}]}]
    response = {"id": "resp_1", "created_at": 1767323045.0, "model": "demo", "output": parts, "status": "completed"}
    message = {"id": "msg_1", "type": "message", "content": [{"type": "text", "text": "It is 4"}], "stop_reason": "end_turn"}
    for body, name, ended in ((response, "resp_1", "completed"), (message, "msg_1", "end_turn")):
        [line] = read(tmp_path, {**body, "usage": usage, "entropix": trace()})
        assert (line.request_id, line.texts, line.finish_reason) == (name, ["", "", "It is 4"], ended)
        assert (line.prompt_tokens, line.token_ids) == (7, [10, 11, 12])
    events = [{"type": "response.created", "response": response}]
    events += [
        {"type": "response.output_text.delta", "delta": piece, "entropix": trace([entry])}
        for piece, entry in zip(PIECES, ENTRIES, strict=True)
    ]
    events.append({"type": "response.completed", "response": response, "entropix": trace([])})
    [line] = read(tmp_path, "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events))
    assert (line.texts, line.token_ids) == (PIECES, [10, 11, 12])
    events = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}, "entropix": trace([entry])}
        for piece, entry in zip(PIECES, ENTRIES, strict=True)
    ]
    events.append({"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": usage, "entropix": trace([])})
    [line] = read(tmp_path, "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events))
    assert (line.texts, line.finish_reason, line.prompt_tokens) == (PIECES, "max_tokens", 7)


def test_many_responses(tmp_path):
    """Answers of a batch run, of tools that write a line each, and in a list."""
    batch = {"id": "vllm-1", "custom_id": "a", "response": {"status_code": 200, "body": completion(choice())}, "error": None}
    text = "\n".join(
        map(json.dumps, (batch, completion(choice()), [completion(choice(), id="x"), completion(choice(), id="y")]))
    )
    assert [line.request_id for line in read(tmp_path, text)] == ["cmpl-1", "cmpl-1", "x", "y"]
    assert len(read(tmp_path, json.dumps([completion(choice())] * 3, indent=1))) == 3


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (completion(choice(entropix=None)), "a response without a trace; ask for it with vllm_xargs entropix_trace"),
        (completion(), "a response without a trace"),
        ({"error": {"message": "no"}}, "request_id: Field required"),
        ({"choices": [3]}, "choices: not objects"),
        (completion(choice(entropix={"tokens": [{"token_id": 1}]})), r"tokens\.0\.entropy: Field required"),
        (completion(choice(entropix="[/red]")), "valid dictionary"),
        (completion(choice(entropix=trace([{**ENTRIES[0], "token_id": -1}]))), r"token_id: .*greater than or equal to 0"),
        ({"response": {"body": None}}, "request_id: Field required"),
    ],
)
def test_what_has_no_trace_is_told(tmp_path, caplog, body, told):
    with pytest.raises(TraceFileError, match=rf"line 1: not a trace: .*{told}"):
        read(tmp_path, body)
    assert [line.request_id for line in read(tmp_path, json.dumps(body) + "\n" + json.dumps(completion(choice())))] == [
        "cmpl-1"
    ]
    assert "line 1 isn't a trace" in caplog.text


def test_odd_fields_of_a_response_are_passed_over(tmp_path):
    odd = completion(choice(index="0", logprobs=[1], finish_reason=None), created="now", usage=[3], model=None, id=None)
    [line] = read(tmp_path, odd)
    assert (line.created, line.prompt_tokens, line.index, line.model, line.request_id) == ("", 0, 0, None, "None")


@pytest.mark.parametrize("command", ["report", "export", "whatif"])
def test_the_commands_read_a_saved_answer_from_standard_input(tmp_path, command):
    table, page = str(tmp_path / "table.csv"), str(tmp_path / "page.html")
    arguments = {"report": ["-o", page], "export": ["-o", table], "whatif": ["--preset", "torch-2024-10"]}[command]
    ended = CliRunner().invoke(app, [command, "-", *arguments], input=json.dumps(completion(choice())))
    assert ended.exit_code == 0, ended.output
