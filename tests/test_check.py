"""`refpeft check`: every shipped plugin passes, and a plugin with a mistake is caught by the line that is for it."""

import json
import re
from dataclasses import make_dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import sources
from click.testing import CliRunner
from test_no_host_read import METHODS, QUANTIZERS

from refpeft import manager, ops
from refpeft.cli import main
from refpeft.conformance.check import check, findings
from refpeft.conformance.check.computing import check_gradients, nothing_detached
from refpeft.conformance.check.formula import evaluated, stated
from refpeft.conformance.check.source import operations
from refpeft.conformance.check.subjects import Method
from refpeft.conformance.new_method import METHOD

OPTIONS = {
    "adapterfusion": {"adapters": sources.bottlenecks(2, dim=64), "size": 5},
    "c3a": {"block_size": 32},
    "intrinsic_said": {"d": 60},
    "ipt": {"tokens": 3, "d": 5, "hidden": 7},
    "mam": {"tokens": 3, "hidden": 5, "size": 5},
    "s4": {"groups": [1, 1], "strategies": ["AL", "PBL"], "create": True},
    "spot": {"tokens": 3, "sources": sources.prompts(1, dim=64)},
    "trainable_tokens": {"token_indices": [5, 2]},
    "unipelt": {"hidden": 5},
    "vblora": {"vector_length": 32},
}
"""Options of methods that do not fit the tiny models by themselves, or take long."""


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS + QUANTIZERS)
def test_every_shipped_plugin_passes(name):
    report = check(name, OPTIONS.get(name))
    assert not report.having("FAILED"), report.text()
    assert len(report.having("passed")) >= 11


def test_two_shipped_plugins_pass():
    for name, count in (("lora", 24), ("nf4", 14)):
        report = check(name)
        assert not report.having("FAILED"), report.text()
        assert len(report.findings) == count


# ---- mistakes in a method ----

HOOK = "def peft_linear(x, base, p, cfg):"
LINEAR = "base(x) + ops.linear(ops.linear(x, p.A), p.B) * (cfg.alpha / cfg.r)"
MERGED = "weight + (cfg.alpha / cfg.r) * (p.B @ p.A)"
FIRST = '{"A": rng.uniform(-bound, bound, (cfg.r, width)), "B": np.zeros((out, cfg.r))}'

MISTAKES = {
    "a misspelled hook": ("peft_linear", "peft_lineer", "hooks", "there is no hook 'peft_lineer'; did you mean"),
    "an argument that no hook has": ("base, p, cfg)", "base, p, config)", "hooks", "peft_linear has no argument 'conf"),
    "a missing decorator": ("@hookimpl\n" + HOOK, HOOK, "hooks", "peft_linear lacks its decorator"),
    "no Python": ("FAMILY = ", "FAMILY == = ", "hooks", "invalid syntax"),
    "no docstring": ('"""NAME: y', "_ = " + '"""NAME: y', "docstring", "there is none"),
    "no full stop": ("and s = alpha / r.", "and s = alpha / r", "docstring", "let it be a sentence"),
    "no source": ("arXiv:2106.09685", "a paper", "docstring", "it names no source"),
    "no family": ('FAMILY = "', 'KIND = "', "family", "the file has no FAMILY"),
    "no such family": ('"reparametrisation"', '"reparametrization"', "family", "expected one of 'additive'"),
    "a Config that changes": ("(frozen=True)", "", "config", "@dataclass(frozen=True)"),
    "a Config that is no dataclass": ("@dataclass(frozen=True)\n", "", "config", "@dataclass(frozen=True)"),
    "no Config": ("class Config:", "class Options:", "config", "there is no Config: add a frozen dataclass"),
    "a field that JSON has not": (
        "    r: int = 8\n", "    r: int = 8\n    some: frozenset = frozenset()\n", "config", "cannot be written to an",
    ),
    "a Config without targets": ('    targets: tuple[str, ...] | str = ("@q", "@v")', "    #", "config", "targets"),
    "a field without default": ("    r: int = 8\n", "    r: int\n", "config", "Config.r has no default"),
    "a Config that refuses itself": (
        "if self.r < 1:", "if not isinstance(self.targets, tuple) or len(self.targets) > 1:", "config", "",
    ),
    "too large for any model": ("self.r < 1", "self.r > 1", "attaches", "--set KEY=VALUE"),
    "an exception at import": ("FAMILY = ", "1 / 0\nFAMILY = ", "hooks", "ZeroDivisionError: division by zero"),
    "an exception in a hook": ("bound = width**-0.5", "bound = wide**-0.5", "attaches", "not defined (line 4"),
    "random numbers of its own": (
        "rng.uniform(-bound", "np.random.default_rng().uniform(-bound", "first values", "the argument `rng`",
    ),
    "first values that are no numbers": ("np.zeros((out", "np.nan * np.zeros((out", "first values", "B is not finite"),
    "a claim that is not so": ('"B": np.zeros((out, cfg.r))', '"B": np.ones((out, cfg.r))', "identity at start", "1"),
    "a gradient that is lost": (
        "ops.linear(ops.linear(x, p.A), p.B)", "ops.linear(ops.linear(Tensor(x.data), p.A), p.B)",
        "gradients", "compute with refpeft.ops",
    ),
    "a gradient that is a little off": (
        "ops.linear(x, p.A)", "ops.linear(x, p.A * 1.01 - Tensor(p.A.data) * 0.01)", "gradients", "finite differences",
    ),
    "a Tensor anew": (
        "ops.linear(ops.linear(x, p.A), p.B)", "ops.linear(ops.linear(Tensor(x.data), p.A), p.B)",
        "operations", "line 55: no gradient passes through `Tensor(x.data)`",
    ),
    "NumPy on activations": (
        LINEAR, "base(x) + ops.linear(Tensor(np.tanh(x.data) @ p.A.data.T), p.B)",
        "operations", "`np.tanh(x.data)`: compute with refpeft.ops",
    ),
    "a read on the host": (
        LINEAR, LINEAR + " * float(1 + 0 * p.B.data.sum())", "no host read", "the host reads a value",
    ),
    "a host array": (LINEAR, LINEAR + " + Tensor(np.zeros(len(p.B.data), p.B.dtype))", "no host read", "host array"),
    "later tokens": (LINEAR, LINEAR + " + ops.mean(x, axis=1, keepdims=True)[..., :1]", "causality", "with token 5"),
    "the next token": (
        LINEAR, LINEAR + " + ops.concat(x[:, 1:], x[:, :1], axis=1)[..., :1]", "causality", "with token 5",
    ),
    "other rows": (LINEAR, LINEAR + " + ops.mean(x, axis=0)[..., :1]", "independence of rows", "in a batch"),
    "padding": (
        LINEAR, LINEAR + " + ops.mean(x, axis=1, keepdims=True)[..., :1]", "independence of rows", "with its padding",
    ),
    "the token before": (
        LINEAR, LINEAR + " + ops.concat(x[:, :1] * 0.0, x[:, :-1], axis=1)[..., :1]",
        "independence of rows", "texts that share a row differ by",
    ),
    "base twice": (LINEAR, LINEAR + " + base(x) * 0.1", "base called once", "calls base 2 times"),
    "base never": ("base(x) +", "base.frozen(x) +", "base called once", "never calls base"),
    "what is below is lost": ("base(x) +", "base.frozen(x) +", "around lora", "gets no gradient"),
    "a transposed merge": ("(p.B @ p.A)", "(p.A.T @ p.B.T)", "merging", ""),
    "another scale in the merge": ("weight + (cfg.alpha / cfg.r)", "weight + cfg.alpha", "merging", "differ from the"),
    "a merge in place": ("return " + MERGED, "weight += (p.B @ p.A) * (cfg.alpha / cfg.r)\n    return weight",
                         "merging", "must not write"),
    "nothing that is trained": (LINEAR, LINEAR + " * 0.0", "detaching", "change no output: is what they give lost?"),
    "a step in place": (LINEAR, LINEAR + " + shrunk(base)", "detaching", "change arrays in place"),
    "another count": ("r (in + out) numbers", "r (in + out) + out numbers", "number of parameters", "1,024 numbers"),
    "a dense weight that is kept": (LINEAR, "base(x) + ops.linear(x, Tensor(site.weight.array), None) * 0 + "
                                    + LINEAR.removeprefix("base(x) + "), "quantized base", "'array'"),
    "a merge that is no number": (MERGED, f"({MERGED}) * float('nan')", "merging", "by nan of the largest"),
    "rounding": (LINEAR, LINEAR.replace("ops.linear(x, p.A)", "(ops.linear(x, p.A) + 1e5 - 1e5)"),
                 "float32 and float64", "nearly equal"),
    "too large for float32": (LINEAR, LINEAR + " + x[..., :1] * 1e30 * 1e30 * 0", "float32 and float64", "by nan eps"),
}  # fmt: skip
IMPORT = "from refpeft import hookimpl, ops\n"
HELPERS = """from refpeft import Tensor


def shrunk(base):
    base.weight.data[...] *= 0.5
    return 0.0
"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_method_is_caught_by_its_line(mistake, tmp_path):
    right, wrong, line, text = MISTAKES[mistake]
    assert right in METHOD
    source = METHOD.replace(right, wrong, 1)
    if "site." in wrong:
        source = source.replace(HOOK, "def peft_linear(x, base, p, cfg, site):")
    source = source.replace(IMPORT, IMPORT + HELPERS, 1)
    (tmp_path / "mistaken.py").write_text(source.replace("NAME", "mistaken"))
    (finding,) = check(tmp_path / "mistaken.py", only=[line]).findings
    assert finding.outcome == "FAILED" and text in finding.text, finding


def test_a_number_that_is_drawn_and_in_no_file_is_caught(tmp_path):
    source = METHOD.replace("    bound = ", "    KEPT[0] = float(rng.uniform(1, 2))\n    bound = ")
    source = source.replace(LINEAR, f"{LINEAR} * KEPT[0]").replace(IMPORT, f"{IMPORT}\nKEPT = {{}}\n")
    (tmp_path / "mistaken.py").write_text(source.replace("NAME", "mistaken"))
    (finding,) = check(tmp_path / "mistaken.py", only=["saving and loading"]).findings
    assert finding.outcome == "FAILED" and "must be in the file" in finding.text, finding


def test_the_innermost_line_of_the_plugins_own_file_is_named():
    source = "import json\n\ndef hook():\n    helper()\n\ndef helper():\n    json.loads('{')\n\nhook()\n"
    with pytest.raises(ValueError) as error:
        exec(compile(source, "plugin.py", "exec"), {})
    assert findings.place(error.value, "plugin.py") == " (line 7)"
    assert findings.place(error.value, "other.py") == ""


def test_whether_first_values_are_drawn_is_said():
    said = {name: check(name, only=["first values"]).findings[0].text for name in ("lora", "ia3")}
    assert said == {"lora": "the seed decides them", "ia3": "the same for every seed"}


def test_the_method_without_a_mistake_passes(tmp_path):
    (tmp_path / "right.py").write_text(METHOD.replace("NAME", "right"))
    report = check(tmp_path / "right.py")
    assert not report.having("FAILED"), report.text()


def test_properties_are_asked_of_every_kind_of_site_that_there_is_a_hook_for():
    (finding,) = check("lora", only=["gradients"]).findings
    assert "linear" in finding.text and "embedding" in finding.text


def test_gradients_are_not_taken_for_wrong_where_a_constant_is_meant():
    assert check("dora", only=["gradients"]).findings[0].outcome == "passed"


def test_nothing_is_detached_while_gradients_are_compared_and_afterwards_all_is_as_before():
    plugin, detach = ModuleType("plugin"), ops.detach
    plugin.detach = detach
    with nothing_detached(SimpleNamespace(plugin=plugin)):
        assert plugin.detach("x") == ops.detach("x") == "x"
    assert plugin.detach is ops.detach is detach


def test_comparing_gradients_leaves_values_as_they_are():
    path = manager.path_of("lora")
    method = Method(manager.load(path), manager.read(path), {})
    built, adapter = method.attached("llama")
    before = {name: tensor.data.copy() for name, tensor in adapter.params.items()}
    check_gradients(built, method)
    assert all(np.array_equal(tensor.data, before[name]) for name, tensor in adapter.params.items())


@pytest.mark.parametrize(
    ("name", "line", "why"),
    [
        ("mam", "base called once", "it has no forward hook"),
        ("prompt_tuning", "merging", "cannot be merged"),
    ],
)
def test_what_cannot_be_asked_of_a_method_is_not_applicable(name, line, why):
    (finding,) = check(name, only=[line]).findings
    assert finding.outcome == "not applicable" and why in finding.text, finding


def test_a_claim_is_asked_for_only_where_the_docstring_makes_it():
    (finding,) = check("prefix_tuning", only=["identity at start"]).findings
    assert finding.outcome == "not applicable" and "the docstring does not say" in finding.text


def test_a_method_for_quantized_weights_is_tried_on_these():
    report = check("qdora", only=["attaches", "dense base", "gradients", "quantized base"])
    outcomes = {finding.property: finding.outcome for finding in report.findings}
    assert outcomes == {
        "attaches": "passed",
        "dense base": "not applicable",
        "gradients": "passed",
        "quantized base": "passed",
    }


@pytest.mark.parametrize(
    ("computed", "problem"),
    [
        ("x.data * 2", "line 2: `x.data * 2` is computed with arrays, and no gradient passes"),
        ("Tensor(x.data.astype('f4'))", "hand the Tensor on, or ops.detach() of it"),
        ("numpy.abs(x.data)", "line 2: no gradient passes through `numpy.abs(x.data)`: compute with refpeft.ops"),
        ("helper(x)", "line 6: no gradient passes through `np.tanh(x.data)`"),
        ("x * float(p.A.data)", "`float(p.A.data)` reads a value on the host"),
        ("x * p.A.data.item()", "`p.A.data.item()` reads a value on the host"),
        ("x * float(cfg.alpha)", None),
        ("x * (x.data > 0)", None),
        ("x * table[p.codes.data]", None),
        ("x * len(p.A.data)", None),
        ("other(x.data)", None),
    ],
)
@pytest.mark.parametrize("hook", ["peft_linear", "peft_penalty", "peft_objective"])
def test_array_code_in_hooks_that_are_given_tensors_is_told(hook, computed, problem, tmp_path):
    helper = "def helper(x):\n    return np.tanh(x.data)\n"
    (tmp_path / "plugin.py").write_text(f"def {hook}(x, p):\n    return {computed}\n\n\n{helper}")
    subject = SimpleNamespace(path=tmp_path / "plugin.py")
    if problem is None:
        assert operations(subject) == "no array code on Tensors in the hooks of the forward pass"
    else:
        with pytest.raises(findings.Failed, match=re.escape(problem)):
            operations(subject)


def test_array_code_in_other_hooks_is_right(tmp_path):
    (tmp_path / "plugin.py").write_text("def peft_merge(weight, p):\n    return weight + np.abs(p.A.data)\n")
    assert operations(SimpleNamespace(path=tmp_path / "plugin.py"))


def test_a_field_of_a_config_may_be_made_by_a_factory(tmp_path):
    text = METHOD.replace("    r: int = 8\n", "    r: int = 8\n    some: dict = field(default_factory=dict)\n")
    text = text.replace("import dataclass\n", "import dataclass, field\n").replace("NAME", "mine")
    (tmp_path / "mine.py").write_text(text)
    (finding,) = check(tmp_path / "mine.py", only=["config"]).findings
    assert finding.outcome == "passed", finding


@pytest.mark.parametrize(
    ("doc", "formula"),
    [
        ("Trained: A (r, in), B (out, r): r (in + out) numbers a target, r out with A frozen.", ("r (in + out)", True)),
        ("Trained: down, down_bias: 2 size dim + size + dim numbers\na place.", ("2 size dim + size + dim", True)),
        ("P (out, r), E (r,) and Q (r, in), r (in + out + 1) numbers a target", ("r (in + out + 1)", True)),
        ("Trained: `r (in + out)` numbers a layer", ("r (in + out)", True)),
        ("Trained: prompt (tokens, dim), tokens dim numbers in all.", ("tokens dim", False)),
        ("Trained: r (in + out) + 1 numbers a target of LoRA", None),
        ("nothing is said of numbers", None),
    ],
)
def test_a_formula_is_found_in_a_docstring(doc, formula):
    assert stated(doc) == formula


@pytest.mark.parametrize(
    ("text", "number"),
    [("r (in + out)", 80), ("2 in - out / 4", 22), ("r^2 (1 + 2 r)", 144), ("in out r", 384)],
)
def test_a_formula_of_options_and_sizes_is_evaluated(text, number):
    site = SimpleNamespace(kind="linear", shape=(8, 12))
    sized = make_dataclass("Config", [("r", int), ("targets", tuple)])(4, ())
    assert evaluated(text, sized, SimpleNamespace(site=site)) == number
    block = SimpleNamespace(kind="block", shape=(8,))
    assert evaluated("2 dim in + out", sized, SimpleNamespace(site=block)) == 136
    with pytest.raises(findings.NotApplicable, match="has 'targets', which is no option and no size"):
        evaluated("r targets", sized, SimpleNamespace(site=site))


@pytest.mark.parametrize(
    ("text", "why"), [("r ! in", "is not understood"), ("in % r", "is not understood"), ("in / (r - 4)", "divides by")]
)
def test_a_formula_that_has_no_value_is_not_applicable(text, why):
    sized, site = make_dataclass("Config", [("r", int)])(4), SimpleNamespace(kind="linear", shape=(8, 12))
    with pytest.raises(findings.NotApplicable, match=why):
        evaluated(text, sized, SimpleNamespace(site=site))


def test_options_of_a_quantizer_are_those_that_are_given():
    said = [check("nf4", options, only=["both ways"]).findings[0].text for options in ({}, {"block": 32})]
    assert said[0] != said[1]


def test_a_formula_is_asked_of_every_site_and_of_the_defaults_alone(tmp_path):
    (finding,) = check("lora", only=["number of parameters"]).findings
    assert int(re.search(r"at (\d+) sites", finding.text)[1]) > 3
    text = METHOD.replace("r (in + out) numbers", "8 (in + out) numbers").replace("NAME", "mine")
    (tmp_path / "mine.py").write_text(text)
    outcomes = [check(tmp_path / "mine.py", options, only=["number of parameters"]) for options in ({}, {"r": 2})]
    assert [one.findings[0].outcome for one in outcomes] == ["passed", "not applicable"]


# ---- mistakes in a quantizer ----

QUANTIZER = '''"""Thirds: 4 bits a weight, a code -7 ... 7 times a scale for each row.

https://example.org/thirds
"""

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of


@hookimpl
def quant_pack(weight):
    xp, rows = xp_of(weight), weight.reshape(-1, weight.shape[-1])
    scale = xp.maximum(xp.abs(rows).max(axis=1), np.float32(1e-37)) / 7
    codes = xp.rint(rows / scale[:, None]).astype("i1")
    return {"codes": codes, "scale": scale}


@hookimpl
def quant_unpack(parts, shape, dtype):
    values = parts["codes"].astype("f4") * parts["scale"][:, None]
    return values.reshape(shape).astype(dtype)
'''
QUANTIZER_MISTAKES = {
    "another order": ("reshape(shape)", "reshape(shape[::-1]).T.copy()", "both ways", "do both hooks mean the same"),
    "another shape": (".reshape(shape)", "", "odd shapes", "comes back as"),
    "division by zero": ("xp.maximum(xp.abs(rows).max(axis=1), np.float32(1e-37))", "xp.abs(rows).max(axis=1)",
                         "zeros", "divide by no scale of 0"),
    "squares": ("xp.abs(rows).max(axis=1)", "xp.sqrt((rows * rows).max(axis=1))", "any finite number", "NaN"),
    "another dtype": (".astype(dtype)", "", "dtypes", "where float64 is asked for"),
    "rows that are not left out": ("shape, dtype):", "shape, dtype, rows):", "some rows", "of 64 rows it gives"),
    "other rows": ("shape, dtype):\n    values = parts[\"codes\"].astype(\"f4\") * parts[\"scale\"][:, None]\n"
                   "    return values.reshape(shape)", "shape, dtype, rows):\n"
                   "    some = ... if rows is None else slice(rows.stop - rows.start)\n"
                   "    return (parts[\"codes\"].astype(\"f4\") * parts[\"scale\"][:, None])[some]",
                   "some rows", "alone are others than"),
    "random codes": ("xp.rint(rows / scale[:, None])",
                     "xp.floor(rows / scale[:, None] + np.random.default_rng().uniform(size=rows.shape))",
                     "same bits again", "no random numbers"),
    "a weight that is written to": ("    scale =", "    rows *= 0.5\n    scale =", "same bits again", "writes into"),
    "levels without codes": ('.astype("f4") *', '.astype("f4") * 2 *', "packing what was unpacked", "its own code"),
    "arrays of the host": ("xp.rint(rows", "xp.rint(np.zeros(rows.shape) + rows", "on a device", "a host array"),
    "other codes there": ("xp.rint(rows / scale[:, None])", "(xp.rint(rows / scale[:, None]) - (xp is not np))",
                          "on a device", "codes is another on a device"),
    "a read on the host": ("    values =", "    if parts[\"scale\"].max() > 0: pass\n    values =", "on a device",
                           "the host reads"),
}  # fmt: skip


def test_a_quantizer_that_only_packs_is_caught(tmp_path):
    (tmp_path / "thirds.py").write_text(QUANTIZER.partition("@hookimpl\ndef quant_unpack")[0])
    (finding,) = check(tmp_path / "thirds.py", only=["both ways"]).findings
    assert finding.outcome == "FAILED" and "there is no quant_unpack" in finding.text, finding


def test_a_quantizer_without_a_mistake_passes(tmp_path):
    (tmp_path / "thirds.py").write_text(QUANTIZER)
    report = check(tmp_path / "thirds.py")
    assert not report.having("FAILED"), report.text()


@pytest.mark.parametrize("mistake", QUANTIZER_MISTAKES)
def test_a_mistake_in_a_quantizer_is_caught_by_its_line(mistake, tmp_path):
    right, wrong, line, text = QUANTIZER_MISTAKES[mistake]
    assert right in QUANTIZER
    (tmp_path / "thirds.py").write_text(QUANTIZER.replace(right, wrong, 1))
    (finding,) = check(tmp_path / "thirds.py", only=[line]).findings
    assert finding.outcome == "FAILED" and text in finding.text, finding


# ---- the command ----


def run(*arguments):
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def test_the_command_prints_a_line_for_each_property_and_exits_with_1_where_one_failed(tmp_path):
    (tmp_path / "mistaken.py").write_text(METHOD.replace("(frozen=True)", "").replace("NAME", "mistaken"))
    failed = run(tmp_path / "mistaken.py", "--set", "r=2")
    assert failed.exit_code == 1
    assert "FAILED          config " in failed.output and "1 failed" in failed.output
    passed = run("nf4", "--json")
    assert passed.exit_code == 0
    assert {finding["outcome"] for finding in json.loads(passed.output)["findings"]} == {"passed", "not applicable"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "plugin nowhere.py does not exist"),
        (["lroa"], "no plugin is named 'lroa'; did you mean 'lora'?"),
        (["lora", "--set", "r"], "--set r: expected key=value"),
        (["lora", "--set", "q=3"], "q"),
    ],
)
def test_a_wrong_use_of_the_command_is_a_line_and_exit_code_2(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in done.output and len(done.output.splitlines()) == 1
