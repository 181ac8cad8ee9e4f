"""How many numbers each method trains, on tiny models: the formulas of the docstrings."""

import pytest
import tiny
from variants import FAMILIES, TO_FIT, needed_quantizer

from refpeft import manager, sites

DIM, FF, KV, VOCAB, LAYERS = 24, 32, 12, 40, 2

COUNTS = [
    ("llama", "lora", {"r": 3}, LAYERS * 3 * ((DIM + DIM) + (DIM + KV))),
    ("gpt2", "lora", {"r": 3}, LAYERS * 3 * (DIM + 3 * DIM)),
    ("llama", "lora", {"r": 3, "targets": ["@embed"]}, 3 * (VOCAB + DIM)),
    ("llama", "lora", {"r": 3, "freeze_A": True}, LAYERS * 3 * (DIM + KV)),
    ("llama", "ia3", {}, LAYERS * (2 * KV + FF)),
    ("gpt2", "ia3", {}, LAYERS * (3 * DIM + 4 * DIM)),
    ("qwen2", "bitfit", {}, LAYERS * (DIM + 2 * KV)),
    ("llama", "ln_tuning", {}, (2 * LAYERS + 1) * DIM),
    ("gpt2", "ln_tuning", {}, (2 * LAYERS + 1) * 2 * DIM),
    ("llama", "houlsby", {"size": 5, "norms": False}, LAYERS * 2 * (2 * 5 * DIM + 5 + DIM)),
    ("llama", "adalora", {"init_r": 3, "target_r": 1}, LAYERS * 3 * ((DIM + DIM + 1) + (DIM + KV + 1))),
    ("llama", "eva", {"r": 3}, LAYERS * 3 * ((DIM + DIM) + (DIM + KV))),
    ("llama", "pissa", {"r": 3}, LAYERS * 3 * ((DIM + DIM) + (DIM + KV))),
    ("llama", "olora", {"r": 3}, LAYERS * 3 * ((DIM + DIM) + (DIM + KV))),
    ("llama", "vera", {"r": 5}, LAYERS * (2 * 5 + DIM + KV)),
    ("llama", "krona", {"targets": ["@v"]}, LAYERS * (3 * 4 + 4 * 6)),
    ("llama", "krona", {"a_out": 2, "residual": True, "targets": ["@mlp_out"]}, LAYERS * (2 * 4 + 12 * 6 + 1)),
    ("llama", "hira", {"r": 3}, LAYERS * 3 * ((DIM + DIM) + (DIM + KV))),
    ("llama", "delora", {"r": 3}, LAYERS * (3 * ((DIM + DIM) + (DIM + KV)) + 2)),
    ("llama", "loha", {"r": 3}, LAYERS * 2 * 3 * ((DIM + DIM) + (DIM + KV))),
    ("llama", "lokr", {"r": 2, "targets": ["@q"]}, LAYERS * (4 * 4 + 2 * (6 + 6))),
    ("llama", "lokr", {"r": 8, "targets": ["@v"]}, LAYERS * (3 * 4 + 4 * 6)),
    ("llama", "pfeiffer", {"size": 5}, LAYERS * (2 * 5 * DIM + 5 + DIM)),
    ("llama", "parallel", {"size": 5, "learn_scale": True}, LAYERS * (5 * (DIM + DIM) + 5 + DIM + 1)),
    ("llama", "parallel", {"size": 5, "targets": ["@up"]}, LAYERS * (5 * (DIM + FF) + 5 + FF)),
    ("llama", "lin", {"size": 5}, LAYERS * (2 * 5 * DIM + 5 + 3 * DIM)),
    ("llama", "adapterdrop", {"size": 5}, LAYERS * (2 * 5 * DIM + 5 + DIM)),
    ("llama", "adapterdrop", {"size": 5, "drop": 1, "robust": False}, (LAYERS - 1) * (2 * 5 * DIM + 5 + DIM)),
    ("llama", "sparse_adapter", {"size": 5}, LAYERS * 2 * (2 * 5 * DIM + 5 + DIM)),
    ("llama", "adamix", {"size": 5, "modules": 3}, LAYERS * (3 * (5 * DIM + 5) + DIM * 5 + DIM)),
    ("llama", "adamix", {"size": 5, "share": "down"}, LAYERS * (5 * DIM + 5 + 4 * (DIM * 5 + DIM))),
    ("llama", "adapterfusion", TO_FIT["adapterfusion"], LAYERS * (3 * DIM**2 + DIM)),
    ("llama", "compacter", {"size": 8, "norms": False}, 4**3 + LAYERS * 2 * (2 * (8 + DIM) + 8 + DIM)),
    ("llama", "compacter_pp", {"size": 8, "rank": 2, "norms": False}, 64 + LAYERS * (4 * (8 + DIM) + 8 + DIM)),
    ("llama", "phm_adapter", {"size": 8, "norms": False}, LAYERS * 2 * (2 * 8 * DIM // 4 + 128 + 8 + DIM)),
    ("llama", "rows", {"rows": [1, 2]}, LAYERS * 2 * 2 * DIM),
    ("llama", "shira", {"r": 3}, LAYERS * 3 * ((DIM + DIM) + (DIM + KV))),
    ("llama", "fish_mask", {"share": 0.05}, round(0.05 * LAYERS * DIM * (2 * DIM + 2 * KV + 3 * FF))),
    ("llama", "far", {"share": 0.25}, LAYERS * (2 * 8 * DIM + 6 * FF)),
    ("gpt2", "far", {"share": 0.25}, LAYERS * (DIM * (DIM + 1) + 6 * (4 * DIM + 1))),
    ("llama", "diff_pruning", {"share": 0.05}, round(0.05 * LAYERS * DIM * (2 * DIM + 2 * KV + 3 * FF))),
    ("llama", "diff_pruning", {"prune": False, "targets": ["@q"]}, LAYERS * (2 * DIM * DIM + 1)),
    ("llama", "lt_sft", {"share": 0.1}, round(0.1 * LAYERS * DIM * (2 * DIM + 2 * KV + 3 * FF))),
    ("llama", "trainable_tokens", {"token_indices": [1, 2]}, 2 * 2 * DIM),
    ("tied", "trainable_tokens", {"token_indices": [1, 2]}, 2 * DIM),
    ("llama", "top_layers", {"count": 1}, 2 * DIM + DIM * (2 * DIM + 2 * KV + 3 * FF)),
    ("llama", "top_layers", {"count": 1, "head": True}, (3 + VOCAB) * DIM + DIM * (2 * DIM + 2 * KV + 3 * FF)),
    ("llama", "by_type", {}, LAYERS * DIM * (2 * DIM + 2 * KV)),
    ("tied", "by_type", {"types": ["embedding", "head"]}, VOCAB * DIM),
    ("llama", "prompt_tuning", {"tokens": 3}, 3 * DIM),
    ("llama", "spot", TO_FIT["spot"], 3 * DIM),
    ("llama", "ipt", {"d": 12}, 12),
    (
        "llama",
        "mam",
        {"tokens": 3, "hidden": 5, "size": 4},
        3 * KV + 5 * (KV + 1) + LAYERS * (2 * KV * (5 + 1) + 2 * 4 * DIM + 4 + DIM),
    ),
    ("llama", "mam", {"tokens": 3, "hidden": 0, "size": 4}, LAYERS * (2 * 3 * KV + 2 * 4 * DIM + 4 + DIM)),
    ("qwen2", "lora_bitfit", {"r": 3}, LAYERS * (3 * (DIM + DIM + DIM + KV) + DIM + 2 * KV)),
    (
        "qwen2",
        "s4",
        {"strategies": ["AL", "PB"], "groups": [1, 1], "size": 4, "r": 3, "tokens": 5},
        2 * (2 * 4 * DIM + 4 + DIM) + 3 * (DIM + DIM + DIM + KV) + 2 * 5 * KV + DIM + 2 * KV,
    ),
    (
        "llama",
        "unipelt",
        {"r": 3, "size": 4, "tokens": 2, "hidden": 0},
        LAYERS * (3 * (3 * DIM + KV) + 2 * (DIM + 1) + 2 * 4 * DIM + 4 + 2 * DIM + 1 + 2 * 2 * KV + DIM + 1),
    ),
    ("llama", "multitask_prompt", {"tokens": 3, "tasks": 4, "ranks": 2}, 3 * DIM + 2 * (3 + DIM)),
    ("llama", "p_tuning", {"tokens": 3, "encoder": "none"}, 3 * DIM),
    ("llama", "p_tuning", {"tokens": 3, "encoder": "mlp", "hidden": 5}, 3 * DIM + 5 * 25 + 5 * 6 + DIM * 6),
    (
        "llama",
        "p_tuning",
        {"tokens": 3, "hidden": 5},
        3 * DIM + 8 * 5 * (DIM + 5 + 2) + 8 * 5 * (3 * 5 + 2) + 2 * 5 * 11 + DIM * 11,
    ),
    ("llama", "p_tuning_v2", {"tokens": 3}, LAYERS * 2 * 3 * KV),
    ("llama", "p_tuning_v2", {"tokens": 3, "hidden": 5}, 3 * KV + 5 * (KV + 1) + LAYERS * 2 * KV * (5 + 1)),
    ("llama", "prefix_tuning", {"tokens": 3}, LAYERS * 2 * 3 * KV),
    ("llama", "prefix_tuning", {"tokens": 3, "hidden": 5}, 3 * KV + 5 * (KV + 1) + LAYERS * 2 * KV * (5 + 1)),
    ("llama", "pre_embed", {"tokens": 3}, 3 * DIM),
    ("gpt2", "pre_layer", {"tokens": 3}, LAYERS * 3 * DIM),
    ("llama", "llama_adapter", {"tokens": 3}, LAYERS * (3 * DIM + 4)),
    ("gpt2", "llama_adapter", {"tokens": 3, "count": 1, "compat": "peft"}, 3 * DIM + 1),
    ("gpt2", "intrinsic_said", {"d": 60}, 60),
    ("tied", "intrinsic_said", {"d": 60, "said": False}, 60),
    ("llama", "randlora", {"r": 5}, LAYERS * (5 * (5 + DIM) + 3 * (5 + KV))),
    ("llama", "miss", {"r": 7}, LAYERS * 7 * (DIM + KV)),
    ("llama", "miss", {"r": 7, "mini_r": 6}, LAYERS * 2 * 7 * 6),
    (
        "llama",
        "vblora",
        {"r": 2, "num_vectors": 5, "vector_length": 6},
        5 * 6 + LAYERS * 2 * 5 * (DIM + DIM + DIM + KV) // 6,
    ),
    ("gpt2", "road", {"group_size": 12, "numbers": 4}, LAYERS * 4 * 3 * DIM),
    ("llama", "c3a", {"block_size": 6}, LAYERS * (DIM + KV) * DIM // 6),
    ("llama", "fourierft", {"frequencies": 50}, LAYERS * 2 * 50),
    ("llama", "hra", {"r": 4}, LAYERS * 2 * 4 * DIM),
    ("llama", "boft", {}, LAYERS * (2 * (2 * DIM * 4) + DIM + KV)),
    ("llama", "dora", {"r": 3}, LAYERS * (3 * ((DIM + DIM) + (DIM + KV)) + DIM + KV)),
    ("llama", "loftq", {"r": 3, "iterations": 1}, LAYERS * 3 * ((DIM + DIM) + (DIM + KV))),
    ("llama", "qdora", {"r": 3}, LAYERS * (3 * ((DIM + DIM) + (DIM + KV)) + DIM + KV)),
    ("llama", "attention_fusion", {}, DIM),
    (
        "llama",
        "ladder_side",
        {"r": 3},
        2 * DIM * DIM // 3
        + DIM // 3
        + LAYERS * (DIM * DIM // 3 + 1 + 2 * DIM // 3 + 8 * (2 * 8 + 2 * 4 + 3 * (FF // 3))),
    ),
    ("llama", "oft", {"block_size": 6}, LAYERS * 2 * DIM * 5 // 2),
]
ELSEWHERE = {"full"}
"""Methods with a test of their own."""


@pytest.mark.filterwarnings("ignore::refpeft.errors.RefpeftWarning")  # of the rank at which LoKr's factors stay whole
@pytest.mark.parametrize(("family", "method", "options", "count"), COUNTS)
def test_the_number_of_parameters_is_the_formula(family, method, options, count):
    model = tiny.model(family, quantizer=needed_quantizer(method))
    assert sites.attach(model, method, options).size == count


@pytest.mark.parametrize("family", FAMILIES)
def test_full_trains_as_many_numbers_as_the_model_has(family):
    model = tiny.model(family)
    assert sites.attach(model, "full").size == model.parameters()


def test_every_method_is_counted():
    shipped = map(manager.read, manager.shipped().glob("*.py"))
    methods = {listing.name for listing in shipped if listing.kind == "method"}
    assert methods == {method for _, method, _, _ in COUNTS} | ELSEWHERE
