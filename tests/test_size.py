"""The budgets of size. A budget is raised only with a reason, which is then written beside it."""

import ast
import io
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BESIDE_THE_CORE = {"cuda", "conformance", "embedded"}
"""Folders of the package that are not its core: kernels, the conformance kit, and the recipe of the embedded model."""

CORE = 18615
"""Lines of code of the core: lines that hold more than a comment or a docstring. The design said about 6,000. Reading
what others wrote (GGUF, hub, PEFT's adapters, templates in a sandbox, formats of data) took 500 more than was thought;
quantizers and QLoRA 1,900: files of quantized models, block-wise codes plain and fast, bitsandbytes' own rules, five
optimizers with paging, merging with measurement, and the plan of memory; all methods beside LoRA 2,700: how PEFT and
AdapterHub write each down, operations on blocks and Kronecker products, what bottlenecks, rotations and prompts have in
common, methods that ask the data first or take part in a step, comparing and listing sixty of them; and encoders and
encoder-decoders, which the 6,000 should have held, 850; tasks 3,500: heads of all families and how PEFT writes them,
examples of seven tasks, files and formats of labelled rows, 23 metrics, beam search, mixtures of data sets with replay
and forgetting, in-context examples, seeds, and what a run computes and takes, by part; and speed on the CPU 1,500:
shards, an arena, batches without padding, and a second pair, faster, for each operation that models spend time in. What
GPUs ask of the rest, beside the kernels, is 1,120: what works on a machine and what would bring the rest (`refpeft
doctor`), batches of few shapes that are there ahead of their step, steps of models, methods and optimizers that a graph
repeats, bfloat16 and work that is put off, done again or waited for on the tape, and the plan of its memory; and 250
time every method's step on any shape of model, in a process that may end (`refpeft compare --bench`), and 45 lengths of
rows of changed weights (DoRA), which are never there as a whole on a GPU, and AdaLoRA's step on all sites at once."""

TOP = {"LICENSE", "README.md", "golden", "plugins", "pyproject.toml", "refpeft", "tests"}


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def lines_of_code(file: Path) -> int:
    """How many lines of a file hold code."""
    text = file.read_text("utf-8")
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {n for token in tokens if token.type not in ignored for n in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):  # a string that stands alone is a docstring
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_core_is_small():
    core = [file for file in python_files("refpeft") if file.relative_to(ROOT).parts[1] not in BESIDE_THE_CORE]
    assert sum(map(lines_of_code, core)) <= CORE


@pytest.mark.parametrize("folders, most", [(("refpeft", "tests", "golden"), 500), (("plugins",), 80)])
def test_no_file_is_long(folders, most):
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in python_files(*folders)
    }
    assert {name: n for name, n in lengths.items() if n > most} == {}


def test_the_top_level_is_fixed():
    try:
        run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = {name.partition("/")[0] for name in run.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= TOP
