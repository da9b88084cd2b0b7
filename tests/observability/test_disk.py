"""Traces on disk: what is written, by whom, how much of it, and what happens when it can't be."""

import errno
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_entropix.demo_model import shipped_model
from vllm_entropix.observability import background, disk
from vllm_entropix.records.branches import Branch
from vllm_entropix.records.fields import all_fields, column
from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.samplers.entropix.record import EntropixPart
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError
from vllm_entropix.settings.server import Trace

ALTERNATIVES = 3
CONFIG = EntropixConfig()
LABEL = {"model": "demo", "sampler": EntropixPart.from_config(CONFIG).model_dump()}


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
    values = np.random.default_rng(seed).random((tokens, len(all_fields()) + 2 * ALTERNATIVES)).astype("<f4")
    values[:, column("regime")] = np.arange(tokens) % len(REGIMES)
    values[:, column("top_k")] = 27
    values[:, column("forced")] = np.arange(tokens) % 2
    values[:, len(all_fields()) : len(all_fields()) + ALTERNATIVES] = np.arange(ALTERNATIVES) + 10
    if unmeasured:
        values[:, column("attention_entropy") : column("temperature")] = np.nan
    return values


def sequence(tokens=4, name="request", tokenizer=None, kept=None, **changed):
    trace = TokenTrace(4 * (len(all_fields()) + 2 * ALTERNATIVES))
    trace.extend(records(tokens if kept is None else kept).tobytes(), tokens)
    settings = {
        "label": LABEL,
        "request_id": name,
        "index": 0,
        "prompt": disk.Prompt.from_ids([5, 6, 7], "the prompt", told=False),
        "token_ids": disk.compact(range(20, 20 + tokens)),
        "finish_reason": "stop",
        "trace": trace,
        "tokenizer": tokenizer,
        **changed,
    }
    return disk.Finished(**settings)


def names(path):
    """What the lines of a file are of; a half line fails, where a reader would skip it."""
    return [TraceLine.model_validate_json(line).request_id for line in path.read_text().splitlines()]


def test_a_line_tells_its_branch():
    branches = [Branch(id=0, tokens=4, chosen=True), Branch(id=1, parent=0, position=2, token=22, tokens=2, pruned_at=4)]
    written = [
        TraceLine.model_validate_json(disk.line_of(sequence(branch=one, forks=branches if one.chosen else None)))
        for one in branches
    ]
    assert [line.branch for line in written] == branches
    assert [line.forks for line in written] == [branches, None]
    assert [line.is_answer for line in written] == [True, False]
    assert TraceLine.model_validate_json(disk.line_of(sequence())).is_answer


@pytest.mark.parametrize("unmeasured", [False, True])
@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (300, 300), (10, 4)])
def test_a_line_is_what_the_format_says(tokenizer, tokens, kept, unmeasured):
    trace = TokenTrace(4 * (len(all_fields()) + 2 * ALTERNATIVES))
    trace.extend(records(kept, unmeasured=unmeasured).tobytes(), tokens)
    finished = sequence(tokens, tokenizer=tokenizer, trace=trace)
    line = disk.line_of(finished)
    assert line.endswith(b"}\n")
    expected = TraceLine.from_completion(
        request_id="request",
        prompt_token_ids=[5, 6, 7],
        completion=SimpleNamespace(token_ids=finished.token_ids, index=0, finish_reason="stop"),
        trace=trace,
        sampler=EntropixPart.from_config(CONFIG),
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


def warnings_of(monkeypatch):
    """What is warned of from now on."""
    told = []
    monkeypatch.setattr(disk.logger, "warning", lambda text, *values: told.append(text % values))
    return told


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_the_mode_of_a_file_is_its_owners(tmp_path, writer_at, monkeypatch, mode):
    """Also of the one that follows when it is full: whoever collects the files goes on reading."""
    told = warnings_of(monkeypatch)
    path = tmp_path / "traces.jsonl"
    path.touch()
    path.chmod(mode)
    disk.check(Trace(path=str(path)))
    assert len(told) == (mode == 0o644)
    if told:
        assert f"any user of this machine can read {path} (mode 644): chmod 600" in told[0]
    writer = writer_at(max_megabytes=1)
    for number in range(3):
        writer.put(sequence(600, f"r{number}"))
    writer.flush()
    assert [stat.S_IMODE(found.stat().st_mode) for found in sorted(tmp_path.iterdir())] == [mode, mode]


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


def test_a_handle_that_is_lost_is_let_go(tmp_path, writer_at):
    writer = writer_at()
    for name in ("before", "lost", "after"):
        if name == "lost":
            os.close(writer._file)
        writer.put(sequence(name=name))
        writer.flush()
    assert names(tmp_path / "traces.jsonl") == ["before", "after"]


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


@pytest.mark.alone
def test_when_the_disk_is_too_slow_sequences_are_dropped_and_nobody_waits(writer_at, monkeypatch):
    told = warnings_of(monkeypatch)
    writer = writer_at(queue_megabytes=1)
    start = time.monotonic()
    waiting = sequence(100)
    for _ in range(1000):
        writer.put(waiting)
    assert time.monotonic() - start < 10
    fitting = disk.MEGABYTE // waiting.nbytes
    assert writer.dropped == 1000 - fitting
    assert len(told) == 1
    assert "more than trace.queue_megabytes = 1 wait to be written" in told[0]
    writer.flush()
    assert writer.written == fitting
    writer.put(sequence(100))
    writer.flush()
    assert writer.written == fitting + 1, "there is room again"


@pytest.mark.parametrize("told", [False, True])
def test_long_prompts_take_no_memory_while_they_wait(writer_at, told):
    writer = writer_at(queue_megabytes=8)
    ids = list(range(1000, 9000))
    tracemalloc.start()
    try:
        for _ in range(250):
            prompt = disk.Prompt.from_ids(ids.copy(), "word " * 8000, told)
            writer.put(sequence(10, prompt=prompt))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 10e6
    assert (writer.dropped > 0) == told


@pytest.mark.parametrize("tokens", [1, 2000])
def test_what_waits_takes_as_much_memory_as_the_queue_may_hold(writer_at, tokens):
    """Short sequences weigh what is around their tokens, long ones their records."""
    writer = writer_at(queue_megabytes=1)
    tracemalloc.start()
    try:
        while not writer.dropped:
            writer.put(sequence(tokens))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.2e6


def test_prompts_are_told_where_they_are_asked_for(tokenizer):
    ids = tokenizer.encode("What is in the box?")
    for prompt, shown in (
        (disk.Prompt.from_ids(ids, "What is", told=False), None),
        (disk.Prompt.from_ids(ids, "What is", told=True), "What is"),
        (disk.Prompt.from_ids(ids, None, told=True), tokenizer.decode(ids)),
        (disk.Prompt.from_ids(ids, None, told=False), None),
        (disk.Prompt.from_ids((), "", told=True), ""),
    ):
        line = TraceLine.model_validate_json(disk.line_of(sequence(prompt=prompt, tokenizer=tokenizer)))
        assert line.prompt == shown
        assert line.prompt_tokens == prompt.tokens
    line = TraceLine.model_validate_json(disk.line_of(sequence(prompt=disk.Prompt.from_ids(ids, None, told=True))))
    assert line.prompt is None, "nothing makes a text of it"


@pytest.mark.alone
def test_a_long_line_holds_up_nobody(tmp_path, writer_at):
    """A thread that wakes every millisecond, as one that serves, while a line of 100,000 tokens is made and written."""
    late, running = [], True

    def tick():
        before = time.perf_counter()
        while running:
            time.sleep(0.001)
            now = time.perf_counter()
            late.append(now - before)
            before = now

    ids = disk.compact([token % 500 for token in range(100_000)])
    long = sequence(len(ids), token_ids=ids)
    writer = writer_at()
    ticking = threading.Thread(target=tick)
    ticking.start()
    writer.put(long)
    writer.flush()
    running = False
    ticking.join()
    assert (tmp_path / "traces.jsonl").stat().st_size > 30e6
    # The bound that is aimed at is 50 ms. A machine that runs other things, too, is late by itself now and then.
    assert sorted(late)[-5] < 0.05
    assert max(late) < 0.25


class Panic(BaseException):
    """What Rust's panics are in Python."""


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, Panic])
def test_a_tokenizer_that_fails_costs_its_line_alone(tmp_path, writer_at, error):
    class Broken:
        def decode(self, *_, **__):
            raise error("no such token")

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
from vllm_entropix.settings.server import Trace
from vllm_entropix.observability import background, disk
disk.FLUSH_SECONDS = 3600
disk.write(Trace(path={str(path)!r}), False, sequence())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=os.getcwd())
    assert names(path) == ["request"]


HUNG = """
import os, threading, time
from tests.observability.test_disk import sequence
from vllm_entropix.settings.server import Trace
from vllm_entropix.observability import background, disk
disk.FLUSH_SECONDS = 0.01
at_write, write = threading.Event(), os.write
def hung(file, data):
    at_write.set()
    time.sleep(3600)
os.write = hung
for name in "ab":
    disk.write(Trace(path=os.environ["TRACES"] + name), False, sequence())
at_write.wait(60)
for name in "ab":
    disk.write(Trace(path=os.environ["TRACES"] + name), False, sequence())
print("ends", time.time(), flush=True)
"""


@pytest.mark.alone
def test_a_disk_that_hangs_holds_up_the_end_for_five_seconds(tmp_path):
    """Two of them no longer than one."""
    environment = {**os.environ, "TRACES": str(tmp_path / "traces")}
    ended = subprocess.run(
        [sys.executable, "-c", HUNG], check=True, timeout=120, env=environment, capture_output=True, text=True
    )
    waited = time.time() - float(ended.stdout.split()[1])
    assert disk.EXIT_SECONDS == 5
    assert 4.5 < waited < 7
    assert ended.stderr.count("are lost: nothing was written for 5 s") == 2


def test_a_disk_that_is_slow_is_waited_for(writer_at, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "EXIT_SECONDS", 0.4)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: (time.sleep(0.1), write(file, data[:400]))[1])
    writer = writer_at()
    writer.put(sequence())
    disk.finish([writer])
    assert names(tmp_path / "traces.jsonl") == ["request"]


def test_a_forked_process_writes_its_own_and_not_its_parents(tmp_path):
    path = tmp_path / "traces.jsonl"
    script = f"""
import os, sys
from tests.observability.test_disk import sequence
from vllm_entropix.settings.server import Trace
from vllm_entropix.observability import background, disk
disk.FLUSH_SECONDS = 3600
settings = Trace(path={str(path)!r})
disk.write(settings, False, sequence(name="first"))
disk.writers()[0].flush()
disk.write(settings, False, sequence(name="parent"))
child = os.fork()
if not child:
    disk.FLUSH_SECONDS = 0.01
    disk.write(settings, False, sequence(name="child"))
    writer = disk.writers()[0]
    disk.finish([writer])
    sys.exit()
os.waitpid(child, 0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120, cwd=os.getcwd())
    assert names(path) == ["first", "parent"]
    assert names(tmp_path / "traces-1.jsonl") == ["child"]


FAULTS = ["full", "broken", "folder", "folder is gone", "no permission", "memory", "panic", "close"]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_the_disk_does_the_thread_goes_on(tmp_path, monkeypatch, fault):
    """In the writer's own thread, and again once the fault is gone."""
    told = warnings_of(monkeypatch)
    monkeypatch.setattr(disk, "FLUSH_SECONDS", 0.01)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "traces.jsonl"
    writer = disk.TraceWriter(Trace(path=str(path)), counted=False)

    def put(name):
        before = writer.written + writer.dropped
        writer.put(sequence(name=name))
        deadline = time.monotonic() + 20
        while writer.written + writer.dropped == before and time.monotonic() < deadline:
            time.sleep(0.005)

    put("before")
    write, opened, close = os.write, os.open, os.close

    def failing_write(file, data, kind=OSError, number=errno.ENOSPC):
        if file != writer._file:
            return write(file, data)
        if len(data) > 100:
            return write(file, data[:100])  # a part of it fits
        raise OSError(number, os.strerror(number)) if kind is OSError else kind("not now")

    def failing_open(name, *arguments, **more):
        if str(name) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(name, *arguments, **more)

    def failing_close(file):
        close(file)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if fault in ("full", "close"):
            patch.setattr(os, "write", failing_write)
        elif fault == "broken":
            patch.setattr(os, "write", lambda *a: failing_write(*a, number=errno.EIO))
        elif fault in ("memory", "panic"):
            patch.setattr(os, "write", lambda *a: failing_write(*a, kind=MemoryError if fault == "memory" else Panic))
        elif fault == "folder":
            path.rename(tmp_path / "moved")
            path.mkdir()
        elif fault == "folder is gone":
            folder.rename(tmp_path / "moved")
        elif fault == "no permission":
            path.rename(tmp_path / "moved")
            patch.setattr(os, "open", failing_open)
        if fault == "close":
            patch.setattr(os, "close", failing_close)
        put("lost")
        put("lost, too")
    if fault == "folder":
        path.rmdir()
    elif fault == "folder is gone":
        folder.mkdir()
    put("after")
    assert (writer.written, writer.dropped) == (2, 2)
    moved = tmp_path / ("moved/traces.jsonl" if fault == "folder is gone" else "moved")
    assert (names(moved) if moved.exists() else []) + names(path) == ["before", "after"]
    assert len(told) == 1, "each kind of fault is told once"


def test_what_even_the_writer_doesnt_expect_is_told_once_and_survived(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(disk, "FLUSH_SECONDS", 0.01)
    writer = disk.TraceWriter(Trace(path=str(tmp_path / "traces.jsonl")), counted=False)
    write = writer._write
    monkeypatch.setattr(background.logger, "error", lambda text, *values: told.append(text % values))
    told = []

    def failing(lines):
        raise Panic("not now")

    writer._write = failing
    for failures in (1, 2):
        writer.put(sequence(name="lost"))
        deadline = time.monotonic() + 20
        while writer.background.failures < failures and time.monotonic() < deadline:
            time.sleep(0.005)
    writer._write = write
    writer.put(sequence(name="after"))
    disk.finish([writer])
    assert names(tmp_path / "traces.jsonl") == ["after"]
    assert writer.background.failures == 2
    assert len(told) == 1
    assert "entropix-traces goes on after Panic: not now" in told[0]


def test_without_a_thread_to_be_had_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(background.logger, "error", lambda text, *values: told.append(text % values))
    told = []
    writer = disk.TraceWriter(Trace(path=str(tmp_path / "traces.jsonl")), counted=False)

    def full(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        writer.put(sequence(name="a"))
        writer.put(sequence(name="b"))
    writer.put(sequence(name="c"))
    disk.finish([writer])
    assert names(tmp_path / "traces.jsonl") == ["a", "b", "c"]
    assert len(told) == 1


def test_counters_that_fail_cost_no_line(tmp_path, monkeypatch):
    told = warnings_of(monkeypatch)

    def failing(**lines):
        raise OSError("No space left on device")

    monkeypatch.setattr(disk.prometheus, "count_trace_lines", failing)
    writer = disk.TraceWriter(Trace(path=str(tmp_path / "traces.jsonl")))
    for name in "ab":
        writer.put(sequence(name=name))
        writer.flush()
    assert names(tmp_path / "traces.jsonl") == ["a", "b"]
    assert (writer.written, writer.dropped, len(told)) == (2, 0, 1)


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
