import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, byte_level, chatml, llama, plain, save

from refpeft import RefpeftError
from refpeft.batches import IGNORE, Batches
from refpeft.data import Data, load_data, runs, view
from refpeft.examples import Example
from refpeft.formats import ALPACA, ALPACA_WITH_INPUT
from refpeft.tasks.causal_lm import CausalLM, prompt_tokens
from refpeft.templates import Template
from refpeft.tokenizer import Tokenizer

CHAT, PLAIN, LLAMA = chatml(), plain(), llama()

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def learned(example, tokenizer):
    """The runs of an example that are learned, as text."""
    return [run["text"] for run in runs(example, tokenizer) if run["learned"]]


def text(example, tokenizer):
    return tokenizer.decode(example.ids, skip_specials=False)


def problems(path, tokenizer=CHAT, **options):
    with pytest.raises(RefpeftError) as error:
        load_data(path, tokenizer, **options)
    return str(error.value)


# -- the formats -------------------------------------------------------------------------------------------------------


def test_messages_are_rendered_and_the_answers_learned_with_their_end_of_turn(write):
    rows = [{"messages": [*TALK, {"role": "user", "content": "no?"}, {"role": "assistant", "content": " no"}]}]
    data = load_data(write(rows), CHAT)
    (example,) = data.examples
    assert text(example, CHAT) == Template(CHATML).render(rows[0]["messages"])
    assert learned(example, CHAT) == ["yes<|im_end|>", " no<|im_end|>"]
    assert data.summary.format == "messages" and data.summary.ends_in_eos == 1


def test_the_prompt_of_an_answer_has_the_tokens_that_generation_sees(write):
    # In one piece "\n" + "\n\nyes" would be other tokens than "\n" before the answer.
    messages = [TALK[0], {"role": "assistant", "content": "\n\nyes"}]
    (example,) = load_data(write([{"messages": messages}]), CHAT).examples
    prompt = CHAT.encode(Template(CHATML).render(messages[:1], add_generation_prompt=True))
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.supervised.tolist()[: len(prompt) + 1] == [False] * len(prompt) + [True]


def test_sharegpt_is_messages_by_other_names(write):
    theirs = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}],
    }
    ours = {"messages": [{"role": "system", "content": "Be brief."}, *TALK]}
    data, same = load_data(write([theirs]), CHAT), load_data(write([ours], "ours.jsonl"), CHAT)
    assert data.summary.format == "conversations"
    assert data.examples[0].ids.tolist() == same.examples[0].ids.tolist()


def test_alpaca_with_a_chat_template_is_what_the_user_says(write):
    rows = [
        {"instruction": "Say it.", "input": "hello", "output": "yes"},
        {"instruction": "Say it.", "input": "", "output": "no"},
    ]
    first, second = load_data(write(rows), CHAT).examples
    assert "<|im_start|>user\nSay it.\n\nhello<|im_end|>" in text(first, CHAT)
    assert "<|im_start|>user\nSay it.<|im_end|>" in text(second, CHAT)
    assert learned(first, CHAT) == ["yes<|im_end|>"] and learned(second, CHAT) == ["no<|im_end|>"]


def test_alpaca_without_a_chat_template_is_alpacas_prompt(write):
    rows = [{"instruction": "{Say} it.", "input": "hello", "output": "yes"}, {"instruction": "Say it.", "output": "no"}]
    first, second = load_data(write(rows), PLAIN).examples
    assert text(first, PLAIN) == ALPACA_WITH_INPUT.format(instruction="{Say} it.", input="hello") + "yes<|endoftext|>"
    assert text(second, PLAIN) == ALPACA.format(instruction="Say it.") + "no<|endoftext|>"
    assert learned(first, PLAIN) == ["yes<|endoftext|>"]


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN, LLAMA])
def test_prompt_and_completion_are_joined_as_they_stand(write, tokenizer):
    (example,) = load_data(write([{"prompt": "Q: hello?\nA:", "completion": " yes"}]), tokenizer).examples
    eos = tokenizer.special_tokens["eos_token"]
    prompt = tokenizer.encode("Q: hello?\nA:", specials=True)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert not example.supervised[: len(prompt)].any() and example.supervised[len(prompt) :].all()
    assert learned(example, tokenizer) == [f" yes{eos}"] and example.targets == 2


def test_text_is_learned_whole_behind_bos(write):
    path = write([{"text": "hello world"}])
    (example,) = load_data(path, LLAMA).examples
    assert example.ids[0] == LLAMA.bos_id and example.ids[-1] == LLAMA.eos_id
    assert example.supervised.tolist() == [False] + [True] * (len(example) - 1)
    (example,) = load_data(path, PLAIN).examples
    assert example.supervised.all() and example.targets == len(example) - 1


def test_bos_and_eos_in_the_data_are_not_doubled(write):
    (example,) = load_data(write([{"text": "<s>hello</s>"}]), LLAMA).examples
    assert (example.ids == LLAMA.bos_id).sum() == (example.ids == LLAMA.eos_id).sum() == 1


def test_supervise_all_learns_the_prompt_too(write):
    path = write([{"messages": TALK}])
    (example,) = load_data(path, CHAT, supervise="all").examples
    assert example.supervised.all() and example.targets == len(example) - 1


def test_a_message_that_calls_a_tool_needs_no_content(write):
    template = Template(
        "{% for m in messages %}{{ m.role }}:{{ m.content or m.tool_calls | tojson }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}]
    data = load_data(write(rows), CHAT, template=template)
    assert learned(data.examples[0], CHAT) == ['[{"name": "f"}]<|im_end|>']
    assert data.summary.empty_answers == 0


# -- the end of an answer ----------------------------------------------------------------------------------------------


def test_eos_is_put_where_a_template_has_no_end_of_turn(write):
    template = Template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (example,) = load_data(write([{"messages": TALK}]), PLAIN, template=template).examples
    assert learned(example, PLAIN) == ["yes\n<|endoftext|>"]


@pytest.mark.parametrize("pack", [False, True])
def test_eos_is_learned_and_padding_of_the_same_token_is_not(write, pack):
    assert PLAIN.pad_id == PLAIN.eos_id == 0  # which is what batches are filled up with
    rows = [{"prompt": "hello", "completion": answer} for answer in (" yes", " no no no no", " yes no")]
    examples = load_data(write(rows), PLAIN).examples
    assert [int(example.ids[-1]) for example in examples] == [PLAIN.eos_id] * 3
    batch = Batches(examples, 3, 9, pack=pack).at(0)
    padding = batch.segments < 0
    assert padding.any() and (batch.ids[padding] == PLAIN.eos_id).all() and (batch.targets[padding] == IGNORE).all()
    assert (batch.targets == PLAIN.eos_id).sum() == 3  # one for each row, at the last token of its answer
    for row, time in zip(*np.nonzero(batch.targets == PLAIN.eos_id), strict=True):
        assert batch.ids[row, time] != PLAIN.eos_id == batch.ids[row, time + 1]
        assert batch.segments[row, time] == batch.segments[row, time + 1] >= 0


def test_eos_behind_a_generation_tag_is_learned(write):
    template = Template(
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    )
    (example,) = load_data(write([{"messages": TALK}]), CHAT, template=template).examples
    assert learned(example, CHAT) == ["hello<|im_end|>", "yes<|im_end|>"]


def test_nothing_behind_the_token_that_stops_generation_is_learned(write):
    template = Template(CHATML.replace("'<|im_end|>'", "'<|im_end|>\\n<|endoftext|>'"))  # like Phi-3
    (example,) = load_data(write([{"messages": TALK}]), CHAT, template=template).examples
    assert learned(example, CHAT) == ["yes<|im_end|>"]


def test_an_end_at_which_generation_does_not_stop_is_said_aloud(write):
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|endoftext|>", "chat_template": CHATML})
    summary = load_data(write([{"messages": TALK}]), tokenizer).summary
    assert summary.ends_in_eos == 0
    assert any("end in '<|im_end|>', at which generation does not stop" in line for line in summary.lines())


def test_a_template_that_rewrites_history_is_said_aloud(write):
    template = Template(
        "{% for m in messages %}{{ m.role }}:{{ '' if loop.last else '-' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = [{"messages": [TALK[1], *TALK]}]
    problem = problems(write(rows), template=template)  # the user's message changes too: no prefix
    assert "rows.jsonl:1: the chat template does not show" in problem
    template = Template(template.text.replace("'' if loop.last", "'' if loop.last or m.role == 'user'"))
    data = load_data(write([{"messages": [*TALK, *TALK]}]), CHAT, template=template)
    assert [learned(e, CHAT) for e in data.examples] == [["yes<|im_end|>"], ["yes<|im_end|>"]]
    assert data.summary.rows == 1 and "1 conversations became one example per answer" in data.summary.notes[0]


# -- files -------------------------------------------------------------------------------------------------------------


def test_every_file_type_gives_the_same_rows(write):
    rows = [{"prompt": f'{i}, "x"', "completion": f" yes\u2028{i}"} for i in range(3)]
    files = {
        "a.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "b.json": json.dumps(rows, indent=1),
        "c.json": "\n".join(map(json.dumps, rows)),  # JSON lines by the wrong name
        "d.tsv": "prompt\tcompletion\r\n" + "\r\n".join(f"{r['prompt']}\t{r['completion']}" for r in rows),
        "e.csv": "prompt,completion\n" + "\n".join(f'"{i}, ""x""","{row["completion"]}"' for i, row in enumerate(rows)),
        "f.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, rows)),
    }
    expected = None
    for name, content in files.items():
        ids = [example.ids.tolist() for example in load_data(write(content, name), PLAIN).examples]
        expected = expected or ids
        assert ids == expected, name


def test_rows_know_their_lines(write):
    rows = [{"text": "hello\nworld"}, {"text": "yes"}, {"text": "no"}]

    def lines(content, name):
        return [example.line for example in load_data(write(content, name), PLAIN).examples]

    assert lines(json.dumps(rows, indent=1), "a.json") == [2, 5, 8]
    assert lines("\n\n".join(map(json.dumps, rows)), "a.jsonl") == [1, 3, 5]
    assert lines('text\n"hello\nworld"\nyes\n\nno\n', "a.csv") == [2, 4, 6]
    assert lines("text\nhello\n\nno", "a.tsv") == [2, 4]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', "a.jsonl:2: this line is not JSON: column 10: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "a.jsonl:2: a row is a list: expected an object"),
        ("a.json", '[{"text": "a"},\n {"text": }]', "a.json:2: this file is not JSON: column 11: Expecting value"),
        ("a.json", '[{"text": "a"},\n 3]', "a.json:2: a row is a int"),
        ("a.json", "[" * 100_000, "a.json: this file is not JSON"),
        ("a.csv", "text,b\na\n", "a.csv:2: 1 fields: expected 2 (text, b)"),
        ("a.csv", 'text\n"a\n', "a.csv:2: this is not CSV"),
        ("a.csv", "text,text\n", "a.csv:1: the header names a column twice"),
        ("a.tsv", "text\tb\nx\ty\tz\n", "a.tsv:2: 3 fields: expected 2"),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.csv", "text\n", "a.csv has no rows"),
        ("a.parquet", "x", "expected a file whose name ends in .jsonl, .ndjson, .json, .csv, .tsv"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: this is not UTF-8"),
    ],
)
def test_a_broken_file_is_an_error_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in problems(path, PLAIN)


def test_a_missing_file_is_a_clear_error(tmp_path):
    assert "cannot be read: No such file" in problems(tmp_path / "nowhere.jsonl")


# -- mistakes in rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [{"role": "humn", "content": "a"}]}, "messages[0].role is 'humn': expected one of system, user"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role is ['user']"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is a int: expected text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is null"),
        ({"messages": ["hello"]}, "messages[0] is a str: expected an object"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages is a str: expected a list"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "messages[1].weight is 0"),
        ({"messages": TALK, "tools": "f"}, "tools is a str"),
        ({"messages": [{"role": "user", "content": "\ufdd0"}, TALK[1]]}, "U+FDD0"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "conversations[0].from is 'bot'"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value is null"),
        ({"conversations": [3]}, "conversations[0] is a int"),
        ({"conversations": None}, "conversations is null: expected a list"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "system": 3}, "system is a int"),
        ({"instruction": "a", "output": None}, "output is null: expected text"),
        ({"instruction": "a", "output": "b", "input": 3}, "input is a int"),
        ({"prompt": 3, "completion": "b"}, "prompt is a int"),
        ({"text": ["a"]}, "text is a list"),
        ({"question": "a", "answer": "b"}, "its columns (question, answer) fit no format: expected messages |"),
        ({}, "its columns (none) fit no format"),
    ],
)
def test_a_wrong_row_is_an_error_with_its_line(write, row, message):
    problem = problems(write([row]))
    assert "rows.jsonl:1: " in problem and message in problem


def test_ten_problems_are_told_at_once(write):
    problem = problems(write([{"text": "a" if i % 2 else i} for i in range(30)]))
    assert problem.count("is a int") == 10 and "rows.jsonl:19:" in problem and problem.endswith("and 5 more")


def test_mixed_columns_are_errors_with_their_lines(write):
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"text": "a"}, {"x": "a"}]
    problem = problems(write(rows))
    assert (
        "rows.jsonl:2: its columns (prompt, completion) differ from most rows, which have the format 'text'" in problem
    )
    assert "rows.jsonl:4: its columns (x) differ" in problem


def test_rows_of_no_format_are_the_ones_that_are_named_even_where_they_are_the_most(write):
    problem = problems(write([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "completion": "d"}]))
    assert "rows.jsonl:1: its columns (prompt) differ from those of format 'prompt' and fit no other" in problem
    assert "rows.jsonl:2: " in problem and "rows.jsonl:3: " not in problem


def test_the_format_can_be_chosen(write):
    path = write([{"instruction": "a", "output": "b", "text": "hello"}])
    assert load_data(path, PLAIN).summary.format == "instruction"
    data = load_data(path, PLAIN, format="text")
    assert text(data.examples[0], PLAIN) == "hello<|endoftext|>"
    assert data.summary.ignored_columns == ["instruction", "output"]
    assert "missing: the format 'prompt' needs it" in problems(path, PLAIN, format="prompt")
    assert "format 'alpaca' is unknown" in problems(path, PLAIN, format="alpaca")


def test_rows_with_nothing_to_learn_are_refused_with_their_lines(write):
    rows = [{"messages": TALK}, {"messages": TALK[:1]}, {"messages": TALK}, {"messages": TALK[:1]}]
    assert "2 rows with nothing to learn, at lines 2, 4: a row needs text" in problems(write(rows))
    assert "1 row with nothing to learn, at line 2" in problems(write([{"text": "a"}, {"text": ""}]), PLAIN)
    assert "1 row with nothing to learn" in problems(write([{"prompt": "", "completion": ""}]), LLAMA)


def test_conversations_need_a_chat_template(write):
    problem = problems(write([{"messages": TALK}]), PLAIN)
    assert "holds conversations, but the tokenizer has no chat template" in problem


def test_a_tokenizer_without_eos_is_an_error(write):
    assert "names no eos_token" in problems(write([{"text": "a"}]), Tokenizer(byte_level(), {}))


@pytest.mark.parametrize("option", [{"overlong": "cut"}, {"supervise": "some"}, {"length": 1}])
def test_wrong_options_are_errors(write, option):
    assert next(iter(option)) in problems(write([{"text": "a"}]), PLAIN, **option)


# -- rows that are too long --------------------------------------------------------------------------------------------

LONG = [
    {"prompt": "a", "completion": "bc"},
    {"prompt": "abc", "completion": "defghijkl"},
    {"prompt": "abcdefgh", "completion": "i"},
]  # 4, 13 and 10 tokens with EOS


def test_over_long_rows_are_an_error_with_counts(write):
    problem = problems(write(LONG), PLAIN, length=8)
    assert "2 of 3 rows are longer than 8 tokens (the longest, line 2, has 13; the first are at lines 2, 3)" in problem
    assert len(load_data(write(LONG), PLAIN, length=13).examples) == 3


def test_over_long_rows_can_be_dropped(write):
    summary = load_data(write(LONG), PLAIN, length=8, overlong="drop").summary
    assert (summary.examples, summary.overlong, summary.dropped, summary.cut_tokens) == (1, 2, 2, 23)
    assert "no row is left" in problems(write(LONG), PLAIN, length=3, overlong="drop")


def test_truncated_rows_get_no_eos_and_are_dropped_without_an_answer(write):
    data = load_data(write(LONG), PLAIN, length=8, overlong="truncate")
    assert [text(e, PLAIN) for e in data.examples] == ["abc<|endoftext|>", "abcdefgh"]
    summary = data.summary
    assert (summary.truncated, summary.dropped, summary.cut_tokens, summary.longest) == (1, 1, 15, 13)
    assert "2 rows are longer than 8 tokens: 1 dropped, 1 truncated, 15 tokens lost" in summary.lines()


def test_split_rows_keep_the_prompt_and_see_the_token_before(write):
    data = load_data(write(LONG[:2]), PLAIN, length=8, overlong="split")
    assert [text(e, PLAIN) for e in data.examples[1:]] == ["abcdefgh", "abchijkl", "abcl<|endoftext|>"]
    assert [learned(e, PLAIN) for e in data.examples[1:]] == [["defgh"], ["ijkl"], ["<|endoftext|>"]]
    assert data.summary.split == 1 and data.summary.cut_tokens == 0
    assert "1 row cannot be split, at line 3" in problems(write(LONG), PLAIN, length=8, overlong="split")


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(2, 20))
@settings(deadline=None)
def test_splitting_learns_every_token_once(mask, length):
    example = Example(np.arange(len(mask), dtype=np.int32), np.array(mask), 1)
    if not example.targets or length - prompt_tokens(example) < 2:
        return
    windows = list(CausalLM(PLAIN).windows(example, length)) if len(example) > length else [example]
    targets = [int(i) for w in windows for i in w.ids[1:][w.supervised[1:]]]
    assert sorted(targets) == [i for i in range(1, len(mask)) if mask[i]]
    assert all(len(w) <= length for w in windows)
    for w in windows:  # each learned token stands behind the one that came before it in the row
        at = np.flatnonzero(w.supervised[1:]) + 1
        assert (w.ids[at - 1] == w.ids[at] - 1).all()


# -- the summary -------------------------------------------------------------------------------------------------------


def test_the_summary_counts(write):
    rows = [
        {"prompt": "a ", "completion": "bc", "id": 1},
        {"prompt": "a", "completion": ""},
        {"prompt": "a ", "completion": "bc"},
    ]
    data = load_data(write(rows), PLAIN)
    found = data.summary.as_dict()
    expected = {"rows": 3, "examples": 3, "tokens": 12, "supervised_tokens": 7, "longest": 5, "empty_answers": 1}
    assert {key: found[key] for key in expected} == expected
    assert found["duplicates"] == 1 and found["ignored_columns"] == ["id"] and found["mean"] == 4
    assert found["ends_in_eos"] == 3 and found["supervised_share"] == 7 / 12
    assert any("2 prompts end in a space" in line for line in data.summary.lines())
    json.dumps(found)


def test_the_view_shows_all_of_the_text_and_colours_the_answer(write):
    for tokenizer in (PLAIN, LLAMA):
        (example,) = load_data(write([{"prompt": "Q: é", "completion": " yes"}]), tokenizer).examples
        shown = view(example, tokenizer)
        assert shown.plain == tokenizer.decode(example.ids, skip_specials=False)
        assert [str(span.style) for span in shown.spans] == ["dim", "green"]


@pytest.mark.real
def test_ids_and_mask_are_those_of_transformers(write, tmp_path):
    transformers = pytest.importorskip("transformers")
    marked = CHATML.replace(
        "{{ message['content'] + '<|im_end|>' + '\n' }}",
        "{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": marked}
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(save(tmp_path, byte_level(), tokenizer_config=config))
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, *TALK, {"role": "user", "content": "é?"}, TALK[1]]}
    ]
    expected = theirs.apply_chat_template(
        rows[0]["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for tokenizer in (CHAT, Tokenizer.load(tmp_path)):
        (example,) = load_data(write(rows), tokenizer).examples
        assert example.ids.tolist() == expected["input_ids"]
        assert example.supervised.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.real
@pytest.mark.skipif("REFPEFT_DATA" not in os.environ, reason="needs REFPEFT_DATA")
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT, LLAMA], ids=["plain", "chatml", "llama"])
@pytest.mark.parametrize(
    "name, rows",
    [
        ("wikisql/train.jsonl", 1000),
        ("instruct/alpaca_en_demo.json", 999),
        ("instruct/rasbt_instruction-data.json", 1100),
    ],
)
def test_real_files(name, rows, tokenizer):
    data = load_data(Path(os.environ["REFPEFT_DATA"]) / name, tokenizer)
    assert data.summary.rows == data.summary.examples == data.summary.ends_in_eos == rows
    assert 0 < data.summary.supervised_share < 1


def test_files_of_several_formats_are_told_as_one(write):
    plain = load_data(write([{"prompt": "a", "completion": " yes"}]), PLAIN)
    text = load_data(write([{"text": "hello world"}, {"text": "no"}], "b.jsonl"), PLAIN)
    both = Data.joined([plain, text]).summary
    assert (both.format, both.rows, both.longest) == ("auto", 3, max(plain.summary.longest, text.summary.longest))
    assert Data.joined([text, text]).summary.format == "text" and Data.joined([text]) is text
