"""Files of traces: what is written is read, and what isn't a trace is named by file and line."""

import hashlib
import struct

import pytest

from tests.support.traces import line, written
from vllm_entropix.observability.tracefile import TraceFileError, prompt_hash, read_traces


def test_what_is_written_is_read(tmp_path):
    lines = [line(["a", "\n", "</script>", "\u202e", "é"], forced=[1], not_kept=1), line(["\x1b[2J"], name="b", index=2)]
    path = written(tmp_path / "traces.jsonl", *lines)
    assert path.read_text(encoding="utf-8").count("\n") == 2
    read = list(read_traces(path))
    assert read == lines
    assert len(read[0].records) == len(read[0].token_ids) - read[0].not_kept


def test_a_prompt_is_known_by_its_hash_only():
    ids = [5, 70_000, 2**40]
    assert prompt_hash(ids) == hashlib.sha256(struct.pack("<3q", *ids)).hexdigest()
    assert "prompt_token_ids" not in line(["a"]).model_dump()


def test_progress_is_told_in_bytes(tmp_path):
    path = written(tmp_path / "traces.jsonl", line(["a"]), line(["b"]))
    told = []
    assert len(list(read_traces(path, told.append))) == 2
    assert told == sorted(told)
    assert told[-1] == path.stat().st_size


def test_what_is_wrong_is_named_by_file_and_line(tmp_path):
    path = written(tmp_path / "traces.jsonl", line(["a"]), line(["b"]))
    good = path.read_text().splitlines()
    for bad, told in (
        ("no json", "not a trace: Invalid JSON"),
        ('{"version": 1}', "request_id: Field required"),
        (good[1].replace('"version":1', '"version":2'), "version 2 of the trace format; this release reads version 1"),
    ):
        path.write_text(f"{good[0]}\n\n{bad}\n")
        with pytest.raises(TraceFileError, match=told) as error:
            list(read_traces(path))
        assert f"{path}, line 3" in str(error.value)
    with pytest.raises(TraceFileError, match=r"can't read .*no-such-file: No such file"):
        list(read_traces(tmp_path / "no-such-file"))
    path.write_text("not a trace at all")
    with pytest.raises(TraceFileError, match="line 1"):
        list(read_traces(path))


def test_a_line_that_is_being_written_is_left_out(tmp_path, caplog):
    path = written(tmp_path / "traces.jsonl", line(["a"]), line(["b"]))
    path.write_bytes(path.read_bytes()[:-40])
    assert [read.texts for read in read_traces(path)] == [["a"]]
    assert "line 2 is cut short" in caplog.text
