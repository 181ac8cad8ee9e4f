"""Rows become items: the columns tell the format, also by GLUE's names, or `fields` names them."""

import json
import os
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import RefpeftError
from refpeft.formats import FORMATS, read_items
from refpeft.items import Chat, Labelled, Plain, Tagged, label_counts, label_lines, references
from refpeft.settings import Data


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes((rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))).encode())
        return path

    return write


def problems(path, *args, **options):
    with pytest.raises(RefpeftError) as error:
        read_items(path, *args, **options)
    return str(error.value)


# -- GLUE --------------------------------------------------------------------------------------------------------------

PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
MNLI = ["index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2"]
GLUE = {
    "cola/train": (
        [["gj04", "1", "", 'They "drank" it.'], ["cj99", "0", "*", "They it drank."]],
        [Labelled('They "drank" it.', None, 1), Labelled("They it drank.", None, 0)],
    ),
    "cola/test": ([["index", "sentence"], ["0", "Bill sneezed"]], [Labelled("Bill sneezed")]),
    "sst2/train": (
        [["sentence", "label"], ['a "fine', "1"], ["bad", "0"], ["good ", "1"]],
        [Labelled('a "fine', None, 1), Labelled("bad", None, 0), Labelled("good ", None, 1)],
    ),
    "sst2/test": ([["index", "sentence"], ["0", "lovely"]], [Labelled("lovely")]),
    "mrpc/train": (
        [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "702876", "702977", 'He said " no', "No ."]],
        [Labelled('He said " no', "No .", 1)],
    ),
    "mrpc/test": (
        [["index", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "1", "2", "One .", "Two ."]],
        [Labelled("One .", "Two .")],
    ),
    "stsb/train": (
        [
            [
                "index",
                "genre",
                "filename",
                "year",
                "old_index",
                "source1",
                "source2",
                "sentence1",
                "sentence2",
                "score",
            ],
            ["0", "captions", "MSRvid", "2012test", "1", "none", "none", "A plane.", "An air plane.", "5.000"],
            ["1", "captions", "MSRvid", "2012test", "4", "none", "none", "A man.", "A flute.", "3"],
        ],
        [Labelled("A plane.", "An air plane.", 5.0), Labelled("A man.", "A flute.", 3.0)],
    ),
    "stsb/test": (
        [
            ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"],
            ["0", "captions", "MSRvid", "2012test", "1", "none", "none", "A girl.", "A boy."],
        ],
        [Labelled("A girl.", "A boy.")],
    ),
    "rte/train": (
        [["index", "sentence1", "sentence2", "label"], ["0", "No weapons.", "Weapons.", "not_entailment"]],
        [Labelled("No weapons.", "Weapons.", "not_entailment")],
    ),
    "rte/test": ([["index", "sentence1", "sentence2"], ["0", "a", "b"]], [Labelled("a", "b")]),
    "qnli/train": (
        [["index", "question", "sentence", "label"], ["0", "When?", "In 1799.", "entailment"]],
        [Labelled("When?", "In 1799.", "entailment")],
    ),
    "qnli/test": ([["index", "question", "sentence"], ["0", "When?", "Now."]], [Labelled("When?", "Now.")]),
    "qqp/train": (
        [["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["133273", "1", "2", "How?", "Why?", "0"]],
        [Labelled("How?", "Why?", 0)],
    ),
    "qqp/test": ([["id", "question1", "question2"], ["0", "Would?", "Should?"]], [Labelled("Would?", "Should?")]),
    "mnli/train": (
        [[*MNLI, "label1", "gold_label"], ["0"] * 8 + ["Yes.", "No.", "neutral", "contradiction"]],
        [Labelled("Yes.", "No.", "contradiction")],
    ),
    "mnli/dev": (
        [[*MNLI, *(f"label{i}" for i in range(1, 6)), "gold_label"], ["0"] * 8 + ["a", "b"] + ["neutral"] * 6],
        [Labelled("a", "b", "neutral")],
    ),
    "mnli/test": ([MNLI, ["0"] * 8 + ["a", "b"]], [Labelled("a", "b")]),
    "wnli/train": (
        [["index", "sentence1", "sentence2", "label"], ["0", "It fit.", "The box fit.", "1"]],
        [Labelled("It fit.", "The box fit.", 1)],
    ),
    "wnli/test": ([["index", "sentence1", "sentence2"], ["0", "a", "b"]], [Labelled("a", "b")]),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue(write, name):
    lines, expected = GLUE[name]
    found = read_items(write("".join("\t".join(line) + "\n" for line in lines), "train.tsv"))
    assert found.items == expected
    assert list(map(type, (item.label for item in found.items))) == [type(item.label) for item in expected]
    assert found.format == ("pair" if expected[0].text_b else "label")
    assert not {"label", "gold_label", "score", "Quality", "is_duplicate", "sentence"} & {*found.unused}


def test_each_broken_line_of_qqp_is_told(write):
    rows = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"]
    rows += [f"{i}\t1\t2\tHow?\tWhy?\t0" if i % 3 else f"{i}\t1\tHow" for i in range(1, 10)]
    problem = problems(write("\n".join(rows), "train.tsv"))
    assert [line.split(": ")[0].rpartition(":")[2] for line in problem.split("\n")] == ["4", "7", "10"]
    assert "train.tsv:4: 3 fields: expected 6 (id, qid1, qid2, question1, question2, is_duplicate)" in problem


# -- labels ------------------------------------------------------------------------------------------------------------


def labels(path, **options):
    return [item.label for item in read_items(path, **options).items]


@pytest.mark.parametrize(
    "written, read",
    [
        (["0", "1", "-1"], [0, 1, -1]),
        (["0", "1.5", "2"], [0.0, 1.5, 2.0]),
        (["1.0", "2.0"], [1.0, 2.0]),
        (["1", "2", "many"], ["1", "2", "many"]),
        ([" yes", "no "], ["yes", "no"]),
        (["1_0", "nan"], ["1_0", "nan"]),
        (["", "", ""], [None, None, None]),
    ],
)
def test_labels_of_a_table_are_numbers_where_all_of_them_are(write, written, read):
    found = labels(write("text,label\n" + "".join(f"a,{label}\n" for label in written), "a.csv"))
    assert found == read and list(map(type, found)) == list(map(type, read))


@pytest.mark.parametrize(
    "written, read",
    [
        ([0, 1], [0, 1]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([1, 0.5], [1.0, 0.5]),
        (["1", "0"], [1, 0]),
        (["a", "b"], ["a", "b"]),
        ([True, False], [1, 0]),
        ([None, None], [None, None]),
    ],
)
def test_labels_of_json_are_what_they_are(write, written, read):
    found = labels(write([{"text": "a", "label": label} for label in written]))
    assert found == read and list(map(type, found)) == list(map(type, read))


def test_a_score_is_a_value_also_where_it_is_whole(write):
    path = write("sentence1,sentence2,score\na,b,3\nc,d,4\n", "a.csv")
    assert labels(path) == [3.0, 4.0] and isinstance(labels(path)[0], float)
    assert labels(write([{"text_a": "a", "text_b": "b", "score": 1}])) == [1.0]
    assert labels(write([{"text_a": "a", "text_b": "b", "score": None}])) == [None]
    assert labels(write("text_a,text_b,score\na,b,\n", "b.csv")) == [None]
    assert labels(write("text_a,text_b,score\na,b, 4\n", "c.csv")) == [4.0]


@given(st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_of_a_table_are_those_that_were_written(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("labels") / "a.tsv"
    path.write_text("".join(f"text {i}\t{number}\n" for i, number in enumerate(numbers)))
    whole = all(isinstance(number, int) for number in numbers)
    assert labels(path) == (numbers if whole else list(map(float, numbers)))


@pytest.mark.parametrize("columns", [("text", "label"), ("index", "sentence"), ("my text", "my class")])
def test_names_of_columns_are_a_header_also_where_they_are_labels(write, columns):
    table = "\n".join("\t".join(row) for row in [columns, *[("x", columns[1]), ("y", "no")] * 3])
    fields = {"text": "my text", "label": "my class"} if "my text" in columns else None
    found = read_items(write(table, "a.tsv"), fields=fields)
    assert len(found.items) == 6 and not found.notes


# -- tags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["words", "tokens"])
@pytest.mark.parametrize("tags", ["tags", "ner_tags"])
@pytest.mark.parametrize("values", [["B-PER", "O"], [1, 0]])
def test_words_have_tags_by_name_or_number(write, words, tags, values):
    found = read_items(write([{"id": "0", words: ["Peter", "sleeps"], tags: values, "pos_tags": [1, 2]}]))
    assert found.items == [Tagged(["Peter", "sleeps"], values)] and found.format == "tags"
    assert found.unused == ["id", "pos_tags"]


def test_a_file_of_words_and_tags(write):
    found = read_items(write("Peter B-PER\nsleeps O\n\nYes O\n", "a.conll"))
    assert found.items == [Tagged(["Peter", "sleeps"], ["B-PER", "O"]), Tagged(["Yes"], ["O"])]
    assert read_items(write("Peter\nsleeps\n", "b.conll")).items == [Tagged(["Peter", "sleeps"])]


# -- texts that go on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("source", "target"), ("document", "summary"), ("article", "highlights")])
def test_a_source_ends_in_a_line_break(write, names):
    found = read_items(write([dict(zip(names, ("Long text.", "Text."), strict=True)) | {"id": 3}]))
    assert found.items == [Plain("Long text.\n", "Text.")] and found.format == "source" and found.unused == ["id"]


def test_rows_of_the_same_prompt_are_its_references(write):
    found = read_items(write("a : b||One .\nc : d||Two .\na : b||Three .\n", "e2e.txt"))
    assert found.format == "prompt" and len(found.items) == 3
    assert references(found.items) == {"a : b ||": [" One .", " Three ."], "c : d ||": [" Two ."]}
    assert references([Labelled("a")]) == {}


# -- which format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, format",
    [
        ("instruction output text", "instruction"),
        ("prompt completion label", "prompt"),
        ("text label", "label"),
        ("text", "text"),
        ("text score", "text"),  # of a corpus, such as FineWeb's
        ("text sentence", "text"),
        ("text source", "text"),
        ("sentence label", "label"),
        ("sentence", "label"),
        ("premise hypothesis", "pair"),
        ("sentence question", "pair"),
        ("label text_a text_b", "pair"),
        ("sentence1 sentence2 label gold_label", "pair"),
    ],
)
def test_the_columns_tell_the_format(write, columns, format):
    assert read_items(write([dict.fromkeys(columns.split(), "a")])).format == format


def test_columns_by_our_names_come_before_those_by_others(write):
    rows = [{"sentence1": "a", "sentence2": "b", "gold_label": "no", "label": "yes"}]
    found = read_items(write(rows))
    assert found.items == [Labelled("a", "b", "yes")] and found.unused == ["gold_label"]
    assert read_items(write([{"text": "ours", "sentence": "theirs"}]), "label").items == [Labelled("ours")]


def test_rows_to_be_predicted_are_read_in_the_format_that_is_named(write):
    assert read_items(write([{"text": "a"}]), "label").items == [Labelled("a")]
    assert read_items(write([{"words": ["a"]}]), "tags").items == [Tagged(["a"])]
    assert "its columns (words) fit no format" in problems(write([{"words": ["a"]}]))


def test_formats_serve_tasks_that_there_are():
    tasks = {"causal-lm", "seq2seq", "classify", "regress", "tag", "mlm", "embed"}
    assert {task for f in FORMATS.values() for task in f.tasks} == tasks
    assert all(f.tasks for f in FORMATS.values())


def test_the_table_of_the_readme_is_that_of_the_formats():
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8").partition("\n## Tasks\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([a-z_, ?]+) \|.*\| ([a-z0-9, -]+) \|$", readme, re.M)
    for row, (name, f) in zip(rows, FORMATS.items(), strict=True):
        columns = ", ".join([*f.columns, *(f"{column}?" for column in f.optional)])
        assert row == (name, columns, ", ".join(f.tasks))


def test_the_configuration_knows_the_formats():
    assert get_args(Data.model_fields["format"].annotation) == ("auto", *FORMATS)


# -- names for columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, between", [("a.csv", ","), ("a.tsv", "\t"), ("a.jsonl", None)])
def test_columns_may_have_any_names(write, name, between):
    rows = [{"id": "7", "my review": "fine", "label": "x", "stars": "4"}]
    table = between and "\n".join(between.join(line) for line in (rows[0], rows[0].values()))
    found = read_items(write(table or rows, name), fields={"text": "my review", "label": "stars"})
    assert found.items == [Labelled("fine", None, 4)] and found.unused == ["id"]
    assert found.rows[0].fields == rows[0]  # as the file has it


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "row, fields, item",
    [
        ({"prompt": "q"}, {}, Plain("q", "")),
        ({"article": "a"}, {}, Plain("a\n", "")),
        ({"question": "q"}, {"prompt": "question", "completion": "answer"}, Plain("q", "")),
        ({"source": "imdb", "sentence": "fine"}, {}, Labelled("fine")),  # not a source without its target
        ({"conversations": [{"from": "human", "value": "q"}]}, {}, Chat([USER, {"role": "assistant", "content": ""}])),
    ],
)
def test_answers_may_be_missing_where_they_are_to_be_predicted(write, row, fields, item):
    found = read_items(write([row]), fields=fields, answers=False)
    assert found.items == [item] and found.rows[0].fields == row
    if isinstance(item, Plain):
        assert "expected" in problems(write([row])) or "answer" in problems(write([row]), fields=fields)


@pytest.mark.parametrize(
    "columns, fields, item",
    [
        ("q a", {"prompt": "q", "completion": "a"}, Plain("q!", "a!")),
        ("q a", {"source": "q", "target": "a"}, Plain("q!\n", "a!")),
        ("review", {"text": "review"}, Plain("", "review!")),
        ("review label", {"text": "review"}, Labelled("review!", None, "label!")),
        ("review stars label text", {"text": "review", "label": "stars"}, Labelled("review!", None, "stars!")),
        ("text gold", {"label": "gold"}, Labelled("text!", None, "gold!")),
        ("sentence gold", {"label": "gold"}, Labelled("sentence!", None, "gold!")),
        ("one two sentence", {"text_a": "two", "text_b": "one"}, Labelled("two!", "one!")),
        ("text_a text_b", {"text_a": "text_b", "text_b": "text_a"}, Labelled("text_b!", "text_a!")),
        ("prompt completion review", {"text": "review"}, Plain("", "review!")),
    ],
)
def test_the_format_is_one_that_has_the_named_columns(write, columns, fields, item):
    path = write([{name: f"{name}!" for name in columns.split()}])
    assert read_items(path, fields=fields).items == [item]


def test_a_named_score_is_a_value(write):
    assert labels(write([{"review": "a", "stars": 3}]), fields={"text": "review", "score": "stars"}) == [3.0]
    assert labels(write("a,stars\nfine,3\n", "a.csv"), fields={"text": "a", "score": "stars"}) == [3.0]


def test_named_tags_and_a_chosen_format(write):
    path = write([{"toks": ["a"], "labels": ["X"], "text": "a"}])
    assert read_items(path, "tags", {"words": "toks", "tags": "labels"}).items == [Tagged(["a"], ["X"])]


def test_what_is_to_be_predicted_may_be_missing_under_its_name(write):
    path = write([{"review": "a"}])
    fields = {"text": "review", "label": "stars"}
    assert read_items(path, "label", fields, answers=False).items == [Labelled("a")]
    assert "no column 'stars', which fields.label names: the file has review" in problems(path, "label", fields)
    assert "no column 'reviews'" in problems(path, "label", {"text": "reviews"}, answers=False)


@pytest.mark.parametrize(
    "format, fields, message",
    [
        (
            None,
            {"text": "revew"},
            "no column 'revew', which fields.text names: the file has review, stars; did you mean",
        ),
        (None, {"txt": "review"}, "fields: no format has a column 'txt': expected some of messages, "),
        (None, {"txt": "review"}, "did you mean 'text'?"),
        (
            "prompt",
            {"text": "review"},
            "the format 'prompt' does not have a column 'text': expected some of prompt, com",
        ),
        (None, {"text": "review", "label": "review"}, "the column 'review' is named 2 times"),
        (None, {"text": "review", "prompt": "stars"}, "fit no format: expected columns of one format in `fields`"),
        (None, {"source": "review"}, "its columns (source, stars) fit no format: expected source, target\n"),
        (None, {}, "fit no format: expected messages | conversations | instruction, output | prompt, completion |"),
        (None, {}, "| text_a, text_b | text, label | text; `fields` says which columns are which"),
        ("alpaca", {}, "format 'alpaca' is unknown"),
    ],
)
def test_wrong_names_are_errors(write, format, fields, message):
    assert message in problems(write([{"review": "fine", "stars": 4}]), format, fields) + "\n"


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a", "label": ["x"]}, "label is a list: expected a name or a number"),
        ({"text": "a", "label": float("nan")}, "label is nan: expected a name or a number"),
        ({"text": 3, "label": "x"}, "text is a int: expected text"),
        ({"text_a": "a", "text_b": None}, "text_b is null: expected text"),
        ({"text_a": "a", "text_b": "b", "score": "good"}, "score is 'good': expected a number"),
        ({"text_a": "a", "text_b": "b", "score": True}, "score is True: expected a number"),
        ({"text_a": "a", "text_b": "b", "score": float("inf")}, "score is inf: expected a number"),
        ({"source": "a", "target": None}, "target is null"),
        ({"words": "a b", "tags": "x y"}, "words is a str: expected a list of words"),
        ({"words": [], "tags": []}, "words is empty: expected a list of words"),
        ({"words": ["a", " "], "tags": [1, 2]}, "words[1] is empty: expected a word"),
        ({"words": ["a", 3], "tags": [1, 2]}, "words[1] is a int: expected a word"),
        ({"words": ["a"], "tags": "x"}, "tags is a str: expected a list with a tag for each word"),
        ({"words": ["a", "b"], "tags": ["x"]}, "1 tags for 2 words: expected a tag for each word"),
        ({"words": ["a", "b"], "tags": ["x", 1]}, "tags are not all names or all whole numbers"),
        ({"words": ["a", "b"], "tags": [True, False]}, "tags are not all names or all whole numbers"),
    ],
)
def test_a_wrong_row_is_an_error_with_its_line(write, row, message):
    problem = problems(write([row]))
    assert "rows.jsonl:1: " in problem and message in problem


def test_answers_of_another_kind_than_most_are_told_with_their_lines(write):
    rows = [{"text": "a", "label": label} for label in ("yes", 3, "no", None, "yes", "")]
    assert problems(write(rows)).split("\n") == [
        f"{write(rows)}:2: its label is a number, but most rows have a name",
        f"{write(rows)}:4: its label is missing, but most rows have a name",
        f"{write(rows)}:6: its label is missing, but most rows have a name",
    ]
    rows = [{"words": ["a"], "tags": tags} for tags in (["x"], [1], ["y"], None)]
    assert [line.partition(":")[2] for line in problems(write(rows)).split("\n")] == [
        "2: its tags is a number, but most rows have a name",
        "4: its tags is missing, but most rows have a name",
    ]


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items, counts, lines",
    [
        ([Labelled("a", None, x) for x in "bab"], {"a": 1, "b": 2}, ["2 labels: a 1, b 2"]),
        ([Labelled("a", None, x) for x in (10, 9, 10)], {9: 1, 10: 2}, ["2 labels: 9 1, 10 2"]),
        ([Labelled("a", None, x) for x in (1.5, 4.0, 0.5)], {}, ["values from 0.5 to 4, 2 on average"]),
        ([Labelled("a")], {}, ["no labels: they are to be predicted"]),
        ([Labelled("a", "b")], {}, ["no labels"]),
        ([Tagged(["a", "b"], ["O", "X"]), Tagged(["a"], ["O"])], {"O": 2, "X": 1}, ["2 tags: O 2, X 1"]),
        ([Tagged(["a"])], {}, ["no tags: they are to be predicted"]),
        ([Plain("a", "b")], {}, []),
        (
            [Labelled("a", None, i) for i in [*range(30), 25]],
            {i: 1 + (i == 25) for i in range(30)},
            [f"30 labels: {', '.join(f'{i} 1' for i in range(19))}, 25 2 and 10 rarer"],
        ),
    ],
)
def test_labels_are_counted(items, counts, lines):
    assert label_counts(items) == counts and list(label_counts(items)) == list(counts)
    assert label_lines(items) == lines


@pytest.mark.real
@pytest.mark.skipif("REFPEFT_DATA" not in os.environ, reason="needs REFPEFT_DATA")
def test_real_files():
    folder = Path(os.environ["REFPEFT_DATA"])
    sst = read_items(folder / "sst2" / "dev.tsv")
    assert sst.format == "label" and label_counts(sst.items) == {0: 428, 1: 444}
    e2e = read_items(folder / "e2e" / "valid.txt")
    assert e2e.format == "prompt" and len(e2e.items) == 4672 and len(references(e2e.items)) == 547


def test_a_column_that_is_nearly_one_of_a_format_is_told(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "lable": "x", "id": 1}\n')
    read = read_items(file)
    assert (read.format, read.unused) == ("text", ["lable", "id"])
    assert read.notes == ["the column 'lable' is not used; did you mean 'label'?"]
