"""Sequence to sequence: an encoder reads a source, and a decoder says the answer (arXiv:1910.10683)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refpeft.errors import RefpeftError
from refpeft.examples import Answered
from refpeft.items import Item, Plain, described
from refpeft.tasks.base import ended_early
from refpeft.tasks.texts import Texts
from refpeft.tokenizer import Tokenizer


class Seq2Seq(Texts):
    """`start` is the token with which the model's decoder begins. Source and answer end in EOS, as T5 was made."""

    name = "seq2seq"

    def __init__(self, tokenizer: Tokenizer, start: int):
        super().__init__(tokenizer)
        if tokenizer.eos_id is None:
            raise RefpeftError(f"{tokenizer.name} names no eos_token, so no answer could end")
        self.start = start

    def encode(self, item: Item, line: int) -> list[Answered]:
        if not isinstance(item, Plain) or not item.prompt.strip():
            raise RefpeftError(f"{described(item)}: expected a source and its target")
        ids, answer = ended(self.tokenizer, item.prompt), ended(self.tokenizer, item.completion)
        return [Answered(ids, answer, self.start, line)]

    def cut(self, item: Item, example: Answered, length: int) -> Answered:
        """Both in `length` tokens: the source keeps its end token, the answer's end is lost."""
        return replace(example, ids=ended_early(example.ids, length), answer=example.answer[:length])

    def prompt(self, example: Answered) -> np.ndarray:
        return example.ids

    def wanted(self, example: Answered) -> str:
        return self.tokenizer.decode(example.answer)

    def learned(self, example: Answered) -> np.ndarray:
        return example.answer


def ended(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a source, or of an answer, with EOS at their end where there is one."""
    ids, end = tokenizer.encode(text.strip()), tokenizer.eos_id
    return np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], np.int32)
