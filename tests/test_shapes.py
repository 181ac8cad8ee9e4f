"""What fine-tuning a model of some shape takes is known from its config alone, however large it is."""

import json
import math
from unittest.mock import ANY

import pytest
import tiny
import tiny_files
from click.testing import CliRunner

import refpeft
from refpeft import cli, cost, files, memory, shapes
from refpeft.errors import RefpeftError

GIB = 2**30
QLORA = ("--quantizer", "nf4", "--double-quant", "--method", "lora")


def planned(*arguments) -> dict:
    result = CliRunner().invoke(cli.main, ["plan", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("t5-v1.1-xxl", 11_135_332_352),
        ("t5-3b", 2_851_598_336),
        ("roberta-large", 354_310_144),
        ("deberta-v2-xxlarge", 1_564_549_632),
        ("smollm2-135m", 134_515_008),
        ("gpt3-175b", 174_604_259_328),
    ],
)
def test_shapes_have_the_parameters_of_the_published_weights(shape, parameters):
    assert memory.skeleton(shapes.checkpoint_of(shape)).parameters() == parameters


@pytest.mark.parametrize(
    ("shape", "least", "most"),
    [("llama-7b", 5.4, 6.0), ("llama-13b", 9.5, 10.4), ("llama-33b", 21.7, 23.5), ("llama-65b", 41.0, 44.0)],
)
def test_qlora_takes_what_its_paper_says(shape, least, most, monkeypatch):
    """r = 64 on all linear layers, AdamW: with the adapter and its gradients in float32 as here, or in bfloat16."""
    monkeypatch.setattr(cost, "step", lambda *of_what: cost.Step(0.0, None, 1.0, 1.0))
    found = planned("--shape", shape, *QLORA, "--r", 64)
    single = found["before_activations"] / GIB
    half = single - (found["memory"]["adapter"] + found["memory"]["gradients"]) / 2 / GIB
    assert (round(half, 1), round(single, 1)) == (least, most)


def test_65_billion_parameters_fit_into_48_gigabytes():
    found = planned("--shape", "llama-65b", *QLORA, "--r", 64, "--set", "train.checkpoint_activations=true")
    assert found["before_activations"] < sum(found["memory"].values()) < 48 * GIB
    assert found["before_activations"] < 48e9
    assert found["frozen"]["linear layers"]["bits"] == pytest.approx(4.127, abs=5e-4)
    assert found["trained"] == 799_539_200


def test_the_plan_of_a_shape_is_that_of_its_model(tmp_path):
    tiny_files.write_model(tmp_path / "model", "wide")
    found = planned("--shape", tmp_path / "model", *QLORA, "--r", 4, "--batch", 2, "--length", 9)
    model = refpeft.load(tmp_path / "model", quantizer="nf4", double_quant=True, dtype="bfloat16")
    adapter = refpeft.attach(model, "lora", {"r": 4, "targets": "all-linear"})
    assert found["parameters"] == model.parameters()
    assert found["trained"] == adapter.size
    assert found["memory"]["weights"] == pytest.approx(model.nbytes, rel=0.01)
    assert found["memory"]["activations of 2 x 9 tokens"] > 0


OF_ALL_KINDS = ["full", "ia3", "bitfit", "houlsby", "prefix_tuning", "prompt_tuning", "ln_tuning"]


@pytest.mark.parametrize("method", [*OF_ALL_KINDS, "adapterdrop", "compacter", "rows", "shira"])
def test_any_method_is_planned_without_its_weights(method):
    found = planned("--shape", "gpt2-xl", "--method", method)
    assert found["trained"] > 0
    assert found["memory"]["weights"] == pytest.approx(2 * found["parameters"], rel=2e-3)  # norms are in float32


def test_a_config_json_is_a_shape(tmp_path):
    files.write_json(tmp_path / "config.json", tiny.LLAMA)
    found = planned("--shape", tmp_path / "config.json", "--length", 8)
    tensors = math.prod(shapes.checkpoint_of(str(tmp_path)).shape("lm_head.weight"))
    assert found["frozen"]["head"] == {"numbers": tensors, "bytes": 2 * tensors, "bits": 16}


def test_a_shape_of_few_positions_is_planned_with_these(tmp_path):
    files.write_json(tmp_path / "config.json", tiny.LLAMA)
    positions = shapes.checkpoint_of(str(tmp_path)).config.context
    assert planned("--shape", tmp_path) == planned("--shape", tmp_path, "--length", positions) | {"given": ANY}


@pytest.mark.parametrize(
    ("shape", "task", "head"),
    [
        ("minilm-l6", "classify", 384 * 384 + 384 + 2 * 384 + 2),
        ("gpt2", "regress", 768),
        ("roberta-base", "tag", 2 * 769),
    ],
)
def test_the_head_of_a_task_is_trained_beside_the_method(shape, task, head):
    bare = planned("--shape", shape, "--r", 2, "--set", 'lora.targets=["@q"]')
    found = planned("--shape", shape, "--r", 2, "--set", 'lora.targets=["@q"]', "--task", task)
    assert found["trained"] - bare["trained"] == head


@pytest.mark.parametrize("shape", ["t5-small", "t5-v1.1-base", "deberta-v3-base", "bert-base"])
def test_encoders_and_encoder_decoders_are_planned(shape):
    found = planned("--shape", shape, "--length", 64, "--batch", 2)
    assert found["memory"]["activations of 2 x 64 tokens"] == found["activations"]["kept"] > 0
    assert found["activations"]["recomputed"] < found["activations"]["kept"]


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_methods_that_read_weights_are_planned_as_soon_as_others(method):
    """Products of a weight's size are not made: each would take seconds, and there are hundreds."""
    found = planned("--shape", "llama-65b", "--method", method, "--length", 8)
    assert found["step"]["forward"] > 8 * 2 * 65e9


def test_names_of_shapes_are_known_with_and_without_hyphens():
    assert shapes.checkpoint_of("llama3-8b").config == shapes.checkpoint_of("Llama-3-8B").config


def test_its_text_names_parts_and_defaults():
    text = CliRunner().invoke(cli.main, ["plan", "--shape", "gpt2", "--quantizer", "nf4"]).stdout
    for part in (
        "model    gpt2: gpt2, 12 layers of 768",
        "memory   before activations ",
        "weights: linear layers, 4.5 bits a number",
        'lora.targets = "all-linear"  (refpeft plan)',
        'dtype = "bfloat16"  (refpeft plan)',
        'quantizer = "nf4"  (--quantizer)',
    ):
        assert part in text
    assert "data.file" not in text


def test_what_is_no_shape_is_named():
    with pytest.raises(RefpeftError, match=r"'llama-66b' is no config.json and no shape that is known; did you mean"):
        shapes.checkpoint_of("llama-66b")
    result = CliRunner().invoke(cli.main, ["plan", "--shape", "gpt2", "--length", "2000"])
    assert "length is 2,000, but the model was made for 1,024 positions" in result.stderr
