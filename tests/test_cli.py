"""The command line: listings, and mistakes as messages with exit code 2."""

import json
import sys

import pytest
from click.testing import CliRunner

from refpeft import manager
from refpeft.cli import main

METHOD = '''"""Scales outputs (Someone, 2000): y = g W x."""

from dataclasses import dataclass

from refpeft import hookimpl


@dataclass(frozen=True)
class Config:
    start: float = 1.0  # first value
    targets: tuple[str, ...] = ("q_proj",)


@hookimpl
def peft_params(site):
    return {"g": [1.0]}


@hookimpl
def peft_linear(x, base, p):
    return base(x)
'''


@pytest.fixture
def refpeft(monkeypatch, tmp_path):
    """Runs a command line in an empty directory; gives click's result."""
    monkeypatch.setattr(manager, "_added", {})
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield lambda *arguments, **keywords: CliRunner().invoke(main, list(map(str, arguments)), **keywords)
    for name in set(sys.modules) - before:
        if name.startswith("refpeft_plugins."):
            manager._forget(name)


@pytest.fixture
def method(tmp_path):
    (tmp_path / "gain.py").write_text(METHOD)
    return tmp_path / "gain.py"


def refused(result) -> str:
    """The message of a run that was refused."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_methods_lists_names_and_first_lines(refpeft, method):
    lines = refpeft("methods", "-p", method).stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("gain ")] == [["gain", "Scales", "outputs"]]


def test_one_method_shows_its_options_as_toml(refpeft, method):
    assert refpeft("methods", "gain", "-p", method).stdout == (
        "Scales outputs (Someone, 2000): y = g W x.\n\n"
        "acts on  linear; cannot be merged\n"
        f"file     {method}\n\n"
        "[gain]\n"
        "start = 1.0           # float            first value\n"
        'targets = ["q_proj"]  # tuple[str, ...]\n'
    )


def test_a_listing_as_json(refpeft, method):
    listed = {row["name"]: row for row in json.loads(refpeft("methods", "--json", "-p", method).stdout)}
    assert listed["gain"]["hooks"] == ["peft_params", "peft_linear"]
    assert listed["gain"]["options"][0] == {"name": "start", "type": "float", "default": "1.0", "note": "first value"}


def test_an_unknown_verb_or_method_has_the_nearest_name(refpeft, method):
    assert "no verb is named 'methds'; did you mean 'methods'?" in refused(refpeft("methds"))
    assert refused(refpeft("methods", "gian", "-p", method)) == (
        "no method is named 'gian'; did you mean 'gain'? (`refpeft methods` lists them)\n"
    )
    assert refused(refpeft("quantizers", "gain", "-p", method)).startswith("'gain' is not a quantizer")


def test_a_plugin_that_is_not_there_is_one_line(refpeft):
    assert refused(refpeft("methods", "-p", "nowhere.py")) == "plugin nowhere.py does not exist\n"
