"""`refpeft data` on rows that have labels or tags, and `--fields`."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from refpeft.cli import main


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`refpeft data` on a file of this name and text; the result."""
    monkeypatch.chdir(tmp_path)

    def data(name, text, *args):
        (tmp_path / name).write_text(text)
        return CliRunner().invoke(main, ["data", name, *map(str, args)])

    return data


def test_labels_are_counted_and_a_row_is_shown(data):
    result = data("a.tsv", "fine\t1\nbad film\t0\ngreat\t1\n", "--row", 2)
    assert result.stdout.splitlines() == [
        "a.tsv: 3 rows, format label, for classify, regress, embed",
        "2 labels: 0 1, 1 2",
        "the file has no header: its columns are read as text and label, for the second is a number in every row",
        "",
        "row 2, line 2",
        "text: bad film",
        "label: 0",
    ]


def test_tags_are_counted_as_json(data):
    found = json.loads(data("a.conll", "Peter B-PER\nsleeps O\n\n", "--json").stdout)
    assert found["format"] == "tags" and found["tasks"] == ["tag"] and found["labels"] == {"B-PER": 1, "O": 1}
    assert found["example"] == {"line": 1, "words": ["Peter", "sleeps"], "tags": ["B-PER", "O"]}


def test_unused_columns_are_said(data):
    assert "columns that are not used: id" in data("a.csv", "id,text_a,text_b\n1,a,b\n").stdout.splitlines()


def test_columns_have_names(data):
    text = data("a.csv", "q,a\nWhy?,So.\n", "--fields", "source=q, target=a").stdout
    assert text.startswith("a.csv: 1 rows, format source\n") and "Why?\n[learned]So.<|endoftext|>[/learned]" in text


@pytest.mark.parametrize(
    "args, message",
    [
        (["--row", 2], "--row is 2, but there are 1 rows"),
        (["--fields", "text"], "--fields is 'text': expected text=COLUMN,label=COLUMN"),
        (["--fields", "text=q,text=a"], "each of a format's columns once"),
        (["--fields", "=q"], "--fields is '=q'"),
        (["--fields", "text_a=qq"], "no column 'qq', which fields.text_a names"),
        (["--format", "labels"], "format 'labels' is unknown"),
    ],
)
def test_wrong_options_are_errors(data, args, message):
    result = data("a.csv", "text_a,text_b\nWhy?,So.\n", *args)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_a_run_reads_columns_by_their_names_and_knows_them_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("q,a\nWhy?,So.\nWhen?,Now.\n")
    (tmp_path / "run.toml").write_text('[data]\nfile = "a.csv"\nfields = {source = "q", target = "a"}\n')
    flags = ["--data", "a.csv", "--fields", "source=q,target=a"]
    for out, source in (("by_flags", flags), ("by_file", ["run.toml"])):
        result = CliRunner().invoke(main, ["train", *source, "--steps", "1", "--length", "32", "--out", out])
        assert result.exit_code == 0, result.stderr
        run = tomllib.loads((Path(out) / "run.toml").read_text())
        assert run["data"]["fields"] == {"source": "q", "target": "a"} and run["data"]["format"] == "source"
    result = CliRunner().invoke(main, ["eval", "--adapter", out, "--data", "a.csv", "--json"])
    assert json.loads(result.stdout)["rows"] == 2
    result = CliRunner().invoke(main, ["train", "run.toml", "--fields", "source=qq", "--steps", "1", "--out", "b"])
    assert result.exit_code == 2 and "no column 'qq', which fields.source names" in result.stderr
