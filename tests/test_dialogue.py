"""A model is asked as it was trained to be asked."""

import pytest
import tiny_files
import tiny_tokenizers

import refpeft
from refpeft.dialogue import Said, Speaker
from refpeft.errors import RefpeftError
from refpeft.search import Answer


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return refpeft.load(tiny_files.write_model(tmp_path_factory.mktemp("chat"), template=tiny_tokenizers.CHATML))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return refpeft.load(tiny_files.write_model(tmp_path_factory.mktemp("plain")))


@pytest.fixture
def asked(monkeypatch):
    """The prompts that reach `answers`, as text; every answer is "yes"."""
    seen = []

    def answers(model, prompts, **keywords):
        seen.extend(model.tokenizer.decode(prompt, skip_specials=False) for prompt in prompts)
        return [Answer(model.tokenizer.encode("yes"), -0.5, True) for _ in prompts]

    monkeypatch.setattr("refpeft.dialogue.answers", answers)
    return seen


TURN = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (None, TURN),
        ("messages", TURN),
        ("instruction", TURN),
        ("prompt", "hello"),
        ("text", "hello"),
        ("source", "hello\n"),
    ],
)
def test_the_format_decides_between_the_template_and_the_text_itself(chat, asked, format, text):
    assert Speaker(chat, format).answer(["hello"]) == [Said("yes", -0.5, True)]
    assert asked == [text]


def test_without_a_template_an_instruction_is_put_into_alpaca_s_prompt(plain, asked):
    Speaker(plain, "instruction").answer(["hello"])
    assert asked[0].endswith("### Instruction:\nhello\n\n### Response:\n")
    Speaker(plain).answer(["hello"])
    assert asked[1] == "hello"


def test_a_conversation_has_the_system_message_and_all_turns(chat, asked):
    speaker = Speaker(chat, system="yes")
    said = [("user", "hello"), ("assistant", "no"), ("user", "yes")]
    assert speaker.reply([{"role": role, "content": text} for role, text in said]) == "yes"
    turns = [("system", "yes"), *said]
    assert asked == [
        "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    ]


def test_a_conversation_needs_a_template(plain, chat):
    with pytest.raises(RefpeftError, match="no chat template"):
        Speaker(plain).reply([{"role": "user", "content": "hello"}])
    with pytest.raises(RefpeftError, match="system message"):
        Speaker(plain, system="yes")
    with pytest.raises(RefpeftError, match="system message"):
        Speaker(chat, "prompt", system="yes")
