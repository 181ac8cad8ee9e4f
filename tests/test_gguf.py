import builtins
import json
import os
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from refpeft.errors import RefpeftError
from refpeft.files import write_safetensors
from refpeft.models.checkpoint import expected_tensors, open_checkpoint
from refpeft.models.config import from_hf

gguf = pytest.importorskip("gguf")

BASE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": BASE | {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 5e5},
    "llama with biases": BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": 16},
    "qwen2": BASE | {"model_type": "qwen2", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 16},
    "smollm3": BASE | {"model_type": "smollm3"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def weights(config: dict) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = expected_tensors(from_hf(config))
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(path: Path, config: dict, tensors: dict[str, np.ndarray], quantize=None, **extra) -> Path:
    """A GGUF file by the gguf package's own writer and table of names, as convert_hf_to_gguf.py makes it."""
    model = from_hf(config)
    architecture = "llama" if model.family == "mistral" else model.family
    fields = {
        "add_block_count": model.layers,
        "add_context_length": model.context,
        "add_embedding_length": model.dim,
        "add_feed_forward_length": model.ff,
        "add_head_count": model.heads,
        "add_bos_token_id": 1,
        "add_eos_token_id": 2,
    }
    if model.family == "gpt2":
        fields["add_layer_norm_eps"] = model.norm_eps
    else:
        fields["add_head_count_kv"] = model.kv_heads
        fields["add_layer_norm_rms_eps"] = model.norm_eps
        fields["add_rope_freq_base"] = model.rope.theta
        fields["add_rope_dimension_count"] = model.head_dim
        if model.rope.kind != "default":
            fields["add_rope_scaling_type"] = gguf.RopeScalingType(model.rope.kind)
            fields["add_rope_scaling_factor"] = model.rope.factor
        if "head_dim" in config:
            fields["add_key_length"] = fields["add_value_length"] = model.head_dim
        if model.windows[0] is not None:
            fields["add_sliding_window"] = model.windows[0]
    writer = gguf.GGUFWriter(path, architecture)
    for method, value in (fields | extra).items():
        getattr(writer, method)(value)

    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], model.layers)
    for name, array in tensors.items():
        if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            array = permute(array, model.heads if "q_proj" in name else model.kv_heads)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = np.ascontiguousarray(array.T)
        full = name if name == "rope_freqs.weight" else names.get_name(name, (".weight", ".bias"))
        if quantize is not None and array.ndim == 2:
            writer.add_tensor(full, gguf.quants.quantize(array, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(full, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    config = CONFIGS["llama"]
    return write(tmp_path_factory.mktemp("gguf") / "good.gguf", config, weights(config), **words("gpt-2"))


def words(pre: str, vocabulary: list[str] | None = None, kinds=None, merges=()) -> dict:
    """The tokenizer's fields, for `write`."""
    vocabulary = vocabulary or [*"<>0", *(f"<{number}>" for number in range(36)), "<0"]
    return {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": pre,
        "add_token_list": vocabulary,
        "add_token_types": kinds or [1] * len(vocabulary),
        "add_token_merges": list(merges) or ["< 0"],
        "add_chat_template": "{{ messages }}",
        "add_eot_token_id": 3,
    }


# Models


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_weights_are_those_that_the_file_was_made_from(tmp_path, name):
    config, tensors = CONFIGS[name], weights(CONFIGS[name])
    model = open_checkpoint(write(tmp_path / "x.gguf", config, tensors))
    expected = from_hf(config | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
    assert model.config == expected
    assert model.names == list(tensors)
    for key, array in tensors.items():
        found = model.tensor(key)
        assert found.shape == model.shape(key) == array.shape and found.dtype == model.dtype(key) == np.float32
        assert found.tobytes() == array.tobytes() and not found.flags.writeable


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized_tensors_are_what_the_gguf_package_dequantizes(tmp_path, name, kind):
    kind = gguf.GGMLQuantizationType[kind]
    config, tensors = CONFIGS[name], weights(CONFIGS[name])
    model = open_checkpoint(write(tmp_path / "x.gguf", config, tensors, quantize=kind))
    wanted = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind.name, np.float32)
    for key, array in tensors.items():
        if array.ndim == 2:
            outer = name == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            packed = gguf.quants.quantize(np.ascontiguousarray(array.T) if outer else array, kind)
            expected = gguf.quants.dequantize(packed, kind)
            found = model.tensor(key)
            assert found.dtype == model.dtype(key) == wanted
            np.testing.assert_array_equal(found.astype(np.float32), expected.T if outer else expected)


def test_llama_3_scaling_is_recognized_from_its_frequency_factors(tmp_path):
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    config = CONFIGS["llama"] | {"head_dim": 8}
    # as LlamaModel.generate_extra_tensors in convert_hf_to_gguf.py
    waves = 2 * np.pi * 5e5 ** (np.arange(0, 8, 2) / 8)
    smooth = (8192 / waves - 1) / (4 - 1)
    factors = np.where(waves < 8192 / 4, 1.0, np.where(waves > 8192, 32.0, 1 / ((1 - smooth) / 32 + smooth)))
    tensors = weights(config) | {"rope_freqs.weight": factors.astype(np.float32)}
    model = open_checkpoint(write(tmp_path / "x.gguf", config, tensors))
    assert model.config.rope == from_hf(config | {"rope_scaling": scaling}).rope
    tensors["rope_freqs.weight"][1] *= 1.01
    with pytest.raises(RefpeftError, match=r"rope_freqs\.weight"):
        open_checkpoint(write(tmp_path / "y.gguf", config, tensors))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"add_expert_count": 8}, "key 'llama.expert_count' = 8 is not known"),
        ({"add_logit_scale": 2.0}, "key 'llama.logit_scale' = 2.0 is not known"),
        ({"add_rope_scaling_type": gguf.RopeScalingType.LONGROPE}, "rope.scaling.type is 'longrope'"),
        ({"add_rope_dimension_count": 4}, "rope.dimension_count is 4, heads have 8"),
        ({"add_key_length": 16}, "keys and values have different lengths"),
    ],
)
def test_metadata_that_changes_the_maths_is_refused_by_name(tmp_path, extra, message):
    path = write(tmp_path / "x.gguf", CONFIGS["llama"], weights(CONFIGS["llama"]), **extra)
    with pytest.raises(RefpeftError) as error:
        open_checkpoint(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_another_architecture_or_a_lacking_tensor_is_refused(tmp_path):
    config = CONFIGS["llama"]
    path = write(tmp_path / "x.gguf", config, weights(config))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0bloom"))
    with pytest.raises(RefpeftError, match=r"general\.architecture is 'bloom'; refpeft has llama"):
        open_checkpoint(path)
    path.write_bytes(content.replace(b"blk.1.ffn_up", b"blk.1.ffn_ex"))
    with pytest.raises(RefpeftError, match=r"tensor 'blk\.1\.ffn_ex\.weight' is not known"):
        open_checkpoint(path)
    tensors = weights(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(RefpeftError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        open_checkpoint(write(tmp_path / "y.gguf", config, tensors))


def test_a_version_or_a_block_format_that_is_not_supported_is_no_damage(good):
    content = good.read_bytes()
    path = good.with_name("other.gguf")
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + content[8:])
    with pytest.raises(RefpeftError, match=r"other\.gguf: its version is 50331648"):
        open_checkpoint(path)
    at = content.index(b"token_embd.weight") + 17 + 4 + 16
    path.write_bytes(content[:at] + struct.pack("<I", gguf.GGMLQuantizationType.I8) + content[at + 4 :])
    with pytest.raises(RefpeftError, match=r"tensor 'token_embd\.weight' is of type I8, which"):
        open_checkpoint(path)


def test_without_the_gguf_package_the_error_says_what_to_install(good, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name == "gguf":
            raise ImportError
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RefpeftError, match=r"pip install 'refpeft\[gguf\]'"):
        open_checkpoint(good)


# Tokenizers

TEXT = "the theme of 12345 then's isn't DON'T  it?\n\n  a lot: ¡sí! 数字 123 \tx+=y ... <|end|>the\r\n e\u0301"


def original(pre: str) -> Tokenizer:
    """A small byte-level BPE tokenizer, built as the models' own tokenizer.json are."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    cut = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(pattern % "{1,3}"), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(pattern % ""), "isolated")],
    }[pre]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|start|>", "<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def rebuilt(request, tmp_path_factory):
    """(a tokenizer, the checkpoint of a GGUF file that was made with it, the tokenizer of that checkpoint)"""
    tokenizer = original(request.param)
    state = json.loads(tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = [{"<|start|>": 3, "<|end|>": 3, "<tool>": 4}.get(token, 1) for token in vocabulary]
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    config = CONFIGS["llama"] | {"vocab_size": len(vocabulary)}
    fields = words(request.param, vocabulary, kinds, merges)
    path = write(tmp_path_factory.mktemp("tok") / "x.gguf", config, weights(config), **fields)
    checkpoint = open_checkpoint(path)
    return tokenizer, checkpoint, checkpoint.tokenizer()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from([*TEXT.split(), "<tool>", " ", "\n", "12"])).map("".join))
def test_the_rebuilt_tokenizer_cuts_any_text_as_the_original(rebuilt, text):
    tokenizer, _, copy = rebuilt
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert copy.encode(text) == ids
    assert copy.decode(ids) == tokenizer.decode(ids)


def test_special_tokens_and_template_are_taken(rebuilt):
    tokenizer = rebuilt[2]
    llama = "Split" in str(tokenizer.backend.pre_tokenizer) and tokenizer.backend.normalizer is None
    assert tokenizer.bos_id == 1 and tokenizer.eos_ids == {2, 3} and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.add_bos == llama
    assert (tokenizer.backend.encode("the").ids[0] == 1) == llama


def test_files_are_a_hugging_face_directory(tmp_path, rebuilt):
    _, checkpoint, other = rebuilt
    for name, content in checkpoint.files().items():
        (tmp_path / name).write_bytes(content)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    again = open_checkpoint(tmp_path)
    assert again.config == checkpoint.config
    one = again.tokenizer()
    assert one.encode(TEXT, specials=True) == other.encode(TEXT, specials=True)
    assert (one.bos_id, one.eos_ids, one.chat_template) == (other.bos_id, other.eos_ids, other.chat_template)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_tokenizer_pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; refpeft has gpt-2, smollm"),
        ({"add_tokenizer_model": "llama"}, "tokenizer.ggml.model is 'llama'; refpeft has gpt2"),
        ({"add_token_types": [1] * 39}, "not as many as"),
        ({"add_token_list": ["a"] * 40}, "has a token twice"),
        ({"add_token_merges": ["x y z"]}, "an entry that is not two tokens"),
        ({"add_token_merges": ["x y"]}, "cannot be rebuilt"),
        ({"add_bos_token_id": 77}, "cannot be rebuilt"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_one_line(tmp_path, change, message):
    config = CONFIGS["llama"]
    path = write(tmp_path / "x.gguf", config, weights(config), **words("gpt-2") | change)
    with pytest.raises(RefpeftError) as error:
        open_checkpoint(path).tokenizer()
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


# Files that are not what they should be


def header_length(content: bytes) -> int:
    return content.index(b"blk.1.") + 200


def test_every_truncation_is_an_error_of_ours(good):
    content = good.read_bytes()
    path = good.with_name("cut.gguf")
    lengths = [*range(0, 200), *range(200, header_length(content), 7), len(content) // 2, len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(RefpeftError, match=r"cut\.gguf: not a valid GGUF file"):
            open_checkpoint(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bits_give_a_model_or_an_error_of_ours(good, data):
    content = bytearray(good.read_bytes())
    for place in data.draw(st.lists(st.integers(0, header_length(content)), min_size=1, max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = good.with_name("flipped.gguf")
    path.write_bytes(content)
    try:
        model = open_checkpoint(path)
        model.tokenizer()
        for name in model.names:
            model.tensor(name)
    except RefpeftError as error:
        assert "flipped.gguf" in str(error)


def start(tensors: int, values: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string)) + string.encode()


@pytest.mark.parametrize(
    "content",
    [
        start(2**60, 0),
        start(0, 2**60),
        start(0, 1, struct.pack("<Q", 2**60)),
        start(0, 1, text("a") + struct.pack("<IQ", 8, 2**63)),
        start(0, 1, text("a") + struct.pack("<IIQ", 9, 0, 2**60)),
        start(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**60)),
        start(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) * 50),
        start(0, 1, text("a") + struct.pack("<I", 99)),
        start(1, 0, text("t") + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0)),
        start(1, 0, text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**63)),
        start(1, 0, text("t") + struct.pack("<IQIQ", 1, 0, 0, 0)),
        start(1, 0, text("t") + struct.pack("<IQIQ", 1, 4, 9999, 0)),
        start(1, 0, text("t") + struct.pack("<I", 2**31)),
        b"GGML" + bytes(40),
    ],
)
def test_false_counts_are_found_and_allocate_nothing(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(RefpeftError, match=r"x\.gguf: not a valid GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: start(1, 3, rest)))
def test_random_bytes_are_an_error_of_ours(good, content):
    path = good.with_name("random.gguf")
    path.write_bytes(content)
    with pytest.raises(RefpeftError):
        open_checkpoint(path)


# The real thing


@pytest.mark.real
def test_smollm2_has_the_numbers_of_its_own_config_and_tokenizer():
    found = sorted(Path(os.environ.get("REFPEFT_MODELS", "none")).rglob("SmolLM2-135M-Instruct*.gguf"))
    if not found:
        pytest.skip("REFPEFT_MODELS is not set or has no SmolLM2-135M-Instruct*.gguf")
    model = open_checkpoint(found[0])
    config = model.config
    assert (config.dim, config.layers, config.heads, config.kv_heads, config.ff) == (576, 30, 9, 3, 1536)
    assert (config.vocab, config.tied, config.rope.theta, config.norm_eps) == (49152, True, 100000.0, 1e-5)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), 2)

    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(found[0]).tensors}
    for name, key, heads in [
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight", 9),
        ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 3),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", None),
        ("model.norm.weight", "output_norm.weight", None),
    ]:
        ours = model.tensor(name)
        dequantized = gguf.quants.dequantize(theirs[key].data, theirs[key].tensor_type)
        np.testing.assert_array_equal(permute(ours, heads) if heads else ours, dequantized)

    tokenizer = model.tokenizer()
    assert not tokenizer.add_bos and tokenizer.eos_ids == {2} and tokenizer.chat_template
    assert tokenizer.encode("The capital of France is 12.") == [504, 3575, 282, 4649, 314, 216, 33, 34, 30]
    assert tokenizer.encode("<|im_end|>") == [2]
