"""SmolLM2-135M from its GGUF and stories260K: what transformers says of the same weights.

Numbers named here as transformers' were computed once by transformers 5.23 in float32, from the weights that the gguf
package dequantizes, with prompt and completion encoded apart and EOS behind the completion.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import refpeft
from refpeft import adapters, cli
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.data import load_data
from refpeft.evaluation import mean_loss
from refpeft.generate import generate
from refpeft.models import saving
from refpeft.templates import Template
from refpeft.tensor import no_grad
from refpeft.trainer import Trainer

pytestmark = pytest.mark.real

LENGTH = 512
CAPITAL = [504, 3575, 282, 4649, 314, 7042, 30]  # "The capital of France is Paris."


def models(pattern: str) -> Path:
    """The first path under REFPEFT_MODELS that fits; the test is skipped where there is none."""
    folder = os.environ.get("REFPEFT_MODELS", "")
    found = sorted(Path(folder).rglob(pattern)) if folder else []
    if not found:
        pytest.skip(f"REFPEFT_MODELS is not set or has no {pattern}")
    return found[0]


def data(name: str) -> Path:
    """A file under REFPEFT_DATA; the test is skipped where there is none."""
    path = Path(os.environ.get("REFPEFT_DATA", "nowhere"), name)
    if not path.is_file():
        pytest.skip(f"REFPEFT_DATA is not set or has no {name}")
    return path


@pytest.fixture(scope="module")
def gguf():
    pytest.importorskip("gguf")
    return models("SmolLM2-135M-Instruct*.gguf")


@pytest.fixture(scope="module")
def smollm2(gguf):
    return refpeft.load(gguf)


@pytest.fixture
def sample(tmp_path):
    """Writes rows as a file."""

    def write(rows: list[dict[str, str]]) -> Path:
        path = tmp_path / "sample.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def wikisql(name: str, step: int) -> list[dict[str, str]]:
    """Every `step`-th row of a file of WikiSQL."""
    lines = data(f"wikisql/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[::step]]


def batches(model, path: Path, batch: int = 8, shuffle: bool = False) -> Batches:
    return Batches(load_data(path, model.tokenizer, length=LENGTH).examples, batch, LENGTH, shuffle=shuffle)


def test_smollm2_knows_the_capital_of_france(smollm2):
    prompt = smollm2.tokenizer.encode("The capital of France is")
    assert prompt + generate(smollm2, [prompt], 2)[0] == CAPITAL
    assert smollm2.tokenizer.decode(CAPITAL[-2:]) == " Paris."


def test_smollm2_answers_in_its_chat_template(smollm2, gguf):
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    template = Template(smollm2.tokenizer.chat_template, smollm2.tokenizer.special_tokens)
    prompt = smollm2.tokenizer.encode(template.render(asked, add_generation_prompt=True))
    assert generate(smollm2, [prompt], 12, stop=smollm2.tokenizer.eos_ids)[0] == CAPITAL  # then transformers has EOS
    command = ["generate", "--model", str(gguf), "--chat", "--max-tokens", "12"]
    assert CliRunner().invoke(cli.main, command, input=asked[0]["content"] + "\n\n").stdout == (
        "The capital of France is Paris.\n"
    )


def test_smollm2_has_its_known_loss_on_wikisql(smollm2):
    """1.8770 over 3,209 learned tokens, as transformers; without the 100 EOS among them it would be 1.6637."""
    rows = batches(smollm2, data("wikisql/valid.jsonl"))
    assert sum(batch.supervised for batch in rows) == 3209
    assert mean_loss(smollm2, rows) == pytest.approx(1.8769945, rel=2e-5)


def test_smollm2_has_its_known_loss_on_e2e(smollm2, sample):
    """3.0287 on every 160th row, as transformers (2.9847 without EOS)."""
    lines = data("e2e/valid.txt").read_text(encoding="utf-8").splitlines()[::160]
    rows = [dict(zip(("prompt", "completion"), line.split("||"), strict=True)) for line in lines]
    rows = [{"prompt": row["prompt"] + "||", "completion": row["completion"].strip()} for row in rows]
    assert mean_loss(smollm2, batches(smollm2, sample(rows))) == pytest.approx(3.0286522, rel=2e-5)


@pytest.mark.parametrize(
    ("storage", "expected", "rel"),
    [
        ({"dtype": "bfloat16"}, 2.0115748, 2e-5),
        # bitsandbytes rounds the 8-bit absmax values on the CPU by a coarser table
        ({"quantizer": "nf4", "double_quant": True}, 2.4654656, 5e-3),
    ],
    ids=["bfloat16", "nf4"],
)
def test_weights_kept_in_fewer_bits_have_the_loss_of_the_peers(gguf, sample, storage, expected, rel):
    """On every tenth row, where it is 2.0136 in float32. The peers' are transformers' with all matrices rounded to
    bfloat16, and with the layers' linear weights quantized and dequantized by bitsandbytes."""
    path = sample(wikisql("valid", 10))
    model = refpeft.load(gguf, **storage)
    assert mean_loss(model, batches(model, path)) == pytest.approx(expected, rel=rel)


@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_training_lowers_the_loss_and_the_adapter_is_the_same_function_in_peft(smollm2, sample, tmp_path):
    """Three steps of LoRA on the same four rows of WikiSQL."""
    rows = batches(smollm2, sample(wikisql("train", 100)[:4]), batch=4)
    folder = tmp_path / "model"
    saving.save(smollm2, folder)
    adapter = refpeft.attach(smollm2, "lora", {"r": 8, "alpha": 16.0})
    try:
        settings = Train(lr=1e-3, batch=4, steps=3, schedule="constant", warmup=0)
        losses = Trainer(smollm2, rows, settings=settings).run().train_losses
        assert mean_loss(smollm2, rows) < losses[0] - 0.3
        adapters.save(tmp_path / "adapter", smollm2)
        ids = rows.at(0).ids[:1, :40]
        with no_grad():
            ours = smollm2(ids).data
    finally:
        refpeft.detach(smollm2, adapter)

    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids.astype("i8"))).logits.numpy()
    limit = 64 * np.finfo("f4").eps * np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= limit


def test_stories260k_tells_its_story():
    """60 greedy tokens from BOS, as transformers."""
    model = refpeft.load(models("stories260K"))
    expected = [
        403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337, 410, 408,
        419, 292, 411, 322, 265, 282, 295, 433, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352, 266, 268, 388, 426,
        338, 391, 266, 267, 337, 335, 312, 432, 398, 312, 286, 267, 414, 270, 333, 415,
    ]  # fmt: skip
    said = generate(model, [[model.tokenizer.bos_id]], 60)[0]
    assert said == expected
    assert model.tokenizer.decode(said).strip() == (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high"
    )
