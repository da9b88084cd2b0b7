"""Traces as tables: a row per token, with what the file says."""

import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.support.traces import line, varied, written
from vllm_entropix.cli.main import app
from vllm_entropix.observability.export import answer_columns, answers_to_pandas, columns, to_csv, to_pandas, to_parquet
from vllm_entropix.records.scores import AnswerScores
from vllm_entropix.settings.errors import ConfigError

LINES = [
    line(["a", "\n", "é"], forced=[1], not_kept=1),
    line(["b"], name="second", index=3, metrics=[(None, None)]),
    *(varied(5, seed, name=f"more {seed}") for seed in range(70)),
]


@pytest.fixture
def traces(tmp_path):
    return written(tmp_path / "traces.jsonl", *LINES)


def test_a_row_per_record(traces):
    table = to_pandas(traces)
    pd.testing.assert_frame_equal(table, to_pandas(LINES))
    assert tuple(table.columns) == columns()
    assert len(table) == sum(len(line.records) for line in LINES)
    row = table.iloc[1]
    entry = LINES[0].records[1]
    assert (row.request_id, row["index"], row.position, row.token_id, row.text) == ("request", 0, 1, entry.token_id, "\n")
    assert row.regime == entry.regime == "HELV"
    assert row.forced
    assert row.entropy == np.float32(entry.entropy)
    assert list(zip(row.alternative_ids, row.alternative_probabilities, strict=True)) == entry.alternatives
    assert np.isnan(table[table.request_id == "second"].entropy).all()
    last = table[table.request_id == "more 69"]
    assert last.varentropy.tolist() == [np.float32(entry.varentropy) for entry in LINES[-1].records]


def test_a_row_per_answer(traces, tmp_path):
    table = answers_to_pandas(traces)
    assert tuple(table.columns) == answer_columns()
    assert len(table) == len(LINES)
    first, second = table.iloc[0], table.iloc[1]
    assert (first.request_id, first.text, first.tokens, first.finish_reason) == ("request", "a\né", 1, "stop"), "one is forced"
    assert first.entropy_mean == pytest.approx(LINES[0].records[0].entropy)
    assert (second["index"], np.isnan(second.entropy_mean), second.share_adaptive) == (3, True, 1)
    # What a line says of all its tokens comes before what the records that were kept say.
    told = LINES[0].model_copy(update={"scores": AnswerScores(tokens=3, entropy_mean=7)})
    assert answers_to_pandas([told]).iloc[0].entropy_mean == 7
    path = tmp_path / "answers.csv"
    ended = CliRunner().invoke(app, ["export", str(traces), "--answers", "-o", str(path)])
    assert (ended.exit_code, ended.output) == (0, f"wrote {path}: {len(LINES)} answers\n")
    assert pd.read_csv(path).entropy_max.tolist() == pytest.approx(table.entropy_max.tolist(), nan_ok=True)


def test_parquet_gives_the_table_back(traces, tmp_path):
    path = tmp_path / "traces.parquet"
    table = to_pandas(traces)
    assert to_parquet(traces, path) == len(table)
    again = pd.read_parquet(path)
    for name in columns():
        assert [str(value) for value in again[name]] == [str(value) for value in table[name]] or name.startswith("alternative")
    assert [list(ids) for ids in again.alternative_ids] == list(table.alternative_ids)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_command(traces, tmp_path, suffix):
    path = tmp_path / f"table.{suffix}"
    ended = CliRunner().invoke(app, ["export", str(traces), str(traces), "-o", str(path)])
    assert ended.exit_code == 0, ended.output
    table = pd.read_parquet(path) if suffix == "parquet" else pd.read_csv(path, keep_default_na=False)
    assert len(table) == 2 * len(to_pandas(traces))
    assert table.text[1] == "\n"


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    texts = [
        "=cmd|' /C calc'!A0",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\uff1d1",
        "a=1",
        " =1",
        "",
        "'",
        "1",
        "a\r=1",
        '","',
        "\n",
    ]
    path, other = tmp_path / "table.csv", tmp_path / "table.parquet"
    source = [line(texts, name="=1+1")]
    to_csv(source, path)
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    assert table.text.tolist() == [f"'{text}" for text in texts[:7]] + texts[7:]
    assert set(table.request_id) == {"'=1+1"}
    to_parquet(source, other)
    assert pd.read_parquet(other).text.tolist() == texts, "only a CSV is opened by spreadsheets as it is"


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_numbers_that_there_arent(tmp_path, suffix):
    """A row without a finite logit."""
    nothing = line(["a"])
    record = nothing.records[0]
    numbers = ("entropy", "varentropy", "temperature", "top_p", "top_k", "min_p", "confidence")
    nothing.records = [record.model_copy(update={**dict.fromkeys(numbers), "alternatives": [(5, None)]})]
    path = tmp_path / f"table.{suffix}"
    (to_parquet if suffix == "parquet" else to_csv)([nothing, line(["b"])], path)
    table = pd.read_parquet(path) if suffix == "parquet" else pd.read_csv(path)
    assert table[list(numbers)].isna().sum(axis=1).tolist() == [len(numbers), 0]


def test_other_formats_are_refused(traces, tmp_path):
    ended = CliRunner().invoke(app, ["export", str(traces), "-o", str(tmp_path / "table.xlsx")])
    assert isinstance(ended.exception, ConfigError)
    assert str(ended.exception) == "can't export to 'table.xlsx': its name should end in .parquet or .csv"


@pytest.mark.parametrize("missing", ["pandas", "pyarrow"])
def test_what_is_missing_is_named(traces, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"needs {missing}.*install vllm-entropix\[report\]"):
        to_parquet(traces, tmp_path / "table.parquet")


def test_nothing_gives_an_empty_table():
    table = to_pandas([])
    assert tuple(table.columns) == columns()
    assert table.empty
