"""A configuration comes from layers that remember where each value was given; all mistakes are reported in one go."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import config, manager, toml
from refpeft.errors import RefpeftError

METHOD = '''"""A method for these tests."""

from dataclasses import dataclass, field
from typing import Literal

from refpeft import hookimpl


@dataclass(frozen=True)
class Config:
    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    bias: Literal["none", "all"] = "none"
    pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.r > 64:
            raise ValueError(f"r is {self.r}: expected at most 64")


@hookimpl
def peft_linear(x, base):
    return base(x)
'''
QUANTIZER = '''"""A quantizer for these tests, without options."""

from refpeft import hookimpl


@hookimpl
def quant_pack(weight):
    return {"w": weight}
'''


@pytest.fixture(autouse=True, scope="module")
def _plugins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "rank.py").write_text(METHOD)
    (folder / "other.py").write_text(METHOD)
    (folder / "whole.py").write_text(QUANTIZER)
    manager.add(folder)
    yield
    for path in folder.glob("*.py"):
        manager._added.pop(path.resolve())
        manager._forget(f"refpeft_plugins.{path.stem}")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes run.toml (with `method = "rank"` unless it says another) in a directory that has data.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("")

    def write(text: str) -> str:
        (tmp_path / "run.toml").write_text(text if "method =" in text else 'method = "rank"\n' + text)
        return "run.toml"

    return write


def mistakes(*arguments, **keywords) -> list[str]:
    with pytest.raises(RefpeftError) as caught:
        config.resolve(*arguments, **keywords)
    return str(caught.value).split("\n")


def test_a_value_is_the_uppermost_layer_s_and_remembers_its_origin(write):
    file = write('[train]\nlr = 1e-3\nbatch = 4\nsteps = 7\n[data]\nfile = "data.jsonl"\n[rank]\nr = 4\n')
    flags = [("--lr", "train.lr", 2e-3), ("--batch", "train.batch", 16)]
    resolved = config.resolve(file, flags, ["train.batch=32", "rank.alpha=1"])
    assert (resolved.run.train.lr, resolved.run.train.batch, resolved.run.train.steps) == (2e-3, 32, 7)
    assert (resolved.options["rank"].r, resolved.options["rank"].alpha) == (4, 1.0)
    assert resolved.origins["train.lr"] == "--lr"
    assert resolved.origins["train.batch"] == "--set train.batch"
    assert resolved.origins["train.steps"] == "run.toml:5"
    assert "train.clip" not in resolved.origins  # a default


def test_every_mistake_is_reported_at_once_in_order_of_lines(write):
    file = write(
        """
method = "rnk"
device = "gpu"
sed = 3
[train]
lr = "fast"
epohcs = 3
batch = 0
schedule = "cosin"
[data]
file = "missing.jsonl"
[tarin]
lr = 1
"""
    )
    assert mistakes(file, [("--dtype", "dtype", "f64")], ["train.clip=-1"]) == [
        "run.toml:2: no method is named 'rnk'; did you mean 'rank'? (`refpeft methods` lists them; -p FILE adds one)",
        "run.toml:3: device is \"gpu\": expected 'cpu' or 'cuda'; did you mean 'cpu'?",
        "run.toml:4: unknown key 'sed'; did you mean 'seed'?",
        'run.toml:6: train.lr is "fast": expected a number',
        "run.toml:7: unknown key 'train.epohcs'; did you mean 'epochs'?",
        "run.toml:8: train.batch is 0: expected a value of at least 1",
        "run.toml:9: train.schedule is \"cosin\": expected 'constant', 'linear' or 'cosine'; did you mean 'cosine'?",
        "run.toml:11: data.file missing.jsonl does not exist",
        "run.toml:13: unknown table [tarin]; did you mean 'train'?",
        "--dtype: dtype is \"f64\": expected 'float32', 'tf32', 'bfloat16' or 'float64'; did you mean 'float64'?",
        "--set train.clip: train.clip is -1: expected a value of at least 0",
    ]


def test_a_key_in_the_wrong_place_is_told_where_it_belongs(write):
    assert mistakes(write("lr = 1e-3\n")) == ["run.toml:2: unknown key 'lr'; it belongs in [train]"]
    assert mistakes(write("[train]\nseed = 1\n")) == [
        "run.toml:3: unknown key 'train.seed'; it belongs in the top level"
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zz = 3", "run.toml:4: unknown key 'rank.zz'; [rank] has r, alpha, targets, bias, pattern"),
        ("aplha = 3", "run.toml:4: unknown key 'rank.aplha'; did you mean 'alpha'?"),
        ("r = 8.5", "run.toml:4: rank.r is 8.5: expected an integer"),
        ("r = true", "run.toml:4: rank.r is true: expected an integer"),
        ('bias = "lora"', "run.toml:4: rank.bias is \"lora\": expected 'none' or 'all'"),
        ("targets = 3", "run.toml:4: rank.targets is 3: expected a list or a string"),
        ("targets = [1]", "run.toml:4: rank.targets is [1]: expected a string"),
        ("r = 128", "run.toml:4: [rank]: r is 128: expected at most 64"),
        ("alpha = nan", "run.toml:4: rank.alpha is nan: expected a finite number"),
        ("r = 2024-01-01", "run.toml:4: rank.r is 2024-01-01: expected an integer"),
    ],
)
def test_a_plugin_s_options_are_as_strict(write, line, message):
    assert mistakes(write(f"[data]\n[rank]\n{line}\n")) == [message]


def test_a_table_that_nothing_reads_is_a_mistake(write):
    assert mistakes(write("[other]\nr = 4\n")) == ["run.toml:3: plugin 'other' is not chosen (this run has rank)"]
    assert mistakes(write(""), sets=["other.r=4"]) == [
        "--set other.r: plugin 'other' is not chosen (this run has rank)"
    ]


def test_a_flag_replaces_the_file_s_method_and_its_table(write):
    file, flag = write("[rank]\nr = 4\n"), ("--method", "method", ["other"])
    resolved = config.resolve(file, [flag])
    assert resolved.run.methods == ["other"]
    assert list(resolved.options) == ["other"]
    message = "--set rank.r: plugin 'rank' is not chosen (this run has other)"
    assert mistakes(file, [flag], ["rank.r=5"]) == [message]


def test_the_embedded_run_s_own_file_is_the_lowest_layer_of_such_a_run_alone(write):
    settings = tomllib.loads(config.EMBEDDED_RUN.read_text())
    resolved = config.resolve(None, [], ["train.batch=4"])
    assert resolved.run.train.lr == settings["train"]["lr"]
    assert resolved.run.train.batch == 4
    other = config.resolve(write('[data]\nfile = "data.jsonl"\n'))
    assert other.run.train == config.Train()


def test_two_methods_and_a_quantizer_have_a_table_each(write):
    resolved = config.resolve(write('method = ["rank", "other"]\nquantizer = "whole"\n[rank]\nr = 1\n[other]\nr = 2\n'))
    assert (resolved.options["rank"].r, resolved.options["other"].r, resolved.options["whole"]) == (1, 2, None)
    assert not any(key.startswith("whole.") for key in resolved.values())
    assert mistakes(write('method = ["rank", "rank"]\n')) == ["run.toml:1: method 'rank' is named twice"]
    assert mistakes(write("method = []\n")) == ["run.toml:1: method is []: expected at least one name"]
    assert mistakes(write('method = "whole"\n'))[0].startswith("run.toml:1: 'whole' is not a method")
    assert mistakes(write('quantizer = "whole"\n[whole]\nblock = 3\n')) == [
        "run.toml:4: plugin 'whole' has no options: 'block' is not one"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank.targets=k_proj", "k_proj"),
        ('rank.targets=["k_proj", "o_proj"]', ("k_proj", "o_proj")),
        ("rank.targets='all-linear'", "all-linear"),
        ("rank.targets = .*_proj", ".*_proj"),
    ],
)
def test_a_set_value_is_toml_or_a_bare_word(write, text, expected):
    assert config.resolve(write(""), sets=[text]).options["rank"].targets == expected


@pytest.mark.parametrize("text", ["lr", "=3", "a.b.c=3", "train. lr=3", ""])
def test_a_set_without_key_or_value_is_refused(write, text):
    assert mistakes(write(""), sets=[text]) == [f"--set {text}: expected key=value, such as train.lr=1e-3 or lora.r=16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "./nowhere"\n[data]\nfile = "data.jsonl"\n', "run.toml:2: model ./nowhere does not exist"),
        ('model = "some/model"\n', "there is no data: give --data FILE, or [data] file in the configuration"),
        ('[data]\nfile = "."\n', "run.toml:3: data.file . is not a file"),
        (
            "[train]\nbatch = 8\nmicro_batch = 3\n",
            "run.toml:4: train.micro_batch is 3: it must divide train.batch, which is 8",
        ),
        ("[train]\nsteps = 5\nwarmup = 6\n", "run.toml:4: train.warmup is 6 steps, more than the 5 of train.steps"),
        ("[train]\nwarmup = 1.5\n", "run.toml:3: train.warmup is 1.5: expected an integer or a value below 1"),
        ('dtype = "tf32"\n', "run.toml:2: dtype 'tf32' is for a GPU's tensor cores: choose device 'cuda' with it, or"),
        (
            "[train]\ncheckpoint_activations = true\noffload_activations = true\n",
            "run.toml:4: train.offload_activations moves what checkpoints keep from a GPU's memory to the host's: ",
        ),
        (
            'device = "cuda"\n[train]\noffload_activations = true\n',
            "run.toml:4: train.offload_activations moves what checkpoints keep from a GPU's memory to the host's: set",
        ),
        ('out = "data.jsonl"\n', "run.toml:2: out data.jsonl cannot be written: data.jsonl is a file"),
        ('out = "data.jsonl/run"\n', "run.toml:2: out data.jsonl/run cannot be written: /"),
        (
            '[data]\nfile = "data.jsonl"\n[train]\nbest = true\n',
            "run.toml:5: train.best needs held-out rows (data.eval_file or data.eval_share) and",
        ),
        ("data = 3\n", "run.toml:2: data is 3: expected a table [data]"),
        (f"seed = {'9' * 5000}\n", "run.toml cannot be read: Exceeds the limit"),
        (f"seed = {'[' * 5000}\n", "run.toml cannot be read: maximum recursion depth exceeded"),
        ("[train\n", "run.toml:2: not valid TOML: Expected ']' at the end of a table declaration"),
        ("seed = 1\nseed = 2\n", "run.toml:3: not valid TOML: Cannot overwrite a value"),
    ],
)
def test_options_that_do_not_go_together(write, text, message):
    assert len(found := mistakes(write(text))) == 1
    assert found[0].startswith(message)


def test_a_missing_file_and_a_binary_one_are_one_line(tmp_path):
    assert mistakes(tmp_path / "no.toml") == [f"configuration {tmp_path}/no.toml does not exist"]
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    assert mistakes(tmp_path / "bad.toml")[0].startswith(f"configuration {tmp_path}/bad.toml cannot be read")
    assert mistakes(tmp_path)[0].startswith(f"configuration {tmp_path} cannot be read")


def test_the_written_configuration_gives_the_same_run(write, tmp_path):
    file = write('out = "runs/\\"x\\" é"\n[data]\neval_share = 0.1\n[rank]\npattern = {"q.*" = 4}\nalpha = 2\n')
    first = config.resolve(file, sets=["train.warmup=5", "train.eps=1e-30"])
    (tmp_path / "again.toml").write_text(config.to_toml(first))
    again = config.resolve("again.toml")
    assert (again.run, again.options) == (first.run, first.options)


def test_options_outside_of_a_run_are_checked_alike():
    plugin = manager.load("rank")
    assert config.plugin_options(plugin, {"r": 2, "targets": ["a"]}) == plugin.Config(r=2, targets=("a",))
    with pytest.raises(RefpeftError) as caught:
        config.plugin_options(plugin, {"q": 1, "r": "x"})
    assert str(caught.value).split("\n")[0] == 'rank.r is "x": expected an integer'
    assert "unknown key 'rank.q'" in str(caught.value)


def test_lines_are_found_whatever_the_style():
    document = '''a = 1
b.c = 2
[t]   # comment
"x" = """
a = 3
[u]
"""
list = [
  1,
]
[ u . v ]
k = "="
'''
    tomllib.loads(document)
    assert toml.lines(document) == {
        "a": 1,
        "b": 2,
        "b.c": 2,
        "t": 3,
        "t.x": 4,
        "t.list": 8,
        "u": 11,
        "u.v": 11,
        "u.v.k": 12,
    }


values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


KEYS = ("model", "method", "quantizer", "out", "seed", "data", "train", "rank", "lora", "zzz", "a.b", "")
INNER = ("file", "eval_share", "lr", "betas", "warmup", "steps", "r", "targets", "pattern", "zzz", "a.b", "")
documents = st.dictionaries(st.sampled_from(KEYS), values | st.dictionaries(st.sampled_from(INNER), values), max_size=4)


@given(documents, st.lists(st.tuples(st.sampled_from(("train.lr", "rank.r", "x.y", "seed")), st.text(max_size=5))))
def test_no_configuration_is_a_crash(tmp_path_factory, document, sets):
    file = tmp_path_factory.mktemp("any") / "run.toml"
    file.write_text("\n".join(f"{toml.text(key)} = {toml.text(value)}" for key, value in document.items()))
    try:
        config.resolve(file, sets=[f"{key}={value}" for key, value in sets])
    except RefpeftError as error:
        assert str(error)


@given(values)
def test_what_is_written_as_toml_reads_back(value):
    assert tomllib.loads(f"value = {toml.text(value)}")["value"] == value
