import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, llama, llama_like, plain, save, words

from refpeft import RefpeftError
from refpeft.tokenizer import Tokenizer

PLAIN, LLAMA = plain(), llama()
BERT = Tokenizer(words(["a", "b", "c", "##b"]), {"eos_token": "[SEP]"})


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_decode_undoes_encode(text):
    assert PLAIN.decode(PLAIN.encode(text), skip_specials=False) == text


@given(*[st.text("abyesno .:?\n", max_size=12)] * 2)
def test_a_continuation_adds_exactly_its_text(before, text):
    for tokenizer in (PLAIN, LLAMA):
        ids = tokenizer.encode("x" + before) + tokenizer.encode(text, after="x" + before)
        assert tokenizer.decode(ids) == "x" + before + text


def test_a_space_is_put_before_a_text_but_not_before_a_continuation():
    assert LLAMA.encode("yes") == LLAMA.encode(" yes", after="Q:") != LLAMA.encode("yes", after="Q:")
    assert PLAIN.encode("yes") == PLAIN.encode("yes", after="Q:")


def test_behind_an_added_token_a_continuation_is_what_it_is_in_the_whole():
    assert LLAMA.encode("</s>") + LLAMA.encode("yes", after="</s>") == LLAMA.encode("</s>yes")


def test_bos_is_put_first_once_where_the_model_puts_it():
    assert LLAMA.add_bos and LLAMA.encode("no", specials=True) == [LLAMA.bos_id, *LLAMA.encode("no")]
    assert LLAMA.encode("<s>no", specials=True) == LLAMA.encode("<s>no")
    assert LLAMA.encode("", specials=True) == [LLAMA.bos_id]
    assert not PLAIN.add_bos and PLAIN.encode("no", specials=True) == PLAIN.encode("no")


def test_add_bos_token_in_the_config_overrules_the_post_processor():
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    assert not Tokenizer(llama_like(), config | {"add_bos_token": False}).add_bos
    assert Tokenizer(byte_level(), {"bos_token": "<|endoftext|>", "add_bos_token": True}).add_bos
    assert not Tokenizer(byte_level(), {"bos_token": None, "add_bos_token": True}).add_bos


def test_a_text_is_read_with_its_special_tokens_within_a_length():
    assert BERT.encode_text("a b c") == ([1, 5, 6, 7, 2], [1, 0, 0, 0, 1])
    assert BERT.encode_text("a b c", 4) == ([1, 5, 6, 2], [1, 0, 0, 1])
    assert BERT.encode_text("a b c") == ([1, 5, 6, 7, 2], [1, 0, 0, 0, 1])  # no length stays behind
    asked = Tokenizer(byte_level(), {"bos_token": "<|endoftext|>", "add_bos_token": True})
    ids, bos = asked.encode("hello"), asked.bos_id
    assert asked.encode_text("hello yes") == ([bos, *asked.encode("hello yes")], [1, 0, 0])
    assert asked.encode_text("hello yes", 2) == ([bos, *ids], [1, 0])
    assert asked.encode_text("<|endoftext|>hello") == ([bos, *ids], asked.encode_text("<|endoftext|>hello")[1])
    with pytest.raises(RefpeftError, match="not valid Unicode"):
        BERT.encode_text("a \ud800")


def test_two_texts_have_types_or_a_line_break_between_them_and_lose_the_longer_ones_end():
    assert BERT.encode_pair("a") == ([1, 5, 2], [0, 0, 0])
    assert BERT.encode_pair("a b", "c") == ([1, 5, 6, 2, 7, 2], [0, 0, 0, 0, 1, 1])
    assert BERT.encode_pair("a", "c a b", 6) == ([1, 5, 2, 7, 5, 2], [0, 0, 0, 1, 1, 1])
    assert PLAIN.encode_pair("yes", "no") == (PLAIN.encode("yes\nno"), [0] * len(PLAIN.encode("yes\nno")))
    assert PLAIN.encode_pair("yes", "no", 3)[0] == PLAIN.encode("yes\nno")[:3]


def test_words_are_numbered_and_have_the_tokens_that_they_have_in_a_text():
    assert BERT.encode_words(["a", "cb", "b"]) == ([1, 5, 7, 8, 6, 2], [None, 0, 1, 1, 2, None])
    assert BERT.encode_words(["a", "cb", "b"], 5)[1] == [None, 0, 1, 1, None]
    ids, numbers = PLAIN.encode_words(["hello", "yes"])
    assert ids == PLAIN.encode(" hello yes") and numbers[-1] == 1
    ids, _ = LLAMA.encode_words(["hello", "yes"])
    assert ids == LLAMA.encode_text("hello yes")[0]


def test_the_token_that_hides_others_is_the_named_one_or_the_usual_one():
    assert BERT.mask_id == 3 and LLAMA.mask_id is None
    assert Tokenizer(words(["a"]), {"mask_token": "a"}).mask_id == 5
    assert Tokenizer(words(["a"]), {"mask_token": "<none>"}).mask_id is None
    assert Tokenizer(byte_level(("<mask>",)), {}).mask_id == 0
    assert Tokenizer(byte_level(("<mask>",)), {"mask_token": "<none>"}).mask_id is None


def test_padding_is_that_of_the_files_or_the_end():
    assert Tokenizer(words(["a"]), {"eos_token": "[SEP]"}).pad_id == 2
    assert Tokenizer(words(["a"]), {"eos_token": "[SEP]", "pad_token": "[PAD]"}).pad_id == 0


def test_special_tokens_become_one_id_and_are_left_out_of_decoded_text():
    ids = PLAIN.encode("<|im_start|>hello<|im_end|>")
    assert len(ids) == 3
    assert PLAIN.decode(ids) == "hello"
    assert PLAIN.decode(ids, skip_specials=False) == "<|im_start|>hello<|im_end|>"


def test_end_tokens_come_from_every_file(tmp_path):
    save(
        tmp_path,
        byte_level(),
        config={"eos_token_id": 0, "bos_token_id": 1},
        generation_config={"eos_token_id": [0, 2]},
        special_tokens_map={"pad_token": {"content": "<|im_start|>", "special": True}},
        tokenizer_config={"eos_token": "<|im_end|>", "pad_token": None},
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 1)
    assert tokenizer.eos_ids == {0, 2} and set(tokenizer.ends) == {"<|endoftext|>", "<|im_end|>"}
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"


def test_padding_and_truncation_stored_in_the_file_are_switched_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.load(save(tmp_path, backend, tokenizer_config={"eos_token": "<|endoftext|>"}))
    assert len(tokenizer.encode("a b c d e f g h i j")) == 19
    assert len(tokenizer.encode("a")) == 1


def test_the_template_may_be_text_a_list_or_a_file(tmp_path):
    assert Tokenizer(byte_level(), {"chat_template": "one"}).chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert Tokenizer(byte_level(), {"chat_template": named}).chat_template == "three"
    save(tmp_path, byte_level(), tokenizer_config={"chat_template": "four"})
    (tmp_path / "chat_template.jinja").write_text("five")
    assert Tokenizer.load(tmp_path).chat_template == "five"
    assert PLAIN.chat_template is None


@pytest.mark.parametrize(
    "config, message",
    [
        ({"eos_token": "<nowhere>"}, "eos_token '<nowhere>' is not in the vocabulary"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "none named 'default'"),
        ({"chat_template": 3}, "chat_template is a int"),
    ],
)
def test_a_wrong_config_is_one_clear_error(config, message):
    with pytest.raises(RefpeftError, match=message):
        Tokenizer(byte_level(), config)


def test_missing_and_broken_files_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(RefpeftError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(RefpeftError, match="convert it"):
        Tokenizer.load(tmp_path)
    save(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(RefpeftError, match=r"tokenizer_config.json is not JSON: .*column 15"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(RefpeftError, match="holds a list"):
        Tokenizer.load(tmp_path)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_a_damaged_tokenizer_file_is_an_error_or_a_tokenizer_and_nothing_else(tmp_path_factory, at, junk):
    directory = tmp_path_factory.getbasetemp()
    data = bytearray(byte_level().to_str().encode())
    at %= len(data)
    data[at : at + len(junk)] = junk
    (directory / "tokenizer.json").write_bytes(data)
    try:
        assert Tokenizer.load(directory).vocab_size > 0
    except RefpeftError as error:
        assert "tokenizer.json" in str(error)


@pytest.mark.real
@pytest.mark.skipif("REFPEFT_MODELS" not in os.environ, reason="needs REFPEFT_MODELS")
def test_stories260k():
    directory = Path(os.environ["REFPEFT_MODELS"]) / "stories260K"
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.add_bos and tokenizer.vocab_size == 512
    ids = tokenizer.encode("Once upon a time", specials=True)
    assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids) == "Once upon a time"


@pytest.mark.real
def test_ids_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    save(tmp_path, llama_like(), tokenizer_config=config)
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in ("yes", " yes no", "", "hello</s>no", json.dumps({"é": "日本"}, ensure_ascii=False)):
        assert ours.encode(text, specials=True) == theirs.encode(text)
