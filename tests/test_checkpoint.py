import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refpeft.errors import RefpeftError
from refpeft.files import write_json, write_safetensors
from refpeft.models.checkpoint import expected_tensors, open_checkpoint
from refpeft.models.config import from_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
UNTIED = LLAMA | {"tie_word_embeddings": False}
GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
ALL = [
    LLAMA,
    UNTIED,
    UNTIED | {"attention_bias": True, "mlp_bias": True},
    UNTIED | {"model_type": "mistral"},
    UNTIED | {"model_type": "qwen2"},
    UNTIED | {"model_type": "qwen3", "head_dim": 6},
    LLAMA | {"model_type": "smollm3", "pad_token_id": 0},
    GPT2,
    GPT2 | {"n_inner": 20, "tie_word_embeddings": False},
]
EMBED = "model.embed_tokens.weight"


def weights(config: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape).astype(dtype)
        for name, shape in expected_tensors(from_hf(config)).items()
    }


def save(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", config)
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def save_shards(directory: Path, config: dict, shards: dict[str, dict], places: dict[str, str] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", config)
    for shard, tensors in shards.items():
        write_safetensors(directory / shard, tensors)
    places = places or {name: shard for shard, tensors in shards.items() for name in tensors}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return directory


def halves(tensors: dict) -> dict[str, dict]:
    names = list(tensors)
    return {f"model-{i}-of-2.safetensors": {name: tensors[name] for name in names[i::2]} for i in (0, 1)}


def fails(path: Path, *words: str) -> None:
    with pytest.raises(RefpeftError) as error:
        open_checkpoint(path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_tensors_and_config_are_those_of_the_files(tmp_path, config, dtype):
    tensors = weights(config, dtype)
    model = open_checkpoint(save(tmp_path, config, tensors))
    assert model.config == from_hf(config) and model.config.raw == config
    assert model.names == list(tensors)
    for name, array in tensors.items():
        found = model.tensor(name)
        assert found.tobytes() == array.tobytes() and not found.flags.writeable
        assert model.shape(name) == array.shape and model.dtype(name) == found.dtype == array.dtype
    assert model.nbytes == (tmp_path / "model.safetensors").stat().st_size


def test_shards_read_as_one_file(tmp_path):
    tensors = weights(UNTIED)
    model = open_checkpoint(save_shards(tmp_path, UNTIED, halves(tensors)))
    assert all(model.tensor(name).tobytes() == array.tobytes() for name, array in tensors.items())


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_names_without_the_prefix_and_buffers_are_taken(tmp_path, config):
    tensors = weights(config)
    bare = {name.partition(".")[2]: array for name, array in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.uint8)
    bare["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    bare["rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert open_checkpoint(save(tmp_path, config, bare)).names == list(tensors)


def test_a_tensor_with_and_without_the_prefix_is_refused(tmp_path):
    tensors = weights(LLAMA)
    fails(
        save(tmp_path, LLAMA, tensors | {"norm.weight": tensors["model.norm.weight"]}), "'norm.weight' is there twice"
    )


def test_a_tied_head_in_the_file_must_be_the_table(tmp_path):
    tensors = weights(LLAMA)
    copied = tensors | {"lm_head.weight": tensors[EMBED].copy()}
    assert open_checkpoint(save(tmp_path, LLAMA, copied)).names == list(tensors)
    copied["lm_head.weight"][10, 7] += 1
    fails(save(tmp_path, LLAMA, copied), "'lm_head.weight' is not the embedding table")


def test_missing_unexpected_and_misshaped_tensors_are_named(tmp_path):
    tensors = weights(LLAMA)
    without = {name: array for name, array in tensors.items() if "layers.1.mlp.up_proj" not in name}
    fails(save(tmp_path, LLAMA, without), "'model.layers.1.mlp.up_proj.weight' is missing")
    fails(save(tmp_path, LLAMA | {"num_hidden_layers": 3}, tensors), "'model.layers.2.", "and 8 more are missing")
    fails(save(tmp_path, LLAMA | {"num_hidden_layers": 1}, tensors), "'model.layers.1.", "and 8 more are not part")
    fails(save(tmp_path, LLAMA | {"vocab_size": 12}, tensors), f"'{EMBED}' has shape (11, 8), the config says (12, 8)")
    fails(
        save(tmp_path, LLAMA, tensors | {EMBED: np.zeros((11, 8), np.int8)}),
        str(tmp_path / "model.safetensors"),
        f"'{EMBED}' has dtype int8",
    )


def test_an_index_cannot_lead_out_of_its_directory(tmp_path):
    outside = tmp_path / "outside.safetensors"
    tensors = weights(LLAMA)
    write_safetensors(outside, tensors)
    inside = tmp_path / "model"
    for name in ["../outside.safetensors", str(outside), "..", "", "a/b.safetensors", "x\0.safetensors", "x.bin"]:
        save_shards(inside, LLAMA, {}, dict.fromkeys(tensors, name))
        fails(inside, "which is not a file in its directory")
    os.symlink(outside, inside / "link.safetensors")
    save_shards(inside, LLAMA, {}, dict.fromkeys(tensors, "link.safetensors"))
    fails(inside, "'link.safetensors'", "it is a link to")
    os.symlink("loop.safetensors", inside / "loop.safetensors")
    save_shards(inside, LLAMA, {}, dict.fromkeys(tensors, "loop.safetensors"))
    fails(inside, "loop.safetensors")


def test_the_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tensors = weights(LLAMA)
    save_shards(snapshot, LLAMA, halves(tensors))
    for number, file in enumerate(sorted(snapshot.glob("*"))):
        file.rename(blobs / str(number))
        os.symlink(f"../../blobs/{number}", file)
    assert open_checkpoint(snapshot).names == list(tensors)


def test_an_index_and_its_shards_must_agree(tmp_path):
    tensors = weights(LLAMA)
    a, b = halves(tensors)
    shards = halves(tensors)
    places = {name: shard for shard, found in shards.items() for name in found}
    save_shards(tmp_path, LLAMA, shards, places | {"model.extra": b})
    fails(tmp_path, b, "'model.extra' is not in this file")
    save_shards(tmp_path, LLAMA, shards, {name: shard for name, shard in places.items() if name != EMBED})
    fails(tmp_path, a, f"'{EMBED}' is in this file, but not according to")
    shards[b][EMBED] = tensors[EMBED]
    save_shards(tmp_path, LLAMA, shards, places)
    fails(tmp_path, f"'{EMBED}' is also in {a}")
    save_shards(tmp_path, LLAMA, {}, dict.fromkeys(places, "absent.safetensors"))
    fails(tmp_path, "absent.safetensors: cannot be read")
    for broken in [{}, {"weight_map": []}, {"weight_map": {"a": 1}}]:
        write_json(tmp_path / "model.safetensors.index.json", broken)
        fails(tmp_path, "expected a weight_map")


def test_other_directories_are_refused_with_what_to_do(tmp_path):
    fails(tmp_path / "none", "expected a directory with config.json")
    fails(tmp_path, "has no config.json")
    write_json(tmp_path / "adapter_config.json", {})
    fails(tmp_path, "holds an adapter, not a model")
    write_json(tmp_path / "config.json", LLAMA)
    fails(tmp_path, "has neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    fails(tmp_path, "could run any code when read", "save_pretrained")
    write_json(tmp_path / "config.json", LLAMA | {"model_type": "bloom"})
    fails(tmp_path, str(tmp_path / "config.json"), "'bloom'")


def test_files_are_what_a_copy_needs_beside_its_weights(tmp_path):
    save(tmp_path, LLAMA, weights(LLAMA))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("no")
    files = open_checkpoint(tmp_path).files()
    assert set(files) == {"config.json", "tokenizer.json"} and json.loads(files["config.json"]) == LLAMA


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_shards(tmp_path_factory.mktemp("sharded"), LLAMA, halves(weights(LLAMA)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_directory_opens_or_is_an_error_of_ours(sharded, data):
    file = data.draw(st.sampled_from(sorted(sharded.iterdir())))
    good = file.read_bytes()
    broken = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, min(len(good), 1500) - 1), min_size=1, max_size=3)):
        broken[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(broken[: data.draw(st.sampled_from([len(good), len(good) // 2]))])
        open_checkpoint(sharded)
    except RefpeftError as error:
        assert str(sharded) in str(error)
    finally:
        file.write_bytes(good)


@pytest.mark.real
@pytest.mark.parametrize("config", ALL, ids=lambda config: config["model_type"])
def test_names_and_shapes_are_those_that_transformers_saves(tmp_path, config):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = {key: value for key, value in config.items() if key != "model_type"}
    theirs = transformers.AutoConfig.for_model(config["model_type"], **values)
    transformers.AutoModelForCausalLM.from_config(theirs).save_pretrained(tmp_path)
    model = open_checkpoint(tmp_path)
    saved = expected_tensors(from_hf(config))
    assert {name: model.shape(name) for name in model.names} == saved
    assert model.config == from_hf(config)


@pytest.mark.real
def test_stories260k_opens_with_its_tokenizer():
    directory = Path(os.environ.get("REFPEFT_MODELS", "none")) / "stories260K"
    if not directory.is_dir():
        pytest.skip("REFPEFT_MODELS is not set or has no stories260K")
    model = open_checkpoint(directory)
    assert model.config.layers == 5
    assert model.tokenizer().decode(model.tokenizer().encode("Once upon a time")).strip() == "Once upon a time"
