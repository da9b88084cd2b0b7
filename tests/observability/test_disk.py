"""Traces on disk: what is written, by whom, how much of it, and what happens when it can't be."""

import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_entropix.cli.demo import shipped_model
from vllm_entropix.config import ConfigError, EntropixConfig, Trace
from vllm_entropix.observability import disk
from vllm_entropix.observability.trace import FIELDS, REGIMES, TokenTrace
from vllm_entropix.observability.tracefile import TraceLine, read_traces

ALTERNATIVES = 3


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture
def writer_at(tmp_path, monkeypatch):
    """Makes writers that write only when told to."""
    monkeypatch.setattr(disk, "FLUSH_SECONDS", 3600)

    def make(name="traces.jsonl", **settings):
        return disk.TraceWriter(Trace(path=str(tmp_path / name), **settings), counted=False)

    return make


def records(tokens, seed=0, unmeasured=False):
    """Random records of a trace with alternatives."""
    values = np.random.default_rng(seed).random((tokens, len(FIELDS) + 2 * ALTERNATIVES)).astype("<f4")
    values[:, FIELDS.index("regime")] = np.arange(tokens) % len(REGIMES)
    values[:, FIELDS.index("top_k")] = 27
    values[:, FIELDS.index("forced")] = np.arange(tokens) % 2
    values[:, len(FIELDS) : len(FIELDS) + ALTERNATIVES] = np.arange(ALTERNATIVES) + 10
    if unmeasured:
        values[:, FIELDS.index("attention_entropy") : FIELDS.index("temperature")] = np.nan
    return values


def sequence(tokens=4, name="request", tokenizer=None, kept=None, **changed):
    trace = TokenTrace(4 * (len(FIELDS) + 2 * ALTERNATIVES))
    trace.extend(records(tokens if kept is None else kept).tobytes(), tokens)
    config = EntropixConfig()
    label = {
        "model": "demo",
        "preset": config.preset_name,
        "fidelity": config.fidelity,
        "thresholds": config.thresholds.model_dump(),
    }
    settings = {
        "label": label,
        "request_id": name,
        "index": 0,
        "prompt_token_ids": [5, 6, 7],
        "token_ids": list(range(20, 20 + tokens)),
        "finish_reason": "stop",
        "trace": trace,
        "tokenizer": tokenizer,
        **changed,
    }
    return disk.Finished(**settings)


def names(path):
    return [line.request_id for line in read_traces(path)]


@pytest.mark.parametrize("unmeasured", [False, True])
@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (300, 300), (10, 4)])
def test_a_line_is_what_the_format_says(tokenizer, tokens, kept, unmeasured):
    trace = TokenTrace(4 * (len(FIELDS) + 2 * ALTERNATIVES))
    trace.extend(records(kept, unmeasured=unmeasured).tobytes(), tokens)
    finished = sequence(tokens, tokenizer=tokenizer, trace=trace)
    line = disk.line_of(finished)
    assert line.endswith(b"}\n")
    expected = TraceLine.of(
        request_id="request",
        prompt_token_ids=[5, 6, 7],
        completion=SimpleNamespace(token_ids=finished.token_ids, index=0, finish_reason="stop"),
        trace=trace,
        config=EntropixConfig(),
        tokenizer=tokenizer,
        model="demo",
    )
    made, wanted = json.loads(line), json.loads(expected.model_dump_json())
    assert made.pop("created")[:13] == wanted.pop("created")[:13]
    assert made == wanted
    assert made["not_kept"] == tokens - kept
    TraceLine.model_validate_json(line)


def test_without_a_tokenizer_there_are_no_texts():
    line = TraceLine.model_validate_json(disk.line_of(sequence(3)))
    assert line.texts == ["", "", ""]
    assert set(line.alternative_texts.values()) == {""}


def test_lines_are_written_soon_and_only_for_the_owner(tmp_path):
    path = tmp_path / "traces.jsonl"
    disk.write(Trace(path=str(path)), False, sequence())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    assert names(path) == ["request"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path, writer_at):
    path = tmp_path / "traces.jsonl"
    path.touch(0o644)
    writer = writer_at()
    writer.put(sequence())
    writer.flush()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_files_are_set_aside_by_size(tmp_path, writer_at):
    writer = writer_at(max_megabytes=1, files=3)
    long = 1000  # about half a megabyte
    for number in range(9):
        writer.put(sequence(long, f"r{number}"))
    writer.flush()
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == ["traces.jsonl", "traces.jsonl.1", "traces.jsonl.2"]
    assert all(path.stat().st_size <= disk.MEGABYTE for path in found)
    kept = [name for path in reversed(found) for name in names(path)]
    assert kept == [f"r{number}" for number in range(9 - len(kept), 9)]
    assert writer.written == 9
    assert writer.dropped == 0


def test_a_single_file_begins_anew(tmp_path, writer_at):
    writer = writer_at(max_megabytes=1, files=1)
    for number in range(5):
        writer.put(sequence(1000, f"r{number}"))
    writer.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]
    assert names(tmp_path / "traces.jsonl")[-1] == "r4"


def test_a_line_that_no_file_has_room_for_is_dropped(tmp_path, writer_at):
    writer = writer_at(max_megabytes=1)
    writer.put(sequence(4000, "huge"))
    writer.put(sequence(4, "small"))
    writer.flush()
    assert names(tmp_path / "traces.jsonl") == ["small"]
    assert (writer.written, writer.dropped) == (1, 1)


def test_every_process_has_its_own_file(tmp_path, writer_at):
    first = tmp_path / "traces.jsonl"
    with first.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = writer_at()
        writer.put(sequence())
        writer.flush()
        assert first.stat().st_size == 0
    assert names(tmp_path / "traces-1.jsonl") == ["request"]


def test_a_file_that_was_moved_away_is_begun_again(tmp_path, writer_at):
    path = tmp_path / "traces.jsonl"
    writer = writer_at()
    writer.put(sequence(name="before"))
    writer.flush()
    path.rename(tmp_path / "archive.jsonl")
    writer.put(sequence(name="after"))
    writer.flush()
    assert names(tmp_path / "archive.jsonl") == ["before"]
    assert names(path) == ["after"]


def test_what_a_killed_process_left_doesnt_spoil_the_next_line(tmp_path, writer_at):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"version": 1, "request')
    writer = writer_at()
    writer.put(sequence())
    writer.flush()
    assert TraceLine.model_validate_json(path.read_text().splitlines()[-1]).request_id == "request"


def test_a_full_disk_drops_whole_lines_with_one_warning_and_recovers(tmp_path, writer_at, monkeypatch):
    writer = writer_at()
    writer.put(sequence(name="first"))
    writer.flush()
    full = (tmp_path / "traces.jsonl").stat().st_size + 100  # room for a part of a line
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    warnings = []
    monkeypatch.setattr(disk.logger, "warning", lambda text, *values: warnings.append(text % values))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard))
        for number in range(3):
            writer.put(sequence(name=f"lost {number}"))
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (writer.written, writer.dropped) == (1, 3)
    assert len(warnings) == 1
    assert "File too large" in warnings[0]
    writer.put(sequence(name="last"))
    writer.flush()
    assert names(tmp_path / "traces.jsonl") == ["first", "last"]


def test_when_the_disk_is_too_slow_sequences_are_dropped_and_nobody_waits(writer_at, monkeypatch):
    monkeypatch.setattr(disk, "MAX_WAITING_TOKENS", 100)
    writer = writer_at()
    start = time.monotonic()
    for _ in range(1000):
        writer.put(sequence(9))
    assert time.monotonic() - start < 10
    assert writer.dropped == 990
    writer.flush()
    assert writer.written == 10


def test_a_tokenizer_that_fails_costs_its_line_alone(tmp_path, writer_at):
    class Broken:
        def decode(self, *_, **__):
            raise RuntimeError("no such token")

    writer = writer_at()
    writer.put(sequence(name="broken", tokenizer=Broken()))
    writer.put(sequence(name="whole"))
    writer.flush()
    assert names(tmp_path / "traces.jsonl") == ["whole"]
    assert writer.dropped == 1


def test_what_is_queued_is_written_when_the_process_ends(tmp_path):
    path = tmp_path / "traces.jsonl"
    script = f"""
from tests.observability.test_disk import sequence
from vllm_entropix.config import Trace
from vllm_entropix.observability import disk
disk.FLUSH_SECONDS = 3600
disk.write(Trace(path={str(path)!r}), False, sequence())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=os.getcwd())
    assert names(path) == ["request"]


@pytest.mark.parametrize("kind", ["missing folder", "folder", "link", "pipe"])
def test_a_path_that_cant_be_written_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "traces.jsonl"
    if kind == "missing folder":
        path = tmp_path / "nowhere" / "traces.jsonl"
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"^traces can't be written to trace\.path .*: [^\n]+$"):
        disk.check(Trace(path=str(path)))
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("path", ["", "folder/", "a\0b"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ConfigError, match=r"trace\.path"):
        EntropixConfig.from_dict({"trace": {"path": path}})


def test_paths_may_be_relative_or_start_in_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert disk.absolute("traces.jsonl") == tmp_path / "traces.jsonl"
    assert disk.absolute("~/traces.jsonl") == tmp_path / "home" / "traces.jsonl"
