"""One table: a field that is added at run time is found in everything that is made of it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from prometheus_client import REGISTRY
from rich.console import Console
from typer.testing import CliRunner

from tests.support.traces import CENTRES, line, written
from vllm_entropix.cli.main import app
from vllm_entropix.distribution.attention import Metrics
from vllm_entropix.observability import prometheus
from vllm_entropix.observability.export import columns, to_pandas
from vllm_entropix.observability.report import Source, report
from vllm_entropix.observability.terminal import TracedText, summary_table
from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.records.choice import choice_json
from vllm_entropix.records.fields import COMMON, Field, all_fields, column, names, record_bytes, register
from vllm_entropix.records.schema import ChoiceTrace, TokenEntry
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Sequence
from vllm_entropix.samplers.chained import Chained
from vllm_entropix.samplers.entropix.settings import EntropixConfig

DOCS = Path(__file__).parents[2] / "docs"
WONDER = Field("wonder", "float", "bits", True, "wonder of it", "How much there is to wonder.", buckets=(1.0, 4.0))


@pytest.fixture
def wonder(monkeypatch):
    """The field as a sampler's, computed where the metrics are: what adding a metric takes."""
    monkeypatch.setattr(Metrics, "wonder", property(lambda self: 2 * self.entropy), raising=False)
    register("a test", (WONDER,))
    yield WONDER
    register("a test", ())


def step(rows=3):
    """Packed records of rows of random logits, without alternatives."""
    config = EntropixConfig.from_dict({"trace": {"alternatives": 0}})
    batch = BatchSampler(config, rows, None, "cpu")
    numbers = [value for _, value in config.numbers()]
    for row in range(rows):
        batch.add(str(row), Sequence(numbers, sampled=True, traced=True, allow_clarification=False, prompt_length=1))
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    zero = torch.zeros(rows, dtype=torch.int64)
    described = Rows(torch.from_numpy(slots), slots, zero + 10, zero, zero == 0, torch.arange(rows))
    logits = torch.randn(rows, 50, generator=torch.Generator().manual_seed(0))
    return batch.apply(logits, described, None).numpy()


def test_a_field_is_found_in_all_that_is_made_of_the_table(wonder, tmp_path):
    # The packed record, and the values of a trace.
    packed = step()
    assert packed.shape == (3, 1 + len(all_fields()))
    entropy, added = (packed[:, 1 + column(name)] for name in ("entropy", "wonder"))
    assert added.tolist() == (2 * entropy).tolist()
    trace = TokenTrace()
    trace.extend(packed[:, 1:].tobytes(), 3)
    assert [record.wonder for record in trace] == added.tolist()
    assert trace[0].to_dict()["wonder"] == trace[0].wonder == 2 * trace[0].entropy
    # JSON and the models of responses.
    read = ChoiceTrace.model_validate_json(b"".join(choice_json([7, 8, 9], trace)))
    assert [entry.wonder for entry in read.tokens] == added.tolist()
    assert read == ChoiceTrace.from_trace([7, 8, 9], trace)
    # Both schemas, and the documentation's table.
    for kind in ("http", "file"):
        entry = json.loads(CliRunner().invoke(app, ["schema", kind]).output)["$defs"]["TokenEntry"]
        assert entry["properties"]["wonder"]["description"] == "How much there is to wonder, bits."
        assert "wonder" in entry["required"]
    assert (
        "| `wonder` | float | bits | yes | How much there is to wonder. |"
        in CliRunner().invoke(app, ["schema", "fields"]).output
    )
    # Files of traces.
    traced = line(["a", "b", "c"])
    traced.records = read.tokens
    path = written(tmp_path / "traces.jsonl", traced)
    assert [entry.wonder for entry in next(read_traces(path)).records] == added.tolist()
    # Tables.
    assert "wonder" in columns()
    assert to_pandas(path).wonder.tolist() == added.tolist()
    # The report: what the page draws and describes, and its histograms.
    page = report([Source("traces", [traced])])
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    described = {"field": "wonder", "name": "wonder of it", "unit": "bits", "description": "How much there is to wonder, bits."}
    assert described in data["metrics"]
    assert "wonder" in [histogram["field"] for histogram in data["histograms"]]
    # The terminal.
    console = Console(width=200, record=True)
    console.print(summary_table([TracedText("a", traced.texts, traced.records)], 200))
    assert "wonder" in console.export_text()
    # Prometheus.
    before = REGISTRY.get_sample_value("entropix_wonder_bits_count") or 0
    prometheus.count(packed[:, 1:].tobytes(), 3)
    prometheus.flush()
    assert REGISTRY.get_sample_value("entropix_wonder_bits_count") == before + 3
    assert REGISTRY.get_sample_value("entropix_wonder_bits_sum") >= added.sum() * 0.999


@pytest.mark.parametrize("name", [field.name for field in Chained.fields])
def test_what_a_chain_tells_is_counted_and_drawn(name):
    [field] = [field for field in all_fields() if field.name == name]
    values = np.full((3, len(all_fields())), np.nan, "<f4")
    values[:2, column(name)] = [0.25, 0.75]

    def counted():
        return [REGISTRY.get_sample_value(f"{field.metric_name}_{what}") or 0 for what in ("count", "sum")]

    number, total = counted()
    prometheus.count(values.tobytes(), 3)
    prometheus.flush()
    assert counted() == [number + 2, total + 1.0]
    trace, traced = TokenTrace(), line(["a", "b", "c"])
    trace.extend(values.tobytes(), 3)
    traced.records = ChoiceTrace.from_trace([7, 8, 9], trace).tokens
    page = report([Source("traces", [traced])])
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [metric["name"] for metric in data["metrics"] if metric["field"] == name] == [field.label]
    assert [histogram["means"] for histogram in data["histograms"] if histogram["field"] == name] == [[0.5]]
    assert f"`{field.metric_name}`" in (DOCS / "watching-a-server.md").read_text(encoding="utf-8")


def test_it_is_gone_when_its_sampler_is(wonder):
    register("a test", ())
    assert "wonder" not in names()
    assert "wonder" not in TokenEntry.model_fields
    assert step().shape[1] == 1 + len(all_fields())
    assert record_bytes() == 4 * len(all_fields())


def test_what_nobody_computed_is_null(wonder, monkeypatch):
    monkeypatch.delattr(Metrics, "wonder")
    packed = step()
    assert np.isnan(packed[:, 1 + column("wonder")]).all()
    assert not np.isnan(packed[:, 1 + column("entropy")]).any()


def test_the_order_is_the_owners_names_and_not_that_of_the_calls():
    first, second = (Field(name, "float", "", True, name, "A number.") for name in ("first", "second"))
    try:
        register("z", (second,))
        register("a", (first,))
        assert all_fields()[: len(COMMON)] == COMMON
        assert names().index("first") == len(COMMON)
        assert names()[-1] == "second"
    finally:
        register("z", ())
        register("a", ())


@pytest.mark.parametrize(
    ("owner", "name", "has"), [("a", "entropy", "all samplers"), ("a", "regime", "entropix"), ("a", "twice", "a")]
)
def test_a_name_has_one_owner(owner, name, has):
    added = Field(name, "float", "", True, name, "A number.")
    before = all_fields()
    with pytest.raises(ValueError, match=f"{owner} can't have a field {name}, which {has} has: give it another name"):
        register(owner, (added,) if name != "twice" else (added, added))
    assert all_fields() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("Entropy", "float", "", True, "", ""), "can't be named 'Entropy'"),
        (("token_id", "float", "", True, "", ""), "can't be named 'token_id'"),
        (("mu", "float", "", False, "", ""), "set nullable=True"),
        (("kind", "category", "", True, "", ""), "has categories"),
        (("mu", "float", "", True, "", "", "metric", ("a",)), "a category, and nothing else, has categories"),
    ],
)
def test_a_field_that_cannot_be_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        Field(*arguments)


@pytest.mark.parametrize(
    ("dtype", "nullable", "read"),
    [("float", True, [0.0, 1.5, None]), ("int", True, [0, 1, None]), ("bool", False, [False, True, False]),
     ("bool", True, [False, True, None]), ("category", True, ["a", "b", None])],
)  # fmt: skip
def test_each_type_is_read_and_null_where_it_may_be(dtype, nullable, read, tmp_path):
    kind = Field("kind", dtype, "", nullable, "kind", "A kind.", "mark", ("a", "b") if dtype == "category" else ())
    register("a test", (kind,))
    try:
        values = np.zeros((3, len(all_fields())), "<f4")
        values[:, column("kind")] = [0, 1.5, np.nan]
        trace = TokenTrace()
        trace.extend(values.tobytes(), 3)
        told = json.loads(b"".join(choice_json([1, 2, 3], trace)))
        assert [token["kind"] for token in told["tokens"]] == [record.kind for record in trace] == read
        assert ChoiceTrace.model_validate(told).model_dump(mode="json") == told
        traced = line(["a", "b", "c"])
        traced.records = ChoiceTrace.model_validate(told).tokens
        column_of = to_pandas(written(tmp_path / "traces.jsonl", traced)).kind
        assert [None if pd.isna(value) else value for value in column_of] == read
    finally:
        register("a test", ())


def test_a_token_without_a_regime_is_read_by_everybody(tmp_path):
    """As are those of samplers that have none."""
    plain = line(["a", "b", "c"], metrics=CENTRES, forced=[1])
    without = plain.model_copy(update={"records": [entry.model_copy(update={"regime": None}) for entry in plain.records]})
    none = written(tmp_path / "none.jsonl", without)
    both = written(tmp_path / "both.jsonl", without, plain)
    assert [entry.regime for entry in next(read_traces(none)).records] == [None] * 3
    table = to_pandas(both)
    assert table.regime.isna().tolist() == [True] * 3 + [False] * 3
    page = report([Source("traces", read_traces(both))])
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [regime["name"] for regime in data["regimes"]][-2:] == ["ADAPTIVE", "NONE"]
    assert [sequence["counts"][5] for sequence in data["sequences"]] == [3, 0]
    assert data["uncertain"][0]["regime"] in (1, 5)
    for command in (["report", str(none), "--terminal"], ["whatif", str(both), "--preset", "torch-2024-10"]):
        ended = CliRunner().invoke(app, command)
        assert ended.exit_code == 0, ended.output
    assert "3 tokens of samplers without regimes are left out" in ended.stdout
    refused = CliRunner().invoke(app, ["whatif", str(none), "--preset", "torch-2024-10"])
    assert str(refused.exception) == "the traces have no tokens with a regime"


def test_tokens_without_a_regime_are_counted_as_such():
    values = np.zeros((2, len(all_fields())), "<f4")
    values[:, column("regime")] = np.nan
    values[:, column("attention_entropy")] = np.nan
    counted = {"none": 2, "LELV": 0}
    before = {name: REGISTRY.get_sample_value("entropix_tokens_total", {"regime": name}) or 0 for name in counted}
    missed = REGISTRY.get_sample_value("entropix_logits_only_tokens_total") or 0
    prometheus.count(values.tobytes(), 2)
    prometheus.flush()
    for name, number in counted.items():
        assert REGISTRY.get_sample_value("entropix_tokens_total", {"regime": name}) == before[name] + number
    assert REGISTRY.get_sample_value("entropix_logits_only_tokens_total") == missed
