"""A model that was written loads again with the same logits: tied or not, with merged adapters, in both layouts."""

import json

import ml_dtypes
import numpy as np
import pytest
import tiny
import tiny_files

import refpeft
from refpeft.errors import RefpeftError
from refpeft.files import read_safetensors
from refpeft.models import saving

IDS = np.arange(12)[None]


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_merged_model_loads_with_the_logits_of_the_adapter(tmp_path, name, method):
    model = refpeft.load(tiny_files.write_model(tmp_path / "model", name), dtype="float64")
    options = {"targets": ["c_attn"] if name == "gpt2" else ["q_proj"]} if method == "lora" else {}
    tiny.scramble(refpeft.attach(model, method, options), scale=0.05)
    expected = model(IDS).data
    refpeft.merge(model)
    saving.save(model, tmp_path / "merged")
    again = refpeft.load(tmp_path / "merged", dtype="float64")
    assert np.abs(again(IDS).data - expected).max() < 1e-5 * np.abs(expected).max()
    assert again.tokenizer.encode("yes") == model.tokenizer.encode("yes")


def test_a_head_that_is_no_longer_the_table_is_written_and_said_in_the_config(tmp_path):
    model = refpeft.load(tiny_files.write_model(tmp_path / "model", "tied"))
    tiny.scramble(refpeft.attach(model, "full", {"targets": ["lm_head"], "tie": False}))
    expected = model(IDS).data
    refpeft.merge(model)
    saving.save(model, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    again = refpeft.load(tmp_path / "merged")(IDS).data  # by a product with a frozen weight, which adds up otherwise
    assert np.abs(again - expected).max() <= 8 * np.finfo("f4").eps * np.abs(expected).max()


def test_bfloat16_is_written_as_such(tmp_path):
    model = refpeft.load(tiny_files.write_model(tmp_path / "model"))
    saving.save(model, tmp_path / "copy", "bfloat16")
    stored = read_safetensors(tmp_path / "copy" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_with_an_adapter_on_it_is_refused(tmp_path):
    model = refpeft.load(tiny_files.write_model(tmp_path / "model"))
    refpeft.attach(model, "lora")
    with pytest.raises(RefpeftError, match="lora is attached to the model: merge or detach it"):
        saving.save(model, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
