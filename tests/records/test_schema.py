"""The documented JSON schemas are the package's own, and what the package writes keeps to them."""

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from tests.observability.test_disk import records, sequence
from vllm_entropix.cli.main import app
from vllm_entropix.cli.schema import Format, schema_text
from vllm_entropix.observability.disk import line_of
from vllm_entropix.records.schema import ChoiceTrace
from vllm_entropix.records.trace import TokenTrace

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(("kind", "name"), [(Format.HTTP, "trace.schema.json"), (Format.FILE, "trace-file.schema.json")])
def test_the_documented_schema_is_up_to_date(kind, name):
    """After a change: `vllm-entropix schema http > docs/trace.schema.json`, and the same of file."""
    assert (DOCS / name).read_text() == CliRunner().invoke(app, ["schema", kind.value]).output


def test_the_documented_table_is_up_to_date():
    """After a change: put what `vllm-entropix schema fields` prints between the comments."""
    text = (DOCS / "reading-a-trace.md").read_text()
    table = text.split("<!-- made by `vllm-entropix schema fields` -->\n")[1].split("\n<!-- end -->")[0]
    assert table == CliRunner().invoke(app, ["schema", "fields"]).output.strip()


def test_traces_keep_to_the_schema():
    values = records(5, unmeasured=True)
    trace = TokenTrace(4 * values.shape[1])
    trace.extend(values.tobytes(), 6)
    choice = json.loads(ChoiceTrace.from_trace([1, 2, 3, 4, 5, 6], trace).model_dump_json())
    jsonschema.validate(choice, json.loads(schema_text(Format.HTTP)), jsonschema.Draft202012Validator)
    assert choice["not_kept"] == 1
    line = json.loads(line_of(sequence(6, trace=trace)))
    jsonschema.validate(line, json.loads(schema_text(Format.FILE)), jsonschema.Draft202012Validator)
    del line["records"][0]["entropy"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(line, json.loads(schema_text(Format.FILE)), jsonschema.Draft202012Validator)
