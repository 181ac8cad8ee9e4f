"""Tokenizers small enough to read, of the two kinds that matter, for the tests of data."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import refpeft.tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def merged(words):
    """Vocabulary pieces and merges that build each word from left to right."""
    pieces, merges = [], []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return pieces, merges


def byte_level(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    """GPT-2's kind: bytes, a space belongs to the word behind it, nothing is put in front of a text."""
    pieces, merges = merged(["Ġyes", "Ġno", "hello", "Ġworld", "user", "assistant", "system"])
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, *pieces])}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return backend


def llama_like():
    """Llama 2's kind: a space is put in front of a text, unknown characters fall back to bytes, BOS is put first."""
    specials = ["<unk>", "<s>", "</s>"]
    pieces, merges = merged(["▁yes", "▁no", "▁hello", "▁[INST]", "[/INST]"])
    characters = sorted(
        {c for piece in pieces for c in piece} | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ.:?!1234567890")
    )
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *pieces]
    backend = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def chatml():
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    return refpeft.tokenizer.Tokenizer(byte_level(), config)


def plain():
    """No chat template, no BOS."""
    return refpeft.tokenizer.Tokenizer(byte_level(), {"eos_token": "<|endoftext|>"})


def llama():
    return refpeft.tokenizer.Tokenizer(llama_like(), {"bos_token": "<s>", "eos_token": "</s>"})


def save(directory, backend, **files):
    """Writes a model directory: save(path, backend, tokenizer_config={...}) and so on."""
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def words(known: list[str]) -> Tokenizer:
    """A WordPiece tokenizer of these words, with BERT's special tokens around a text and between two."""
    specials = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    vocabulary = {token: number for number, token in enumerate([*specials, *known])}
    built = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    built.add_special_tokens(specials)
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.decoder = decoders.WordPiece()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return built
