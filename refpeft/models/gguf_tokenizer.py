"""The tokenizer in a GGUF file's metadata, rebuilt for the `tokenizers` library."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from refpeft.errors import RefpeftError

# How text is cut before byte-pair merges, by tokenizer.ggml.pre: regular expressions of the models' own tokenizer.json.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}
_PRE = ("gpt-2", "smollm", *_SPLITS)

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values in tokenizer.ggml.token_type


def build_tokenizer(fields: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The byte-level BPE tokenizer in the metadata, and its tokenizer_config.json.

    Raises RefpeftError for another kind of tokenizer, and any exception of Python or the library for corrupt metadata.
    """
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise RefpeftError(f"tokenizer.ggml.model is {model!r}; refpeft has gpt2 (byte-level BPE)")
    if pre not in _PRE:
        raise RefpeftError(f"tokenizer.ggml.pre is {pre!r}; refpeft has {', '.join(_PRE)}")
    for key in ("tokens", "token_type", "merges"):
        if not isinstance(fields.get(f"tokenizer.ggml.{key}"), list):
            raise RefpeftError(f"tokenizer.ggml.{key} is missing or no array")
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise RefpeftError("tokenizer.ggml.tokens has a token twice, or not as many as tokenizer.ggml.token_type")

    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise RefpeftError("tokenizer.ggml.merges has an entry that is not two tokens")
    backend = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre in _SPLITS:
        split = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    backend.decoder = decoders.ByteLevel()
    for special, numbers in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
        chosen = [token for token, kind in zip(tokens, kinds, strict=True) if kind in numbers]
        backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in chosen])

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            config[f"{name}_token"] = tokens[number]
    config["eos_token_id"] = end_ids(fields)
    config["add_bos_token"] = bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))
    if config["add_bos_token"]:
        bos = config["bos_token"]
        backend.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, vocabulary[bos])])
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return backend, config


def end_ids(fields: dict[str, Any]) -> list:
    """Ends of sequence, turn and message, each of which ends an answer."""
    ids = []
    for kind in ("eos", "eot", "eom"):
        value = fields.get(f"tokenizer.ggml.{kind}_token_id")
        if value is not None and value not in ids:
            ids.append(value)
    return ids
