"""The embedded default: true facts, text that follows from its seed, held-out rows that are held out, sizes."""

import json
from itertools import islice
from pathlib import Path

import pytest

import refpeft
from refpeft.embedded import corpus, facts, make, records
from refpeft.tokenizer import Tokenizer

HERE = Path(refpeft.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def topics():
    return facts.topics()


@pytest.fixture(scope="module")
def sets():
    return records.records(make.SEED, make.TRAIN_ROWS, make.HELD_OUT_ROWS)


def test_the_tables_hold_what_their_size_says(topics):
    sizes = {name: len(topic.rows) for name, topic in topics.items()}
    assert sizes == {"element": 91, "country": 160, "planet": 8, "unit": 35, "number": 399}


@pytest.mark.parametrize(
    ("topic", "name", "values"),
    [
        ("element", "neon", ("Ne", 10, 2, 18, "nonmetal", "gas")),
        ("element", "mercury", ("Hg", 80, 6, 12, "metal", "liquid")),
        ("element", "uranium", ("U", 92, 7, "metal", "solid")),
        ("country", "Guinea-Bissau", ("Bissau", "Africa", "GW", "coastal")),
        ("country", "Nepal", ("Kathmandu", "Asia", "NP", "landlocked")),
        ("planet", "Saturn", (6, "gas giant", 120536)),
        ("unit", "lux", ("lx", "illuminance")),
        ("number", "248", ("two hundred and forty-eight", "CCXLVIII", "even")),
    ],
)
def test_a_row_of_each_table(topics, topic, name, values):
    assert tuple(topics[topic].rows[name].values()) == values


def test_known_columns_of_the_periodic_table(topics):
    columns = {}
    for name, row in topics["element"].rows.items():
        columns.setdefault(row.get("group"), []).append(name)
    assert columns[1] == ["hydrogen", "lithium", "sodium", "potassium", "rubidium", "caesium"]
    assert columns[4] == ["titanium", "zirconium", "hafnium"]
    assert columns[11] == ["copper", "silver", "gold"]
    assert columns[14] == ["carbon", "silicon", "germanium", "tin", "lead"]
    assert columns[18] == ["helium", "neon", "argon", "krypton", "xenon", "radon"]
    assert len(columns[None]) == 15 + 6  # lanthanides, and the actinides up to plutonium


@pytest.mark.parametrize(
    ("topic", "field"), [("element", "symbol"), ("element", "number"), ("country", "code"), ("country", "capital")]
)
def test_what_should_tell_things_apart_does(topics, topic, field):
    values = [row[field] for row in topics[topic].rows.values()]
    assert len(values) == len(set(values))


def test_every_landlocked_country_is_in_the_table(topics):
    assert facts._names(facts._LANDLOCKED) <= topics["country"].rows.keys()


def test_the_corpus_follows_from_its_seed():
    assert list(islice(corpus.Writer(1), 50)) == list(islice(corpus.Writer(1), 50))
    assert list(islice(corpus.Writer(1), 50)) != list(islice(corpus.Writer(2), 50))


def test_every_fact_is_worded_in_every_way_that_is_asked_for(topics):
    for topic in topics.values():
        for field in {field for row in topic.rows.values() for field in row}:
            for table in (corpus._STATEMENTS, corpus._FOLLOWING, corpus._QUESTIONS):
                assert len(table[topic.name, field]) >= 2
    assert all("{v}" not in question for questions in corpus._QUESTIONS.values() for question in questions)


def test_no_document_shows_the_form_of_the_records_or_an_unfilled_place():
    for document in islice(corpus.Writer(3), 3000):
        assert "Record" not in document
        assert '":' not in document
        assert "{e}" not in document and "{v}" not in document and "None" not in document


def test_arithmetic_is_right():
    lines = [line for text in islice(corpus.Writer(4), 2000) for line in text.splitlines() if " = " in line]
    assert len(lines) > 200
    for line in lines:
        left, right = line.replace(" x ", " * ").replace(" : ", " / ").split(" = ")
        assert eval(left) == int(right)  # our own text: digits and four signs


def test_held_out_things_occur_in_no_training_row(sets):
    train, held_out = ({row["prompt"].split(":")[0] for row in rows} for rows in sets)
    assert len(sets[0]) == make.TRAIN_ROWS and len(sets[1]) == make.HELD_OUT_ROWS
    assert train.isdisjoint(held_out)
    assert len({row["prompt"] for rows in sets for row in rows}) == make.TRAIN_ROWS + make.HELD_OUT_ROWS


def test_a_completion_is_the_asked_fields_in_the_asked_order(sets, topics):
    for row in sets[0] + sets[1]:
        head, asked = row["prompt"].removeprefix("Record of the ").removesuffix("\n").split(": ")
        topic, name = head.split(" ", 1)
        fields = asked.split(", ")
        assert list(json.loads(row["completion"]).items()) == [(f, topics[topic].rows[name][f]) for f in fields]


def test_the_tokenizer_can_be_made_again():
    assert make.make_tokenizer().to_str() == make.make_tokenizer().to_str()


def test_first_weights_fit_the_configuration():
    weights = make.first_weights()
    assert sum(weight.size for weight in weights.values()) == 1_869_504
    assert (make.first_weights()["model.norm.weight"] == 1).all()


# The files that ship --------------------------------------------------------------------------------------------------

shipped = pytest.mark.skipif(not (HERE / "model.safetensors").exists(), reason="the embedded model is not made yet")


@shipped
def test_what_ships_is_what_the_recipe_makes(sets):
    for name, rows in zip(("train.jsonl", "held_out.jsonl"), sets, strict=True):
        assert [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()] == rows
    assert (HERE / "tokenizer.json").read_text("utf-8") == make.make_tokenizer().to_str()
    assert json.loads((HERE / "config.json").read_text("utf-8")) == make.CONFIG


@shipped
def test_what_ships_is_below_five_megabytes():
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) < 5_000_000


@shipped
def test_every_record_fits_the_model_and_comes_back_from_its_tokens(sets):
    tokenizer = Tokenizer.load(HERE)
    for row in sets[0] + sets[1]:
        text = row["prompt"] + row["completion"]
        ids = tokenizer.encode(text)
        assert len(ids) < 80 and tokenizer.decode(ids) == text
        assert len(tokenizer.encode(row["completion"])) < 56
