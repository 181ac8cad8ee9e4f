"""Plugins are found by path, listed without being run, and every mistake in one is a line that names the place."""

import sys

import pytest

from refpeft import manager
from refpeft.errors import RefpeftError

GOOD = '''"""Scales the output (nobody, 1999).

More words."""

from dataclasses import dataclass

from refpeft import hookimpl


@dataclass(frozen=True)
class Config:
    r: int = 8  # rank
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@hookimpl
def peft_params(site, cfg):
    return {"gain": [1.0]}


@hookimpl(trylast=True)
def peft_linear(x, base, p):
    return base(x)


def helper():
    raise AssertionError("never run")
'''


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("REFPEFT_PLUGINS", raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("refpeft_plugins."):
            manager._forget(name)


def write(folder, text, name="scaled.py"):
    path = folder / name
    path.write_text(text)
    return path


def refusal(action, *arguments) -> str:
    with pytest.raises(RefpeftError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_listing_reads_the_source_without_running_it(tmp_path):
    manager.add(write(tmp_path, GOOD + '\nraise RuntimeError("run")\n'))
    listing = manager.catalogue()["scaled"]
    assert listing.kind == "method"
    assert listing.summary == "Scales the output (nobody, 1999)."
    assert listing.hooks == ("peft_params", "peft_linear")
    assert listing.options[0] == manager.Option("r", "int", "8", "rank")
    assert listing.options[1].default == "('q_proj', 'v_proj')"
    assert "refpeft_plugins.scaled" not in sys.modules


def test_hooks_decide_the_kind(tmp_path):
    source = "from refpeft import hookimpl\n@hookimpl\ndef quant_pack(weight):\n    return {}\n"
    manager.add(write(tmp_path, source, "halves.py"))
    assert manager.catalogue()["halves"].kind == "quantizer"
    assert refusal(manager.path_of, "halves", "method").startswith("'halves' is not a method")


def test_loaded_once_under_its_own_name(tmp_path):
    module = manager.load(write(tmp_path, GOOD))
    assert module is manager.load("scaled") is sys.modules["refpeft_plugins.scaled"]
    assert module.Config().r == 8


def test_hook_gives_the_function_and_the_arguments_it_takes(tmp_path):
    module = manager.load(write(tmp_path, GOOD))
    assert manager.hook(module, "peft_linear") == (module.peft_linear, ("x", "base", "p"))
    assert manager.hook(module, "peft_merge") is None


def test_sources_are_files_folders_modules_and_the_environment(tmp_path, monkeypatch):
    folder = tmp_path / "more"
    folder.mkdir()
    write(folder, GOOD, "one.py")
    write(folder, GOOD, "_private.py")
    write(tmp_path, GOOD, "two.py")
    write(tmp_path, GOOD, "three_of_a_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("REFPEFT_PLUGINS", f"{tmp_path / 'two.py'}:")
    manager.add(folder, "three_of_a_module")
    assert {"one", "two", "three_of_a_module"} <= set(manager.find())
    assert "_private" not in manager.find()
    assert manager.load("three_of_a_module").__name__ == "three_of_a_module"


def test_nothing_comes_from_the_current_directory(tmp_path, monkeypatch):
    write(tmp_path, GOOD)
    (tmp_path / "plugins").mkdir()
    write(tmp_path / "plugins", GOOD, "other.py")
    monkeypatch.chdir(tmp_path)
    assert not {"scaled", "other"} & set(manager.find())


def test_a_name_stands_for_one_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    manager.add(write(tmp_path / "a", GOOD), write(tmp_path / "a", GOOD))
    assert refusal(manager.add, write(tmp_path / "b", GOOD)).startswith("two plugins are named 'scaled'")
    assert manager.find()["scaled"] == tmp_path / "a" / "scaled.py"  # what was refused is not remembered


def test_a_shipped_plugin_by_its_path_is_no_other_plugin_that_other_processes_had_to_be_told_of():
    assert manager.load(manager.path_of("nf4")) is manager.load("nf4")
    assert manager.sources() == []


def test_unknown_name_has_the_nearest(tmp_path):
    manager.add(write(tmp_path, GOOD))
    message = refusal(manager.path_of, "scald", "method")
    assert (
        message == "no method is named 'scald'; did you mean 'scaled'? (`refpeft methods` lists them; -p FILE adds one)"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py", "plugin nowhere.py does not exist"),
        (
            "no.such.module",
            "plugin 'no.such.module' is neither a file, nor a folder, nor a module that Python can import",
        ),
        ("not a module", "plugin not a module does not exist"),
    ],
)
def test_a_source_that_is_not_there(source, message):
    assert refusal(manager.add, source) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def peft_linear", "def peft_linaer", ":21: there is no hook 'peft_linaer'; did you mean 'peft_linear'"),
        ("(x, base, p)", "(x, bse, p)", ":21: peft_linear has no argument 'bse'; did you mean 'base'?"),
        ("(x, base, p)", "(x, base, p, zzz)", "peft_linear has no argument 'zzz'; it may take x, base, p, cfg"),
        ("(x, base, p)", "(x, base, train=None)", "peft_linear gives train a default, so it would never be passed"),
        ("@hookimpl(trylast=True)\n", "", "peft_linear lacks its decorator @hookimpl, so it would never be called"),
        ("def helper():", "def helper(:", " cannot be imported: SyntaxError: invalid syntax"),
        ("def helper():\n", "1 / 0\ndef helper():\n", ":26 cannot be imported: ZeroDivisionError: division by zero"),
        ("def helper():\n", "raise SystemExit\ndef helper():\n", ":26 cannot be imported: SystemExit"),
        ("from refpeft", "from refpept", ":7 cannot be imported: ModuleNotFoundError: No module named 'refpept'"),
    ],
)
def test_a_mistake_in_a_plugin_is_one_line_with_its_place(tmp_path, old, new, message):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    said = refusal(manager.load, path)
    assert said.startswith(f"plugin {path}")
    assert message in said
    assert "refpeft_plugins.scaled" not in sys.modules


def test_a_mended_plugin_loads_after_the_mistake(tmp_path):
    refusal(manager.load, write(tmp_path, GOOD.replace("def peft_linear", "def peft_linaer")))
    assert manager.hook(manager.load(write(tmp_path, GOOD)), "peft_linear")


def test_a_file_without_hooks_is_refused(tmp_path):
    assert "defines no hook" in refusal(manager.load, write(tmp_path, "x = 1\n", "empty.py"))
