"""What `refpeft plan` counts is what papers print; where it is not, it is known why. The README has all of it."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from refpeft import cli, cost, memory

README = Path(__file__).parents[1] / "README.md"
TABLE = r"<!-- python tests/test_published.py -->\n((?s:.*?))<!-- end -->\n"
UNITS = {"M": 1e6, "K": 1e3, "": 1}


def planned(shape: str, options: str) -> dict:
    """The plan; what a step takes is left out, which is faster."""
    with mock.patch.object(cost, "step", return_value=cost.Step(0.0, None, 1.0, 1.0)):
        result = CliRunner().invoke(cli.main, ["plan", "--shape", shape, *shlex.split(options), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@dataclass(frozen=True)
class Row:
    """A figure of a paper, and the options of `refpeft plan` for it; `why` it differs, where it does."""

    model: str
    method: str
    published: str
    shape: str
    options: str
    source: str  # arXiv
    place: str  # a table, or a figure
    why: str = ""

    def counted(self) -> tuple[str, int]:
        """(what is trained, as the paper writes it: rounded, or as a share; bytes of the adapter's file)."""
        found = planned(self.shape, self.options)
        number, unit = re.fullmatch(r"([\d.,]+) ?([MK%]?)", self.published).groups()
        digits = len(number.partition(".")[2])
        if unit == "%":
            value = 100 * found["trained"] / (found["parameters"] + found["trained"] * (self.source == DORA))
        else:
            value = found["trained"] / UNITS[unit]
        return f"{value:,.{digits}f} {unit}".strip(), found["adapter_bytes"]


def norms(size: int) -> str:
    """An adapter behind the MLP, and the norm before it (Lin et al., 2020)."""
    return f"--method pfeiffer --set pfeiffer.size={size} --method ln_tuning --set 'ln_tuning.targets=[\"ln_2\"]'"


def one(size: int) -> str:
    """An adapter behind the MLP."""
    return f"--method pfeiffer --set pfeiffer.size={size}"


def two(size: int) -> str:
    """Adapters behind attention and MLP, with the norms left frozen."""
    return f"--method houlsby --set houlsby.size={size} --set houlsby.norms=false"


def lora(r: int, targets: str = '"@q","@v"') -> str:
    return f"--r {r} --set 'lora.targets=[{targets}]'"


FIVE = '"@q","@k","@v","@up","@down"'
LORA, BITFIT, VERA, FOURIER, DORA = "2106.09685", "2106.10199", "2310.11454", "2405.03003", "2402.09353"
IA3, PROMPT, LLAMA_ADAPTER = "2205.05638", "2104.08691", "2303.16199"
MIB = "the paper's is of weights alone, over 2^20"
TENTH = "the paper's is 0.1 % of the model; its formula gives ours"
ROWS = [
    Row("RoBERTa base", "BitFit", "0.1 M", "roberta-base", "--method bitfit", LORA, "2"),
    Row("RoBERTa base", "Adapter^D", "0.3 M", "roberta-base", one(16), LORA, "2"),
    Row("RoBERTa base", "Adapter^D", "0.9 M", "roberta-base", one(48), LORA, "2"),
    Row("RoBERTa base", "LoRA", "0.3 M", "roberta-base", lora(8), LORA, "2"),
    Row("RoBERTa large", "LoRA", "0.8 M", "roberta-large", lora(8), LORA, "2"),
    Row("RoBERTa large", "Adapter^P", "0.8 M", "roberta-large", one(16), LORA, "2"),
    Row("RoBERTa large", "Adapter^P", "3.0 M", "roberta-large", one(64), LORA, "2", MIB),
    Row("RoBERTa large", "Adapter^H", "0.8 M", "roberta-large", two(8), LORA, "2"),
    Row("RoBERTa large", "Adapter^H", "6.0 M", "roberta-large", two(64), LORA, "2", MIB),
    Row("DeBERTa XXL", "LoRA", "4.7 M", "deberta-v2-xxlarge", lora(16), LORA, "2"),
    Row("GPT-2 medium", "LoRA", "0.35 M", "gpt2-medium", lora(4), LORA, "3", TENTH),
    Row("GPT-2 medium", "two top layers", "25.19 M", "gpt2-medium", "--method top_layers", LORA, "3"),
    Row("GPT-2 medium", "Adapter^L", "0.37 M", "gpt2-medium", norms(6), LORA, "3"),
    Row("GPT-2 medium", "Adapter^L", "11.09 M", "gpt2-medium", norms(224), LORA, "3"),
    Row("GPT-2 medium", "Adapter^H", "11.09 M", "gpt2-medium", two(112), LORA, "3", "no size gives the paper's"),
    Row("GPT-2 large", "full", "774.03 M", "gpt2-large", "--method full", LORA, "3"),
    Row("GPT-2 large", "LoRA", "0.77 M", "gpt2-large", lora(4), LORA, "3", TENTH),
    Row("GPT-2 large", "Adapter^L", "0.88 M", "gpt2-large", norms(8), LORA, "3"),
    Row("GPT-2 large", "Adapter^L", "23.00 M", "gpt2-large", norms(248), LORA, "3"),
    Row("GPT-3", "BitFit", "14.2 M", "gpt3-175b", "--method bitfit", LORA, "4", "12 d a layer; biases are 11 d"),
    Row("GPT-3", "PreEmbed", "3.2 M", "gpt3-175b", "--method pre_embed --set pre_embed.tokens=264", LORA, "4"),
    Row(
        "GPT-3", "PreLayer", "20.2 M", "gpt3-175b", "--method pre_layer --set pre_layer.tokens=16", LORA, "4",
        "the paper's formula gives ours",
    ),
    Row("GPT-3", "Adapter^H", "7.1 M", "gpt3-175b", two(1), LORA, "4"),
    Row("GPT-3", "Adapter^H", "40.1 M", "gpt3-175b", two(8), LORA, "4"),
    Row("GPT-3", "LoRA", "4.7 M", "gpt3-175b", lora(1), LORA, "4"),
    Row("GPT-3", "LoRA", "37.7 M", "gpt3-175b", lora(8), LORA, "4"),
    Row("BERT base", "BitFit", "0.09 %", "bert-base", "--method bitfit", BITFIT, "1"),
    Row("BERT large", "BitFit", "0.08 %", "bert-large", "--method bitfit", BITFIT, "1"),
    Row(
        "T5 1.1 XXL", "prompt tuning", "20,480", "t5-v1.1-xxl", "--method prompt_tuning --set prompt_tuning.tokens=5",
        PROMPT, "figure 2",
    ),
    Row("T0 3B", "(IA)^3", "540 K", "t5-v1.1-xl", "--method ia3", IA3, "appendix", "cut, not rounded"),
    Row("T0 3B", "norms", "250 K", "t5-v1.1-xl", "--method ln_tuning", IA3, "appendix"),
    Row("LLaMA 7B", "LoRA, all linear", "159.9 M", "llama-7b", "--r 64", VERA, "4"),
    Row("LLaMA 13B", "LoRA, all linear", "250.3 M", "llama-13b", "--r 64", VERA, "4"),
    Row("RoBERTa base", "VeRA", "0.043 M", "roberta-base", "--method vera --r 1024", VERA, "2"),
    Row("RoBERTa large", "VeRA", "0.061 M", "roberta-large", "--method vera --r 256", VERA, "2"),
    Row("GPT-2 medium", "VeRA", "0.098 M", "gpt2-medium", "--method vera --r 1024", VERA, "3"),
    Row("RoBERTa base", "FourierFT", "0.024 M", "roberta-base", "--method fourierft", FOURIER, "2"),
    Row("LLaMA-2 7B", "FourierFT", "0.064 M", "llama-2-7b", "--method fourierft", FOURIER, "4"),
    Row("LLaMA-2 7B", "LoRA", "33.5 M", "llama-2-7b", lora(64), FOURIER, "4", "cut, not rounded"),
    Row("LLaMA 7B", "LoRA", "0.83 %", "llama-7b", lora(32, FIVE), DORA, "1"),
    Row("LLaMA 7B", "DoRA", "0.84 %", "llama-7b", f"--method dora --r 32 --set 'dora.targets=[{FIVE}]'", DORA, "1"),
    Row("Llama-3 8B", "DoRA", "0.71 %", "llama3-8b", f"--method dora --r 32 --set 'dora.targets=[{FIVE}]'", DORA, "1"),
    Row(
        "LLaMA 7B", "LLaMA-Adapter", "1.2 M", "llama-7b", "--method llama_adapter --set llama_adapter.count=30",
        LLAMA_ADAPTER, "1",
    ),
]  # fmt: skip
"""Heads of tasks are left out, as the papers do. Sizes of GPT-2's adapters are those that give the papers' figures."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.method}-{row.published}")
def test_what_is_trained_is_as_many_numbers_as_the_paper_says(row):
    counted, _ = row.counted()
    if not row.why:
        assert counted == row.published
        return
    ours, theirs = (float(text.split()[0].replace(",", "")) for text in (counted, row.published))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.13)


def test_the_readme_has_these_figures():
    table = re.search(TABLE, README.read_text("utf-8"))[1].splitlines()[2:]
    assert len(table) == len(ROWS)
    for line, row in zip(table, ROWS, strict=True):
        assert line.startswith(f"| {row.model} | {row.method} | {row.published} | "), line


@pytest.mark.slow
def test_the_readme_s_table_of_published_sizes_is_what_is_counted():
    assert re.search(TABLE, README.read_text("utf-8"))[1] == markdown(), (
        "`python tests/test_published.py` makes it anew"
    )


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_ten_billion_parameters_with_adam_take_160_gigabytes():
    found = memory.mixed_precision(10_000_000_000)
    assert found == {"weights": 20e9, "gradients": 20e9, "optimizer": 120e9}


def test_a_matrix_of_20_billion_numbers_is_adapted_by_4_8_million(tmp_path):
    """d = 100k, k = 200k, r = 16: 4,167 times fewer."""
    shape = {"model_type": "llama", "vocab_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    shape |= {"hidden_size": 100_000, "num_attention_heads": 1000, "head_dim": 200, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    trained = planned(str(tmp_path), lora(16, '"@q"'))["trained"]
    assert trained == 4_800_000
    assert round(100_000 * 200_000 / trained) == 4167


def test_gpt3_with_rank_4_on_queries_and_values():
    """Checkpoints of 350 GB and 35 MB, 10,000 times fewer; training in 1.2 TB and 350 GB (arXiv:2106.09685, 4.2).

    The paper does not say what is in the 1.2 TB: weights and two moments in 16 bits are 1.05, gradients with them 1.40.
    """
    found = planned("gpt3-175b", lora(4))
    weights, adapter = 2 * found["parameters"], 2 * found["trained"]  # in 16 bits
    assert weights == pytest.approx(350e9, rel=0.01)
    assert adapter / 2**20 == pytest.approx(35, rel=0.03)
    assert weights / adapter == pytest.approx(10_000, rel=0.1)
    assert 3 * weights < 1.2e12 < 4 * weights
    assert sum(found["mixed_precision"].values()) == pytest.approx(350e9, rel=0.01)


def test_double_quantization_saves_0_373_bits_which_is_3_gigabytes_of_65_billion():
    options = "--r 64 --quantizer nf4"
    once, twice = (planned("llama-65b", options + more) for more in ("", " --double-quant"))
    bits = [found["frozen"]["linear layers"]["bits"] for found in (once, twice)]
    assert bits[0] - bits[1] == pytest.approx(0.373, abs=5e-4)
    assert (once["memory"]["weights"] - twice["memory"]["weights"]) / 1e9 == pytest.approx(3, rel=0.02)
    assert twice["before_activations"] < 48e9


def markdown() -> str:
    """The table of the README."""
    head = ("model", "method", "published", "`refpeft plan`", "file", "source, table", "options; why it differs")
    lines = [head, ["---"] * len(head)]
    for row in ROWS:
        counted, nbytes = row.counted()
        link = f"[{row.source}](https://arxiv.org/abs/{row.source}), {row.place}"
        said = f"`--shape {row.shape} {row.options}`" + (f"; {row.why}" if row.why else "")
        size = f"{nbytes / 1e6:,.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.3g} GB"
        lines.append((row.model, row.method, row.published, counted, size, link, said.replace("|", "\\|")))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    text = README.read_text("utf-8")
    start, end = re.search(TABLE, text).span(1)
    README.write_text(text[:start] + markdown() + text[end:], "utf-8")
