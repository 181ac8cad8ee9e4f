"""What a run reads: which rows are held out, how many tokens a row may have, and what is counted of them."""

import json

import pytest
import tiny
import tiny_tokenizers

from refpeft import inputs, tasks
from refpeft.config import RunConfig
from refpeft.errors import RefpeftError
from refpeft.models.config import from_hf
from refpeft.settings import Data, Train

LLAMA = from_hf(tiny.LLAMA | {"max_position_embeddings": 2048})
SMALL = from_hf(tiny.LLAMA)
PLAIN, CHATML = tiny_tokenizers.plain(), tiny_tokenizers.chatml()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "rows.jsonl", [{"prompt": "a" * n, "completion": " yes"} for n in range(1, 21)])


def read(tokenizer=PLAIN, model=SMALL, seed=0, **data):
    return inputs.read(RunConfig(seed=seed, data=Data(**data)), model, tokenizer)


def lines(rows):
    return [example.line for example in rows.examples]


def test_a_share_of_the_rows_is_held_out_and_not_trained_on(file):
    found = read(file=file, eval_share=0.25)
    assert len(lines(found.held_out)) == 5 and sorted(lines(found.rows) + lines(found.held_out)) == [*range(1, 21)]
    assert lines(found.held_out) != list(range(1, 6)) and lines(read(file=file, eval_share=0.25).rows) == lines(
        found.rows
    )
    assert lines(read(file=file, eval_share=0.25, seed=1).held_out) != lines(found.held_out)
    assert len(lines(read(file=file, eval_share=0.001).held_out)) == 1
    run = RunConfig(data=Data(file=file, eval_share=0.25))
    assert lines(inputs.held_out_rows(run, SMALL, found.task)) == lines(found.held_out)
    assert inputs.held_out_rows(RunConfig(data=Data(file=file)), SMALL, found.task) is None


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    with pytest.raises(RefpeftError, match=r"data.eval_share 0.9 of 2 rows leaves none to train on"):
        read(file=file, eval_share=0.9)


def test_parts_of_a_row_are_held_out_together_and_counted_as_one(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "c" * 30}] * 6)
    found = read(file=file, eval_share=0.5, length=12, overlong="split")
    assert not set(lines(found.rows)) & set(lines(found.held_out))
    for rows in (found.rows, found.held_out):
        summary = rows.summary
        assert summary.rows == 3 and summary.examples == len(rows.examples) > 3
        assert summary.tokens == sum(map(len, rows.examples))
        assert summary.supervised_tokens == sum(example.targets for example in rows.examples) < summary.tokens


def test_held_out_rows_are_those_of_their_file_as_many_as_are_asked_for(tmp_path, file):
    held = write(tmp_path / "held.jsonl", [{"q": "b", "a": f"{n}"} for n in range(9)])
    mine = write(tmp_path / "mine.jsonl", [{"q": "b", "a": f"{n}"} for n in range(3)])
    data = {"file": mine, "eval_file": held, "fields": {"prompt": "q", "completion": "a"}}
    found = read(**data, eval_rows=4)
    assert lines(found.held_out) == [1, 2, 3, 4] and lines(found.rows) == [1, 2, 3]
    assert found.held_out.summary.rows == 4 and len(lines(read(**data).held_out)) == 9


def test_supervise_and_class_weights_are_the_tasks(tmp_path, file):
    assert read(file=file, supervise="all").rows.examples[9].targets == 11  # ten of the prompt, the answer, its end
    assert read(file=file).rows.examples[9].targets == 2
    rows = write(tmp_path / "labels.jsonl", [{"text": "a", "label": label} for label in ("x", "y", "x")])
    run = RunConfig(data=Data(file=rows), train=Train(class_weights=(1.0, 2.0)), labels=("y", "x"))
    task = inputs.read(run, SMALL, PLAIN).task
    assert task.labels == ("y", "x") and task.weights.tolist() == [1, 2]


def test_a_row_has_at_most_what_is_asked_for_or_the_models_positions_or_1024_tokens():
    assert inputs.row_length(None, SMALL) == inputs.row_length(64, SMALL) == 64
    assert inputs.row_length(None, LLAMA) == 1024 and inputs.row_length(2048, LLAMA) == 2048
    with pytest.raises(RefpeftError, match="length is 65, but the model was made for 64 positions"):
        inputs.row_length(65, SMALL)


def test_instructions_are_what_a_user_says_only_where_a_decoder_has_a_template(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"instruction": "hello", "output": "yes"}])
    for tokenizer, said in ((CHATML, True), (PLAIN, False)):
        (example,) = read(tokenizer, LLAMA, file=file).rows.examples
        assert ("<|im_start|>user" in tokenizer.decode(example.ids, skip_specials=False)) == said
    t5 = from_hf({"model_type": "t5", "vocab_size": 400, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2,
                  "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2})  # fmt: skip
    (example,) = read(CHATML, t5, file=file).rows.examples
    assert "<|im_start|>" not in CHATML.decode(example.ids, skip_specials=False)


def test_rows_to_be_predicted_are_cut_and_may_lack_labels(tmp_path):
    task = tasks.make("classify", PLAIN, SMALL, labels=("x", "y"))
    file = write(tmp_path / "rows.jsonl", [{"text": "a" * 100}, {"text": "b"}])
    items, rows = inputs.to_predict(file, task, SMALL, None, {}, 20)
    assert lines(rows) == [1, 2] and [len(example) for example in rows.examples] == [20, 1] and items.format == "label"
    task = tasks.make("regress", PLAIN, SMALL)
    assert lines(inputs.to_predict(file, task, SMALL, None, {}, None)[1]) == [1, 2]
    task = tasks.make("causal-lm", PLAIN, SMALL)
    file = write(
        tmp_path / "more.jsonl", [{"prompt": "a" * 100, "completion": "b"}, {"prompt": "b", "completion": "c"}]
    )
    with pytest.raises(RefpeftError, match="1 rows are too long to be predicted: set a larger --length"):
        inputs.to_predict(file, task, SMALL, None, {}, 20)
