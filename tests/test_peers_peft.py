"""Methods against Hugging Face PEFT on the same tensors in float64, and adapter files in both directions."""

from __future__ import annotations

import dataclasses
import importlib
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_files

import refpeft
from refpeft import adapters, files, sites
from refpeft.errors import RefpeftError
from refpeft.models import saving
from refpeft.models.base import Model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from torch_float64 import Float64, compute_in_float64  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

LIMIT = 1e-10
IDS = tiny.ids(2, 9)
TARGETS = np.roll(tiny.ids(2, 9, seed=7), 1)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    compute_in_float64(monkeypatch)


@pytest.fixture(autouse=True)
def butterflies(monkeypatch):
    """PEFT computes one butterfly factor, whatever is asked for, without its CUDA extension; this stands in for it."""
    layer = importlib.import_module("peft.tuners.boft.layer")
    extension = types.SimpleNamespace(
        apply=lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
    )
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", extension)


def peer(name: str, folder: Path):
    """tiny.model(name) in transformers, float64."""
    files.write_safetensors(folder / "model.safetensors", tiny.arrays(tiny.CONFIGS[name]), {"format": "pt"})
    files.write_json(folder / "config.json", tiny.CONFIGS[name])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")


def scrambled(model):
    """Moves what PEFT trains away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "ranknum" in name
            ):  # of AdaLoRA, a constant that no file has; in another dtype than float32 it is trained
                parameter.requires_grad = False
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def peer_logits(model, ids: np.ndarray = IDS, mask: np.ndarray | None = None):
    given = {} if mask is None else {"attention_mask": torch.from_numpy(mask)}
    with Float64():
        return model(input_ids=torch.from_numpy(ids).long(), **given).logits[:, -ids.shape[1] :]


def peer_gradients(model) -> dict[str, np.ndarray]:
    """Gradients of the mean loss, by the names of the tensors in an adapter's file."""
    loss = torch.nn.functional.cross_entropy(
        peer_logits(model).flatten(0, 1), torch.from_numpy(TARGETS).long().flatten(), ignore_index=-100
    )
    model.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".modules_to_save", "").replace(".default", "").replace("_vector.weight", "_vector")
            name = "base_model.vblora_vector_bank" if name.endswith("vblora_vector_bank") else name
            found["prompt_embeddings" if name.startswith("prompt_encoder") else name] = parameter.grad.numpy()
    return found


def our_gradients(model: Model) -> dict[str, np.ndarray]:
    """The same from refpeft, packed as the tensors of the file are."""
    grads = tiny.gradients(model, tiny.Batch(IDS, TARGETS))
    (adapter,) = model.adapters
    entries, _ = adapters._written(adapter, model, None)
    once = {entry.params: entry for entry in reversed(entries) if grads.keys() >= set(entry.params)}  # no constants
    return {entry.name: entry.pack(*(grads[name] for name in entry.params)) for entry in once.values()}


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return abs(got - want).max() / max(abs(want).max(), 1e-300)


PEFTS = {
    "lora": lambda f: peft.LoraConfig(r=4, lora_alpha=6),
    "lora-all-linear": lambda f: peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", use_rslora=True),
    "lora-regex": lambda f: peft.LoraConfig(r=2, target_modules=r".*\.[0-9]+\.(self_attn|attn)\.(q_proj|c_attn)"),
    "lora-patterns": lambda f: peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        # keys that meet would be read in another order than they were trained in: PEFT sorts them when it saves
        rank_pattern={r"0\.mlp\.(down_proj|c_proj)": 5, r"1\..*": 3},
        alpha_pattern={r"^.*\.0\..*": 1},
    ),
    "lora-exclude-layers": lambda f: peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        exclude_modules=["mlp.c_proj"] if f == "gpt2" else ["down_proj", "self_attn.v_proj"],
    ),
    "lora-layers": lambda f: peft.LoraConfig(
        r=2, target_modules=["c_attn"] if f == "gpt2" else ["q_proj", "o_proj"], layers_to_transform=[1]
    ),
    "lora-bias-all": lambda f: peft.LoraConfig(r=2, bias="all"),
    "lora-bias-only": lambda f: peft.LoraConfig(r=2, bias="lora_only"),
    "lora-embedding": lambda f: peft.LoraConfig(
        r=2, target_modules=["wte"] if f == "gpt2" else ["embed_tokens", "v_proj"]
    ),
    "lora-saved": lambda f: peft.LoraConfig(
        r=2,
        modules_to_save=["ln_f", "h.0.mlp.c_fc"] if f == "gpt2" else ["lm_head", "model.norm", "0.self_attn.k_proj"],
    ),
    "dora": lambda f: peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", use_dora=True),
    "adalora": lambda f: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=9, target_modules="all-linear"
    ),
    "vera": lambda f: peft.VeraConfig(r=4, target_modules="all-linear"),
    "vera-drawn": lambda f: peft.VeraConfig(
        r=3, target_modules="all-linear", save_projection=False, projection_prng_key=11
    ),
    # PEFT rounds LoHa's scale to float32: alpha / r is a whole number here
    "loha": lambda f: peft.LoHaConfig(r=3, alpha=6, target_modules="all-linear", rank_pattern={r"0\.mlp\..*": 2}),
    "lokr": lambda f: peft.LoKrConfig(r=2, alpha=3, target_modules="all-linear", alpha_pattern={"down_proj": 7}),
    "lokr-both": lambda f: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=8, target_modules="all-linear"),
    "hira": lambda f: peft.HiraConfig(r=3, target_modules="all-linear"),
    "delora": lambda f: peft.DeloraConfig(r=3, delora_lambda=2, target_modules="all-linear"),
    "ia3": lambda f: peft.IA3Config(),
    "ln_tuning": lambda f: peft.LNTuningConfig(
        target_modules=["ln_1", "ln_2", "ln_f"]
        if f == "gpt2"
        else ["input_layernorm", "post_attention_layernorm", "norm"]
    ),
    "shira": lambda f: peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "trainable_tokens": lambda f: peft.TrainableTokensConfig(token_indices=[7, 3, 12]),
    "prompt_tuning": lambda f: peft.PromptTuningConfig(num_virtual_tokens=3),
    "prefix_tuning": lambda f: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "llama_adapter": lambda f: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
    "oft": lambda f: peft.OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "oft-exact": lambda f: peft.OFTConfig(
        oft_block_size=8, target_modules="all-linear", use_cayley_neumann=False, block_share=True
    ),
    "boft": lambda f: peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules="all-linear"),
    "hra": lambda f: peft.HRAConfig(r=4, target_modules="all-linear"),
    "road": lambda f: peft.RoadConfig(variant="road_4", group_size=4, target_modules=["q_proj", "down_proj"]),
    # of two: for larger blocks PEFT's gradient of what is below is not that of its output
    "c3a": lambda f: peft.C3AConfig(block_size=1, block_size_pattern={"down_proj": 2}, target_modules="all-linear"),
    "fourierft": lambda f: peft.FourierFTConfig(
        n_frequency=30, n_frequency_pattern={"(o_proj|c_fc)": 7}, target_modules="all-linear"
    ),
    "miss": lambda f: peft.MissConfig(r=7, target_modules="all-linear"),
    "miss-mini": lambda f: peft.MissConfig(r=5, mini_r=4, init_weights="mini", target_modules="all-linear"),
    "vblora": lambda f: peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=4, target_modules="all-linear"),
    "randlora": lambda f: peft.RandLoraConfig(r=5, target_modules="all-linear"),
}
NETWORKS = {
    "p_tuning": lambda f: peft.PromptEncoderConfig(num_virtual_tokens=3),
    "p_tuning-lstm": lambda f: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=6
    ),
    "prefix_tuning-network": lambda f: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7
    ),
}
"""Those whose files have what a network gave, and not the network."""
FAMILIES = ("llama", "qwen2", "gpt2")
LLAMA_ONLY = ("llama_adapter",)
"""Methods that PEFT has in Llama alone of these, or as another function elsewhere."""
LINEAR_ONLY = ("miss", "road", "c3a", "shira", "oft", "boft", "hra", "loha", "lokr", "delora")
"""Methods that PEFT has not at GPT-2's Conv1D."""


def pairs(names) -> list[tuple[str, str]]:
    """(name, family) of all that PEFT has."""
    missing = {"gpt2": LINEAR_ONLY + LLAMA_ONLY, "qwen2": LLAMA_ONLY, "llama": ()}
    return [(n, f) for n in names for f in FAMILIES if not n.startswith(missing[f])]


def peft_adapter(name: str, family: str, folder: Path):
    """A PEFT model with random values, saved to `folder`/adapter."""
    config = dataclasses.replace((PEFTS | NETWORKS)[name](family), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scrambled(peft.get_peft_model(peer(family, folder), config))
        model.save_pretrained(folder / "adapter", save_embedding_layers="auto")
    return model


@pytest.mark.parametrize(("name", "family"), pairs(PEFTS))
def test_an_adapter_of_peft_gives_the_same_logits_and_gradients_here(name, family, tmp_path):
    theirs = peft_adapter(name, family, tmp_path)
    ours = tiny.model(family)
    adapters.load(ours, tmp_path / "adapter")
    assert error(ours(IDS).data, peer_logits(theirs).detach().numpy()) < LIMIT

    want, got = peer_gradients(theirs), our_gradients(ours)
    assert got.keys() == want.keys()
    scale = max(abs(g).max() for g in want.values())
    for key in want:
        assert got[key].shape == want[key].shape, key
        assert abs(got[key] - want[key]).max() < LIMIT * scale, key


@pytest.mark.parametrize(("name", "family"), pairs(NETWORKS))
def test_what_a_network_of_peft_gave_gives_the_same_logits_here(name, family, tmp_path):
    theirs = peft_adapter(name, family, tmp_path)
    ours = tiny.model(family)
    adapters.load(ours, tmp_path / "adapter")
    assert error(ours(IDS).data, peer_logits(theirs).detach().numpy()) < LIMIT


@pytest.mark.parametrize(("init", "family"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_what_peft_takes_out_of_the_weights_is_taken_out_here_too(init, family, tmp_path):
    """PEFT decomposes in float32, whose rounding close singular values make larger (7e-6 was seen), and cannot with
    OLoRA at Conv1D."""
    config = peft.LoraConfig(
        r=3, lora_alpha=6, init_lora_weights=init, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = scrambled(peft.get_peft_model(peer(family, tmp_path).float(), config))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = tiny.model(family)
    (adapter,) = adapters.load(ours, tmp_path / "adapter")
    assert adapter.name == init
    assert error(ours(IDS).data, peer_logits(theirs).detach().numpy()) < 2e-5
    adapters.save(tmp_path / "own", ours)  # with what was taken out, so that nobody repeats it
    again = tiny.model(family)
    adapters.load(again, tmp_path / "own")
    assert error(again(IDS).data, ours(IDS).data) < 2e-6


def saved_and_loaded_by_peft(name: str, options: dict, family: str, folder: Path) -> tuple[Model, object]:
    """The tiny model with a method of ours, and PEFT's after reading what it saved."""
    ours = tiny.model(family)
    adapter = sites.attach(ours, name, options)
    tiny.scramble(adapter)
    for tensor in adapter.params.values():
        tensor.data[...] = tensor.data.astype("f4")  # PEFT holds prompts in float32 when it loads them
    adapters.save(folder / "adapter", ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected) .*keys.*")
        return ours, peft.PeftModel.from_pretrained(peer(family, folder), folder / "adapter").double().eval()


def test_adaption_prompts_of_peft_on_gpt2_are_refused(tmp_path):
    """There PEFT adds them behind the output layer, without it."""
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    peft.get_peft_model(peer("gpt2", tmp_path), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(RefpeftError, match=r"has no bias .not on GPT-2.; with one it computes something else"):
        adapters.load(tiny.model("gpt2"), tmp_path / "adapter")


OURS = {
    "lora": ("lora", {"r": 3, "alpha": 5.0}),
    "lora-rslora": ("lora", {"rslora": True, "targets": "all-linear", "init": "gaussian"}),
    "lora-patterns": (
        "lora",
        {"targets": "all-linear", "rank_pattern": {r"1\..*": 3, ".*": 2}, "alpha_pattern": {r".*0\..*": 1}},
    ),
    "lora-layers": ("lora", {"layers": [1], "targets": "all-linear", "exclude": ["@o"]}),
    "lora-embedding": ("lora", {"targets": ["@embed", "@v"]}),
    "lora-bias": ("lora", {"bias": "lora_only"}),
    "lora-bias-all": ("lora", {"bias": "all"}),
    "lora-saved": ("lora", {"targets": ["@q"], "modules_to_save": ["@down", "@norm"]}),
    "adalora": ("adalora", {"init_r": 4, "target_r": 3, "targets": ["@q", "@down"]}),
    "vera": ("vera", {"r": 5, "targets": ["@q", "@down"]}),
    "vera-drawn": ("vera", {"r": 5, "targets": "all-linear", "torch_seed": 3}),
    "loha": ("loha", {"r": 3, "targets": "all-linear", "alpha_pattern": {".*_proj": 3}}),
    "lokr": ("lokr", {"r": 2, "targets": ["@q", "@v", "@down"], "factor": 4}),
    "hira": ("hira", {"r": 3, "targets": ["@q", "@down"]}),
    "delora": ("delora", {"r": 3, "lambda_pattern": {r".*1.*": 2}}),
    "ia3": ("ia3", {}),
    "ia3-other": ("ia3", {"targets": ["@o", "@up"], "feedforward": ["@up"]}),
    "ln_tuning": ("ln_tuning", {}),
    "ln_tuning-layers": ("ln_tuning", {"layers": [0]}),
    "shira": ("shira", {"r": 3}),
    "shira-magnitude": ("shira", {"r": 3, "mask": "magnitude", "targets": ["@o", "@up"]}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": [9, 2]}),
    "prompt_tuning": ("prompt_tuning", {"tokens": 4}),
    "prefix_tuning": ("prefix_tuning", {"tokens": 4}),
    "llama_adapter": ("llama_adapter", {"tokens": 4, "compat": "peft"}),
    "pre_embed": ("pre_embed", {"tokens": 4}),
    "p_tuning": ("p_tuning", {"tokens": 4, "encoder": "mlp"}),
    "p_tuning_v2": ("p_tuning_v2", {"tokens": 4}),
    "p_tuning-lstm": ("p_tuning", {"tokens": 4, "hidden": 5}),
    "prefix_tuning-network": ("prefix_tuning", {"tokens": 4, "hidden": 5}),
    "oft": ("oft", {"block_size": 6}),
    "oft-neumann": ("oft", {"block_size": 4, "cayley": "neumann", "terms": 6, "targets": ["@o", "@up"]}),
    "boft": ("boft", {"block_size": 8, "butterfly_factors": 1}),
    "boft-factors": ("boft", {"targets": ["@o", "@up"]}),
    "hra": ("hra", {"r": 6, "targets": ["@q", "@down"]}),
    "road": ("road", {"group_size": 12}),
    "road-two": ("road", {"numbers": 2, "group_size": 6, "targets": ["@k", "@down"]}),
    "c3a": ("c3a", {"block_size": 12}),
    "fourierft": ("fourierft", {"frequencies": 20, "targets": ["@q", "@down"], "places_seed": 5}),
    "miss": ("miss", {"r": 9}),
    "miss-mini": ("miss", {"r": 8, "mini_r": 6, "targets": ["@q", "@down"]}),
    "vblora": ("vblora", {"vector_length": 12, "num_vectors": 5, "targets": ["@q", "@o"]}),
    "randlora": ("randlora", {"r": 5, "alpha": 9.0, "targets": ["@q", "@v", "@down"]}),
}


@pytest.mark.parametrize(("name", "family"), pairs(OURS))
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(name, family, tmp_path):
    method, options = OURS[name]
    if family == "llama" and "bias" in options:
        pytest.skip("this model has no biases")
    ours, theirs = saved_and_loaded_by_peft(method, options, family, tmp_path)
    limit = 1e-6 if name in NETWORKS else LIMIT  # what a network gives is not rounded before
    assert error(ours(IDS).data, peer_logits(theirs).detach().numpy()) < limit


def test_a_text_makes_the_same_first_rows_as_in_peft_and_is_in_the_file(tmp_path):
    folder, text = tiny_files.write_model(tmp_path / "model"), "hello world yes"
    ours = refpeft.load(folder, dtype="float64")
    prompt = sites.attach(ours, "prompt_tuning", {"tokens": 7, "init": "text", "text": text}).params
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(folder)}
    config = peft.PromptTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config)
    rows = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
    assert np.array_equal(prompt["model.embed_tokens.prompt"].data, rows)

    adapters.save(tmp_path / "adapter", ours)
    read = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert {name: getattr(read, name) for name in settings} == settings


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_with_padding_give_the_logits_of_peft(method, family, tmp_path):
    ours, theirs = saved_and_loaded_by_peft(method, {}, family, tmp_path)
    mask = np.ones(IDS.shape, int)
    mask[0, 5:] = 0
    got = ours(IDS, segments=mask.astype("i4") - 1).data[mask > 0]
    assert error(got, peer_logits(theirs, mask=mask).detach().numpy()[mask > 0]) < LIMIT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["full", "bitfit", "ln_tuning"])
def test_training_the_models_own_tensors_gives_the_gradients_of_torch(method, family, tmp_path):
    if (method, family) == ("bitfit", "llama"):
        pytest.skip("this model has no biases")
    ours, theirs = tiny.model(family), peer(family, tmp_path)
    sites.attach(ours, method)
    loss = torch.nn.functional.cross_entropy(
        peer_logits(theirs).flatten(0, 1), torch.from_numpy(TARGETS).long().flatten(), ignore_index=-100
    )
    loss.backward()
    want = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    got = tiny.gradients(ours, tiny.Batch(IDS, TARGETS))
    ends = {"bitfit": ".bias", "ln_tuning": ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"), "full": ""}[
        method
    ]
    assert {name for name in want if name.endswith(ends)} <= got.keys() <= want.keys()
    scale = max(abs(g).max() for g in want.values())
    for name, gradient in got.items():
        gradient = gradient.T if ours.sites[name.rpartition(".")[0]].transposed and gradient.ndim == 2 else gradient
        assert abs(gradient - want[name]).max() < LIMIT * scale, name


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu", "tanh"])
def test_bottlenecks_are_hooks_behind_attention_and_mlp_in_torch(activation, tmp_path):
    ours, theirs = tiny.model("llama"), peer("llama", tmp_path)
    adapter = sites.attach(ours, "houlsby", {"size": 5, "activation": activation, "norms": False})
    tiny.scramble(adapter)
    values = {name: torch.tensor(tensor.data, requires_grad=True) for name, tensor in adapter.params.items()}
    functional = torch.nn.functional
    gelu_tanh = lambda x: functional.gelu(x, approximate="tanh")  # noqa: E731
    f = {
        "gelu_tanh": gelu_tanh,
        "gelu": functional.gelu,
        "relu": torch.relu,
        "silu": functional.silu,
        "tanh": torch.tanh,
    }

    def behind(place):
        def hook(module, given, out):
            h = out[0] if isinstance(out, tuple) else out
            inner = f[activation](h @ values[f"{place}.down"].T + values[f"{place}.down_bias"])
            h = h + inner @ values[f"{place}.up"].T + values[f"{place}.up_bias"]
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook

    for i, layer in enumerate(theirs.model.layers):
        layer.self_attn.register_forward_hook(behind(f"model.layers.{i}.attn_out"))
        layer.mlp.register_forward_hook(behind(f"model.layers.{i}.mlp_out"))
    logits = peer_logits(theirs)
    assert error(ours(IDS).data, logits.detach().numpy()) < LIMIT
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(TARGETS).long().flatten(), ignore_index=-100
    ).backward()
    got = tiny.gradients(ours, tiny.Batch(IDS, TARGETS))
    scale = max(abs(v.grad).max() for v in values.values()).item()
    assert all(abs(got[name] - v.grad.numpy()).max() < LIMIT * scale for name, v in values.items())


@pytest.mark.parametrize(
    ("family", "options"), [("tied", {"targets": ["@embed", "@down"]}), ("gpt2", {"targets": "all-linear"})]
)
def test_a_merged_model_gives_the_same_logits_in_transformers(family, options, tmp_path):
    ours = refpeft.load(tiny_files.write_model(tmp_path / "model", family), dtype="float64")
    tiny.scramble(sites.attach(ours, "lora", options))
    before = ours(IDS).data
    sites.merge(ours)
    saving.save(ours, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert error(before, peer_logits(theirs).detach().numpy()) < 1e-5  # the file is float32
