"""Quantized files both ways between refpeft and transformers with bitsandbytes: the same bytes, logits and weights.

Rows are whole blocks: with AVX-512, bitsandbytes 0.50.2 decodes others wrongly.
"""

import json

import numpy as np
import pytest

from refpeft import api, files
from refpeft.models import saving
from refpeft.models.checkpoint import open_checkpoint
from refpeft.quant import Dense, Quantized, make_quantizer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes", minversion="0.50.2")

IDS = torch.arange(12)[None]
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, vocab_size=96, num_attention_heads=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4),
}


def load(path, dtype: str, config=None):
    """A model in transformers. Without `dtype` it would make what is not quantized float16."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), **({"quantization_config": config} if config else {})
    ).eval()


def without_tokenizer(directory):
    """A checkpoint of a directory that has no tokenizer."""
    checkpoint = open_checkpoint(directory)
    checkpoint.tokenizer = lambda: None
    return checkpoint


def logits(model) -> torch.Tensor:
    """With gradients: without, bitsandbytes multiplies in bfloat16 where a CPU has AVX-512 for that."""
    return model(IDS).logits.detach()


@pytest.fixture(scope="module", params=[(f, d) for f in CONFIGS for d in ("float32", "bfloat16")], ids="-".join)
def dense(request, tmp_path_factory):
    """(directory of a random model, its dtype)"""
    family, dtype = request.param
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("dense")
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    return directory, dtype


@pytest.fixture(scope="module", params=[("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)])
def theirs(request, dense, tmp_path_factory):
    """(quantizer, double quantization, directory that transformers wrote, dtype)"""
    (kind, double), (source, dtype) = request.param, dense
    if kind == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    directory = tmp_path_factory.mktemp("theirs")
    load(source, dtype, config).save_pretrained(directory)
    return kind, double, directory, dtype


def test_what_is_written_is_what_transformers_writes_and_loads(dense, theirs, tmp_path):
    kind, double, directory, dtype = theirs
    quantizer = make_quantizer(kind, {"compat": "bnb-cpu"}, double)
    saving.quantize(open_checkpoint(dense[0]), tmp_path / "ours", quantizer)
    ours, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "ours", directory))
    assert ours == expected
    assert json.dumps(ours["quantization_config"]) == json.dumps(expected["quantization_config"])
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    assert torch.equal(logits(load(tmp_path / "ours", dtype)), logits(load(directory, dtype)))


def test_what_transformers_wrote_has_here_the_weights_and_logits_that_it_has_there(theirs):
    kind, _, directory, dtype = theirs
    peer, model = load(directory, dtype), api.build(without_tokenizer(directory), "float32")
    compared = 0
    for name, module in peer.named_modules():
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        kept = model.frozen[f"{name}.weight"]
        assert isinstance(kept, Quantized) and kept.quantizer.name == kind
        if kind == "int8":
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            module.weight.quant_state.dtype = torch.float32
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert np.array_equal(kept(), weight.numpy())
        compared += 1
    assert compared == len(model.quantizable)
    if kind != "int8" and dtype == "float32":  # its int8 layers quantize what comes in, too
        found, expected = model(IDS.numpy()).data, logits(peer).numpy()
        assert abs(found - expected).max() <= 1e-5 * abs(expected).max()


def test_modules_that_are_named_stay_dense_there(dense, tmp_path):
    source, dtype = dense
    model = api.build(without_tokenizer(source), "float32", quantizer=make_quantizer("nf4"))
    name = next(iter(model.quantizable))
    model.frozen[name] = Dense(model.frozen[name](), model.dtype)
    saving.save(model, tmp_path / "saved", dtype)
    peer = load(tmp_path / "saved", dtype)
    quantized = {f"{n}.weight" for n, module in peer.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert quantized == model.quantizable - {name}
    assert name in files.read_safetensors(tmp_path / "saved" / "model.safetensors")
