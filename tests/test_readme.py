"""The README stays true: its file tree, its table of methods and its Python."""

import re
from pathlib import Path

import numpy as np
import pytest
from variants import has_constants

from refpeft import manager, overview
from refpeft.quant import make_quantizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TABLE = r"<!-- refpeft methods --markdown -->\n((?s:.*?))<!-- end -->\n"
STALE = "README.md's table of methods is stale; `PYTHONPATH=. python tests/test_readme.py` makes it anew"


def code(language: str) -> list[str]:
    """The fenced blocks of a language, "" for those without one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for name, text in blocks if name == language]


def python_with(text: str) -> str:
    """The first block of Python that has this text."""
    return next(block for block in code("python") if text in block)


def tree() -> set[str]:
    """The files that the README's tree names, as paths."""
    text = next(block for block in code("") if block.startswith("refpeft/\n"))
    folders, found = [], set()
    for line in text.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name] if name.endswith("/") else []
        if not name.endswith("/") and name != "...":
            found.add("".join(folders[:depth]) + name)
    return found


def test_the_tree_names_every_module_and_nothing_else():
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "refpeft").rglob("*.py") if p.name != "__init__.py"}
    named = tree()
    assert modules - named == set()
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def methods() -> list[manager.Listing]:
    listings = map(manager.read, sorted(manager.shipped().glob("*.py")))
    return [listing for listing in listings if listing.kind == "method"]


def test_every_method_is_of_a_family_and_has_a_source():
    for listing in methods():
        assert listing.family in manager.FAMILIES, listing.name
        assert listing.source, listing.name


def test_the_table_of_methods_is_that_of_the_plugins():
    table = [row.strip("| ").split(" | ") for row in re.search(TABLE, README)[1].splitlines()[2:]]
    expected = [overview.cells(listing, counted=False) for listing in overview.ordered(methods())]
    for row in table:
        row[overview.COUNT] = ""
    assert table == expected, STALE


@pytest.mark.slow
def test_the_table_of_methods_counts_what_they_train():
    assert re.search(TABLE, README)[1] == overview.markdown(methods()), STALE


def test_the_table_of_quantizers_is_that_of_the_plugins_and_its_numbers_are_theirs():
    rows = re.findall(r"^\| `(\w+)`(?: `(\w+)=(\w+)`)? \| .+? \| (\d[\d.]*) \| ([\d.-]+) \| (\.\d+) \|", README, re.M)
    listings = map(manager.read, manager.shipped().glob("*.py"))
    assert {row[0] for row in rows} == {listing.name for listing in listings if listing.kind == "quantizer"}
    weight = np.random.default_rng(0).normal(size=(128, 1024)).astype("f4")
    for name, option, value, *numbers in rows:
        options = {option: int(value) if value.isdigit() else value} if option else {}
        twice = (False, True)[: 1 + has_constants(name, options)]
        kept = [make_quantizer(name, options, double)(weight, weight.dtype) for double in twice]
        bits, doubly = ([one.nbytes * 8 / weight.size for one in kept] + [np.nan])[:2]
        error = np.linalg.norm(kept[0]() - weight) / np.linalg.norm(weight)
        measured = [bits, doubly, error]
        written = [float("nan" if number == "-" else number) for number in numbers]
        assert measured == pytest.approx(written, rel=0.01, nan_ok=True), name


def test_the_python_of_the_readme_runs():
    exec(python_with("import refpeft\n"), {})


if __name__ == "__main__":
    start, end = re.search(TABLE, README).span(1)
    (ROOT / "README.md").write_text(README[:start] + overview.markdown(methods()) + README[end:], "utf-8")
