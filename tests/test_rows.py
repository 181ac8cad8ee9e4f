"""Files are read as they were written, with the lines of their rows and of their mistakes."""

import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refpeft import RefpeftError
from refpeft.rows import Problems, read_rows

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.lists(st.text("abcxyz _#1", min_size=1).map(str.strip).filter(bool), min_size=3, max_size=5, unique=True)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


def fields(path, **options):
    return [row.fields for row in read_rows(path, **options)]


def problems(path):
    with pytest.raises(RefpeftError) as error:
        read_rows(path)
    return str(error.value)


# -- what was written is read ------------------------------------------------------------------------------------------


@st.composite
def tables(draw, cell):
    names = draw(NAMES)
    return names, draw(st.lists(st.lists(cell, min_size=len(names), max_size=len(names)), min_size=1, max_size=6))


@given(tables(TEXTS.filter(lambda text: "\0" not in text)))
@settings(deadline=None)
def test_a_csv_of_any_texts_reads_back(tmp_path_factory, table):
    names, cells = table
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *cells])
    assert fields(path, known=names) == [dict(zip(names, row, strict=True)) for row in cells]


@given(tables(TEXTS.filter(lambda text: not {*"\t\n\r"} & {*text})))
@settings(deadline=None)
def test_a_tsv_of_any_texts_reads_back_quotation_marks_and_all(tmp_path_factory, table):
    names, cells = table
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    path.write_bytes("\n".join("\t".join(row) for row in [names, *cells]).encode())
    assert fields(path, known=names) == [dict(zip(names, row, strict=True)) for row in cells]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=6), st.sampled_from([None, 1]))
@settings(deadline=None)
def test_json_of_any_values_reads_back(tmp_path_factory, rows, indent):
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.json").write_text(json.dumps(rows, indent=indent), "utf-8")
    (folder / "a.jsonl").write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert fields(folder / "a.json") == fields(folder / "a.jsonl") == rows


# -- tables without a header -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize(
    "labels, what",
    [
        (["1", "0", "1", "1"], "a number in every row"),
        (["3.5", "0", "-1", "2e3"], "a number in every row"),
        (["1"], "a number in every row"),
        (["pos", "neg", "neg", "pos"], "one of 2 labels in every row"),
    ],
)
def test_texts_and_labels_need_no_header(write, name, labels, what):
    notes, between = [], "\t" if name == "a.tsv" else ","
    path = write(name, "".join(f"a fine film {i}{between}{label}\n" for i, label in enumerate(labels)))
    assert fields(path, notes=notes) == [{"text": f"a fine film {i}", "label": x} for i, x in enumerate(labels)]
    assert notes == [f"the file has no header: its columns are read as text and label, for the second is {what}"]


def test_the_first_row_of_a_file_without_a_header_is_a_row_whatever_it_says(write):
    rows = "what is a label\ttext\nwhy\ttext\ntell me\tnumber\nhow\tnumber\n"
    assert len(fields(write("a.tsv", rows), known=["text", "label"])) == 4


@pytest.mark.parametrize(
    "text",
    [
        "review\tlabel\na\tlabel\nb\tlabel\nc\t0\nd\t0\n",  # a known name
        "my text\tmy label\na\tmy label\nb\tx\nc\tx\nd\tx\n",  # one that was named
        "q\ta\n" + "x\tyes\ny\tno\n" * 6,  # a header's name is not repeated
        "text\tstars\na\t3\nb\t4\nc\t3\nd\t4\n",
        "\n".join(f"q{i}\tanswer {i % 101}" for i in range(300)),  # too many for labels
        "a\tyes\nb\tno\nc\tyes",  # too few rows to tell
        "\n".join(f"q{i}\t{'a label of thirty letters, of two'[: 31 - i % 2]}" for i in range(8)),  # too long
        "a\tb\tc\n1\t2\t3\n",
        "id\tlabel\t*\ttext\n1\t0\t*\tfine\n",  # nearly CoLA's four
        "id\t1\tx\ttext\n1\t0\t*\tfine\n",
    ],
)
def test_a_header_is_a_header(write, text):
    notes = []
    columns = tuple(text.split("\n")[0].split("\t"))
    found = fields(write("a.tsv", text), known=["text", "label", "my text", "my label"], notes=notes)
    assert tuple(found[0]) == columns and not notes and len(found) == len(text.strip().split("\n")) - 1


def test_cola_has_no_header(write):
    notes = []
    path = write("train.tsv", "gj04\t1\t\tThey drank the pub dry.\ngj04\t0\t*\tThey drank the pub.\n")
    assert fields(path, notes=notes)[1] == {
        "source": "gj04",
        "label": "0",
        "star": "*",
        "sentence": "They drank the pub.",
    }
    assert notes == ["the file has no header: its columns are read as CoLA's (source, label, star, sentence)"]


def test_broken_lines_do_not_hide_that_a_header_is_missing(write):
    problem = problems(write("a.tsv", "good\t1\nbad\t0\tx\nfine\t1\nworse\n"))
    assert "a.tsv:2: 3 fields: expected 2 (text, label)" in problem and "a.tsv:4: 1 fields" in problem
    assert "a.tsv:1:" not in problem


# -- text files --------------------------------------------------------------------------------------------------------

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
"""


@pytest.mark.parametrize("name", ["a.conll", "a.bio", "a.iob", "a.txt"])
def test_words_come_first_and_tags_last(write, name):
    rows = read_rows(write(name, CONLL))
    assert [row.line for row in rows] == [3, 6]
    assert [row.fields for row in rows] == [
        {"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"words": ["Peter"], "tags": ["B-PER"]},
    ]


def test_words_may_hold_white_space_between_tabs(write):
    rows = fields(write("a.conll", "New York\tLOC\r\nis\u00a0big\tO\r\n \r\n\r\nyes\tO"))
    assert [row["words"] for row in rows] == [["New York", "is\u00a0big"], ["yes"]]
    assert [row["tags"] for row in rows] == [["LOC", "O"], ["O"]]
    assert fields(write("b.conll", " is\u00a0big  O \n"))[0] == {"words": ["is\u00a0big"], "tags": ["O"]}


def test_numbers_may_be_words(write):
    assert fields(write("a.conll", "1 O\n2 O\n"))[0]["words"] == ["1", "2"]
    assert [row["words"] for row in fields(write("b.conll", "1 CD O\n\nto TO O\n"))] == [["1"], ["to"]]


def test_words_alone_have_no_tags(write):
    assert fields(write("a.conll", "Peter\nsleeps\n")) == [{"words": ["Peter", "sleeps"], "tags": None}]


def test_attributes_are_a_prompt_and_the_sentence_its_completion(write):
    rows = read_rows(write("a.txt", "name : X | food : Y||X serves Y . \n\nname : Z || Z is a pub .\n"))
    assert [(row.line, row.fields) for row in rows] == [
        (1, {"prompt": "name : X | food : Y ||", "completion": " X serves Y ."}),
        (3, {"prompt": "name : Z ||", "completion": " Z is a pub ."}),
    ]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.conll", "EU B-ORG\nrejects\n", "a.conll:2: 1 columns: expected 2, as in the first line"),
        ("a.conll", "1 EU _ NNP _ _ 2 nsubj _ _\n", "a.conll:1: 10 columns: expected at most 5, the word first"),
        ("a.bio", "\n1\tEU\tO\n2\tis\tO\n", "a.bio:2: the first column counts the words"),
        ("a.conll", "-DOCSTART-\n\n", "a.conll has no rows"),
        ("a.txt", "a||b\nc\n", "a.txt:2: expected `attributes||sentence`"),
        ("a.txt", "a||b\nc||\n", "a.txt:2: expected `attributes||sentence`"),
        ("a.txt", "a||b||c\n", "a.txt:1: expected `attributes||sentence`"),
        ("a.txt", "\nThis is a line of some text.\n", "a.txt:2: a .txt file holds lines of `attributes||sentence`, or"),
        ("a.txt", "", "a.txt has no rows"),
        ("a.md", "", "expected a file whose name ends in .jsonl, .ndjson, .json, .csv, .tsv, .txt, .conll, .bio, .iob"),
    ],
)
def test_a_broken_text_file_is_an_error_with_its_line(write, name, text, message):
    assert message in problems(write(name, text))


def test_problems_without_any_do_not_stop():
    Problems("a").stop()


@pytest.mark.real
@pytest.mark.skipif("REFPEFT_DATA" not in os.environ, reason="needs REFPEFT_DATA")
@pytest.mark.parametrize(
    "name, rows, columns",
    [
        ("sst2/train.tsv", 6920, ["text", "label"]),
        ("sst2/dev.tsv", 872, ["text", "label"]),
        ("sst2/test.tsv", 1821, ["text", "label"]),
        ("e2e/train.txt", 42061, ["prompt", "completion"]),
        ("e2e/valid.txt", 4672, ["prompt", "completion"]),
    ],
)
def test_real_files(name, rows, columns):
    path = Path(os.environ["REFPEFT_DATA"]) / name
    found = read_rows(path)
    assert len(found) == rows and [row.line for row in found] == list(range(1, rows + 1))
    assert all(list(row.fields) == columns for row in found)
    if name.startswith("sst2"):
        lines = path.read_text("utf-8").rstrip("\n").split("\n")
        assert ["\t".join(row.fields.values()) for row in found] == lines
