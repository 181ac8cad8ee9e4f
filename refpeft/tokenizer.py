"""Text to token ids and back: a model directory's tokenizer.json, and what its other files say about special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from refpeft.errors import RefpeftError

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")

# A character that no text contains and no token merges with: it stands before a text that continues another.
_NEUTRAL = "\ue000"


class Tokenizer:
    """A `tokenizers.Tokenizer` together with its special tokens and its chat template.

    `config` has the keys of tokenizer_config.json (`bos_token`, `eos_token`, `pad_token`, `unk_token`, `add_bos_token`,
    `chat_template`) and those of config.json that name tokens by number (`bos_token_id`, `eos_token_id`: a number or a
    list, `pad_token_id`). `name` is what error messages call it.

    mask_id                  int or None: the token that hides another one in masked language models
    bos_id, eos_id, pad_id   int or None; pad_id falls back to eos_id (padding is masked by position, never by its id)
    eos_ids                  frozenset of every id that ends an answer
    add_bos                  whether the model's own tokenizer puts BOS first
    chat_template            the template's text or None
    special_tokens           {"bos_token": "<s>", ...}: the variables that a chat template may use
    added, added_ids         texts and ids of all added tokens: in any text they become one id each
    ends                     texts of eos_ids
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], name: str = "the tokenizer"):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.backend, self.name = tokenizer, name
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.added, self.added_ids = tuple(token.content for token in added.values()), frozenset(added)
        self.bos_id = self._special(config, "bos")
        self.eos_id = self._special(config, "eos")
        self.eos_ids = frozenset(_numbers(config.get("eos_token_id"))) | {self.eos_id} - {None}
        self.ends = tuple(text for text in map(tokenizer.id_to_token, self.eos_ids) if text)
        pad = self._special(config, "pad")
        self.pad_id = self.eos_id if pad is None else pad
        mask = _content(config.get("mask_token"))
        self.mask_id = tokenizer.token_to_id(mask or "[MASK]")
        if self.mask_id is None and mask is None:
            self.mask_id = tokenizer.token_to_id("<mask>")
        self.chat_template = _chat_template(config, name)
        self.special_tokens = {key: _content(config[key]) for key in SPECIAL_NAMES if _content(config.get(key))}
        for key, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if key not in self.special_tokens and token is not None:
                self.special_tokens[key] = tokenizer.id_to_token(token)
        self.add_bos = self._adds_bos(config)
        # Llama 2, Mistral and others put a space before a text; a text that continues another must not get one.
        self._prepends = self._encode("a") != self._after("a", _NEUTRAL)
        specials = tokenizer.encode("a", "a", add_special_tokens=True).special_tokens_mask
        self._parts_pairs = "1" in "".join(map(str, specials)).strip("1")
        alone = tokenizer.encode(["a", "a"], is_pretokenized=True, add_special_tokens=False).ids
        self._words_need_spaces = alone != self._encode("a a")

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model directory. Raises RefpeftError for files that are missing or broken."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            other = "; it has tokenizer.model: convert it with transformers' AutoTokenizer(...).save_pretrained"
            raise RefpeftError(
                f"{directory} has no tokenizer.json{other if (directory / 'tokenizer.model').is_file() else ''}"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic inside the Rust library is no Exception
            raise RefpeftError(f"{path} is not a tokenizer that the `tokenizers` library reads: {error}") from None
        config: dict[str, Any] = {}
        # Later files win: they are nearer to what is used. eos_token_id of generation_config.json may be a list.
        for file in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
            found = _read_json(directory / file)
            config.update({key: value for key, value in found.items() if value is not None})
        template = directory / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, config, name=str(directory))

    def encode(self, text: str, *, specials: bool = False, after: str = "") -> list[int]:
        """Token ids of `text`; texts of special tokens in it become their ids.

        specials   put BOS first where the model's own tokenizer does (and the text does not begin with it)
        after      the text that this one continues: no space is put in between
        """
        ids = self._after(text, after) if after and self._prepends else self._encode(text)
        if specials and self.add_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def encode_text(self, text: str, length: int | None = None) -> tuple[list[int], list[int]]:
        """(ids, 1 at special tokens) of a text as the model reads it alone: with its special tokens around it.

        length   the most tokens: the end of the text is cut, never the special tokens
        """
        found = self._whole(text, None, length)
        ids, special = list(found.ids), list(found.special_tokens_mask)
        if self.add_bos and ids[:1] != [self.bos_id]:  # where tokenizer_config.json asks for it, and tokenizer.json not
            ids, special = [self.bos_id, *ids][:length], [1, *special][:length]
        return ids, special

    def encode_pair(self, a: str, b: str | None = None, length: int | None = None) -> tuple[list[int], list[int]]:
        """(ids, types) of a text, or of two; of a pair that is too long, the longer one is cut, token by token.

        types are 0 in the first text and 1 in the second, as the tokenizer itself says. A tokenizer without special
        tokens between two texts gets a line break there.
        """
        if b is None:
            ids, _ = self.encode_text(a, length)
            return ids, [0] * len(ids)
        if not self._parts_pairs:
            return self.encode_pair(f"{a}\n{b}", None, length)
        found = self._whole(a, b, length)
        return list(found.ids), list(found.type_ids)

    def encode_words(self, words: list[str], length: int | None = None) -> tuple[list[int], list[int | None]]:
        """(ids, the number of the word that each token is of, None at special tokens) of a sentence in words."""
        if self._words_need_spaces:
            words = [f" {word}" for word in words]
        found = self._whole(words, None, length)
        return list(found.ids), list(found.word_ids)

    def _whole(self, a: str | list[str], b: str | None, length: int | None) -> tokenizers.Encoding:
        """What the tokenizer makes of one input, with its special tokens."""
        if length is not None:
            self.backend.enable_truncation(length, strategy="longest_first" if b is not None else "only_first")
        try:
            found = self.backend.encode(a, b, is_pretokenized=isinstance(a, list), add_special_tokens=True)
        except TypeError:
            raise RefpeftError("the text is not valid Unicode") from None
        finally:
            self.backend.no_truncation()
        if length is not None and len(found.ids) > length:
            raise RefpeftError(
                f"length is {length}: the special tokens around a text take as many; set a larger length"
            )
        return found

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_specials)

    def _encode(self, text: str) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # half of a surrogate pair: of a JSON escape, or a byte of the command line that is not UTF-8
            at = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise RefpeftError(f"the text is not valid Unicode: character {at + 1} is {text[at]!r}") from None

    def _after(self, text: str, before: str) -> list[int]:
        """`text` as it is encoded behind `before`: behind the added token that ends it, or a neutral character."""
        ending = max((token for token in self.added if before.endswith(token)), key=len, default=_NEUTRAL)
        lead, ids = self._encode(ending), self._encode(ending + text)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self._encode(text)

    def _special(self, config: dict[str, Any], kind: str) -> int | None:
        """The id of BOS, EOS or padding: by the token's text, else by the number in config.json."""
        text = _content(config.get(f"{kind}_token"))
        numbers = _numbers(config.get(f"{kind}_token_id"))
        if text is None:
            return numbers[0] if numbers and self.backend.id_to_token(numbers[0]) is not None else None
        found = self.backend.token_to_id(text)
        if found is None and kind == "eos":
            raise RefpeftError(f"{self.name}: eos_token {text!r} is not in the vocabulary of tokenizer.json")
        return found

    def _adds_bos(self, config: dict[str, Any]) -> bool:
        if self.bos_id is None:
            return False
        stated = config.get("add_bos_token")
        if stated is not None:
            return bool(stated)
        return self.backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefpeftError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RefpeftError(f"{path} holds a {type(found).__name__}: expected an object")
    return found


def _content(token: Any) -> str | None:
    """A special token is written as a string or as {"content": string, ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _chat_template(config: dict[str, Any], name: str) -> str | None:
    """The template: a string, or the one named "default" of a list."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
        if found is None:
            raise RefpeftError(f"{name}: chat_template has {sorted(map(str, named))} but none named 'default'")
    if found is not None and not isinstance(found, str):
        raise RefpeftError(
            f"{name}: chat_template is a {type(found).__name__}: expected text or a list of named templates"
        )
    return found
