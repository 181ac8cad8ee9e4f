"""`refpeft generate` with beams, with T5 and its adapters, and what it refuses."""

import json

import pytest
import test_encoder
import test_t5
import tiny
import tiny_files
import tiny_tokenizers
from click.testing import CliRunner

import refpeft
from refpeft import adapters, files, sites
from refpeft.cli import main
from refpeft.generate import answers

SETTINGS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def run(*arguments, **keywords):
    return CliRunner().invoke(main, ["generate", *map(str, arguments)], **keywords)


def refused(*arguments) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and not result.stdout, result.output
    return result.stderr


def write(folder, config: dict):
    """A random model of a config.json, with a byte-level tokenizer."""
    folder.mkdir()
    config = config | {"vocab_size": tiny_files.VOCABULARY}
    files.write_json(folder / "config.json", config)
    files.write_safetensors(folder / "model.safetensors", {k: v.astype("f4") for k, v in tiny.drawn(config).items()})
    return tiny_tokenizers.save(folder, tiny_tokenizers.byte_level(), tokenizer_config=SETTINGS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a decoder and a T5, the T5's with an adapter beside it."""
    folder = tmp_path_factory.mktemp("models")
    tiny_files.write_model(folder / "decoder")
    write(folder / "t5", test_t5.CONFIGS["flan"])
    t5 = refpeft.load(folder / "t5")
    tiny.scramble(sites.attach(t5, "lora", {"targets": "all-linear"}), scale=0.3)
    adapters.save(folder / "adapter", t5)
    return folder


BEAMS = ("--beams", "3", "--length-penalty", "0.9", "--no-repeat-ngram", "2", "--max-tokens", "6")


@pytest.mark.parametrize("extra", [(), BEAMS])
@pytest.mark.parametrize("name", ["decoder", "t5", "adapter"])
def test_it_says_what_the_model_answers(models, name, extra):
    given = (models / "t5", models / "adapter") if name == "adapter" else (models / name, None)
    options = ("--model", given[0], *(("--adapter", given[1]) if given[1] else ()), *(extra or ("--max-tokens", "6")))
    result = run(*options, "hello world", "is 3 even?", "--json")
    assert result.exit_code == 0, result.output
    model = refpeft.load(*given)
    ends = [] if name == "decoder" else [model.tokenizer.eos_id]  # of a source
    prompts = [[*model.tokenizer.encode(text), *ends] for text in ("hello world", "is 3 even?")]
    wanted = {"beams": 3, "length_penalty": 0.9, "no_repeat_ngram": 2} if extra else {}
    found = answers(model, prompts, 6, stop=model.tokenizer.eos_ids, **wanted)
    assert json.loads(result.stdout) == [
        {"prompt": text, "text": model.tokenizer.decode(a.tokens), "logprob": a.logprob, "stopped": a.stopped}
        for text, a in zip(("hello world", "is 3 even?"), found, strict=True)
    ]
    assert run(*options, "hello world").stdout == model.tokenizer.decode(found[0].tokens) + "\n"


def test_an_adapter_changes_the_answer(models):
    told = [
        json.loads(run("--model", models / "t5", *more, "hello", "--max-tokens", 4, "--json").stdout)[0]["logprob"]
        for more in ((), ("--adapter", models / "adapter"))
    ]
    assert told[0] != told[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--beams", 2, "--temperature", 1), "a temperature draws tokens, and beam search draws none: choose one of"),
        (("--length-penalty", 0.5), "length_penalty chooses among beams: set 2 beams or more, too"),
        (("--beams", 2, "--length-penalty", "nan"), "length_penalty is nan: expected a number from -10 to 10"),
        (("--top-k", 3), "top_k and top_p say among which tokens to draw: set a temperature, too"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(models, options, message):
    text = refused("--model", models / "decoder", "hello", *options)
    assert text.startswith(message) and text.count("\n") == 1


def test_there_is_one_beam_at_least(models):
    assert "0 is not in the range x>=1" in refused("--model", models / "decoder", "hello", "--beams", 0)


def test_with_t5_there_is_no_conversation(models):
    assert "has no chat template" in refused("--model", models / "t5", "--chat")
    assert "a system message needs a chat template" in refused("--model", models / "t5", "--system", "be kind", "hi")


def test_an_encoder_is_refused_in_one_line(tmp_path):
    write(tmp_path / "bert", test_encoder.CONFIGS["bert"])
    assert refused("--model", tmp_path / "bert", "hello") == "a bert model writes no text: expected a decoder, or T5\n"
