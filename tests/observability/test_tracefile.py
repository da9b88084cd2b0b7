"""Files of traces: what is written is read, and what isn't a trace is named by file and line."""

import gzip
import hashlib
import struct
import sys
from types import SimpleNamespace

import pytest

from tests.support.traces import line, varied, written
from vllm_entropix.observability.tracefile import TraceFileError, read_traces
from vllm_entropix.records.branches import Branch
from vllm_entropix.records.line import prompt_hash


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


def test_branches_that_arent_the_answer_are_read_on_request(tmp_path):
    lost, won = line(["a", "b"], name="forked"), line(["a", "c"], name="forked")
    lost.branch = Branch(id=0, tokens=2, pruned_at=2)
    won.branch = Branch(id=1, parent=0, position=1, token=102, tokens=1, chosen=True)
    path = written(tmp_path / "traces.jsonl", line(["x"]), lost, won)
    assert [one.texts for one in read_traces(path)] == [["x"], ["a", "c"]]
    assert [one.texts for one in read_traces(path, branches=True)] == [["x"], ["a", "b"], ["a", "c"]]


def test_what_is_wrong_is_named_by_file_and_line(tmp_path):
    """Where nothing else is there."""
    path = written(tmp_path / "traces.jsonl", line(["a"]))
    good = path.read_text()
    for bad, told in (
        ("no json", "not a trace: Invalid JSON"),
        ('{"version": 1}', "request_id: Field required"),
        (good.replace('"version":2', '"version":3'), "version 3 of the trace format; this release reads versions 1 to 2"),
    ):
        path.write_text(f"\n\n{bad}\n")
        with pytest.raises(TraceFileError, match=told) as error:
            list(read_traces(path))
        assert f"{path}, line 3" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(TraceFileError, match=r"can't read .*no-such-file: No such file"):
        list(read_traces(tmp_path / "no-such-file"))
    with pytest.raises(TraceFileError, match=r"can't read .*: Is a directory"):
        list(read_traces(tmp_path))
    path.write_text("")
    assert list(read_traces(path)) == []


GOOD = line(["a", "b"]).model_dump_json()
BAD = {
    "half a line": GOOD[:200].encode(),
    "half a line, then a whole one": (GOOD[:300] + GOOD).encode(),
    "another object": b'{"level": "info"}',
    "another version": GOOD.replace('"version":2', '"version":7').encode(),
    "no object": b"3",
    "NaN": GOOD.replace('"entropy":0.02', '"entropy":NaN').encode(),
    "infinity": GOOD.replace('"entropy":0.02', '"entropy":-Infinity').encode(),
    "more than a float32": GOOD.replace('"entropy":0.02', '"entropy":1e300').encode(),
    "more than a float64": GOOD.replace('"entropy":0.02', '"entropy":1e999').encode(),
    "2**63": GOOD.replace('"token_id":100', f'"token_id":{2**63}').encode(),
    "5,000 digits": GOOD.replace('"version":2', f'"version":{"9" * 5000}').encode(),
    "a negative token": GOOD.replace('"token_ids":[100', '"token_ids":[-100').encode(),
    "a negative alternative": GOOD.replace('"alternative_texts":{"100"', '"alternative_texts":{"-100"').encode(),
    "300 alternatives": GOOD.replace('"alternatives":[', '"alternatives":[' + "[1,0.5]," * 300, 1).encode(),
    "a large top_k": GOOD.replace('"top_k":27', '"top_k":2147483648').encode(),
    "fewer texts": GOOD.replace('"texts":["a","b"]', '"texts":["a"]').encode(),
    "more records": GOOD.replace('"token_ids":[100,101]', '"token_ids":[100]').encode(),
    "another regime": GOOD.replace('"regime":"LELV"', '"regime":"</script>"').encode(),
    "deep": b'{"version":2,"request_id":' + b"[" * 100_000,
    "deep where nobody looks": GOOD.replace('{"version"', '{"more":' + "[" * 100_000 + "]" * 100_000 + ',"version"').encode(),
    "no UTF-8": GOOD.replace('"texts":["a"', '"texts":["Z"').encode().replace(b"Z", b"\xff\xfe"),
    "half a surrogate pair": GOOD.replace('"texts":["a"', '"texts":["\\ud800"').encode(),
    "null bytes": b"\0" * 1000,
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_line_is_left_out_wherever_it_stands(tmp_path, caplog, kind, place):
    assert GOOD.encode() != BAD[kind]
    lines = [line([str(number)], name=str(number)).model_dump_json().encode() for number in range(2)]
    lines.insert(place, BAD[kind])
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * (place != 2))
    assert [read.request_id for read in read_traces(path)] == ["0", "1"]
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{path}: line {place + 1} isn't a trace and is left out (line {place + 1}: ")
    assert len(told) < len(str(path)) + 300
    assert "\n" not in told


def test_what_is_left_out_is_told_once(tmp_path, caplog):
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(["no"] * 7 + [GOOD] + ["{}"] * 3))
    assert len(list(read_traces(path))) == 1
    [told] = [record.getMessage() for record in caplog.records]
    assert f"{path}: lines 1, 2, 3, 4, 5 and 5 more aren't traces and are left out (line 1: Invalid JSON: " in told


def test_what_other_tools_add_changes_nothing(tmp_path, caplog):
    path = tmp_path / "traces.jsonl"
    twice = GOOD.replace('{"version"', '{"request_id":"first","more":{"a":[1]},"version"')
    path.write_bytes(f"{twice}\r\n   \n".encode())
    [read] = read_traces(path)
    assert read == line(["a", "b"])
    assert not caplog.records


def test_a_line_of_100_megabytes(tmp_path, caplog):
    path = tmp_path / "traces.jsonl"
    with path.open("w") as file:
        file.write('{"version":2,"request_id":"' + "x" * 100_000_000 + "\n")
        file.write(GOOD.replace('"texts":["a"', f'"texts":["{"y" * 100_000_000}"') + "\n")
    [read] = read_traces(path)
    assert len(read.texts[0]) == 100_000_000
    assert "line 1 isn't a trace" in caplog.text


@pytest.mark.parametrize("how", ["gzip", "two members", "stdin", "gzip on stdin"])
def test_compressed_files_and_standard_input(tmp_path, monkeypatch, how):
    lines = [line(["a"], name="a"), line(["b"], name="b")]
    plain = [written.model_dump_json().encode() + b"\n" for written in lines]
    data = b"".join(plain)
    if "gzip" in how:
        data = gzip.compress(data)
    elif how == "two members":  # as by cat a.gz b.gz
        data = b"".join(map(gzip.compress, plain))
    path = tmp_path / "traces"
    path.write_bytes(data)
    told = []
    with path.open("rb") as file:
        if "stdin" in how:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
            path = "-"
        assert list(read_traces(path, told.append)) == lines
    assert told[-1] == len(data)


@pytest.mark.parametrize("broken", ["cut", "changed"])
def test_a_broken_gzip_gives_what_can_be_read(tmp_path, caplog, broken):
    lines = [varied(20, seed, name=str(seed)) for seed in range(40)]
    data = bytearray(gzip.compress("".join(read.model_dump_json() + "\n" for read in lines).encode()))
    if broken == "cut":
        del data[len(data) // 2 :]
    else:
        # One byte may be a letter of a text, which gives another line, as good as any.
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path = tmp_path / "traces.jsonl.gz"
    path.write_bytes(data)
    read = list(read_traces(path))
    assert read == lines[: len(read)]
    assert len(read) > 1
    assert "left out" in caplog.text
    path.write_bytes(data[:15])
    with pytest.raises(TraceFileError, match="line 1: not a trace: broken gzip"):
        list(read_traces(path))


def test_a_reader_that_stops_early_hears_nothing(tmp_path, caplog):
    path = tmp_path / "traces.jsonl"
    path.write_text(f"no\n{GOOD}\nno\n")
    assert next(read_traces(path)) == line(["a", "b"])
    assert not caplog.records
