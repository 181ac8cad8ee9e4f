"""The files that `refpeft new-method` writes: a small method that works, its test, and what makes vectors for it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

from refpeft import manager
from refpeft.errors import RefpeftError
from refpeft.files import write_text

METHOD = '''\
"""NAME: y = W x + b + s B A x, with W frozen and s = alpha / r.

Hu et al., 2021, arXiv:2106.09685, section 4.1. (Change the equation, its source, and what follows from it.)

First values, which leave the model as it is: A uniform in +-1 / sqrt(in), B zero.
Trained: A (r, in), B (out, r): r (in + out) numbers a target.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import hookimpl, ops

FAMILY = "reparametrisation"  # or additive, soft prompt, selective, hybrid


@dataclass(frozen=True)
class Config:  # options and their defaults; `refpeft train --set NAME.r=4` and run.toml set them
    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("@q", "@v")  # `refpeft sites MODEL` lists the roles
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"r is {self.r}: expected 1 or more")


@hookimpl
def peft_params(site, cfg, rng):
    """First values at one site: arrays are trained, a refpeft.Tensor(array) is a constant that is kept with them.

    `weight` among the arguments would be the frozen weight (out, in), `bias` its bias: see refpeft/hookspecs.py.
    """
    out, width = site.shape
    bound = width**-0.5
    return {"A": rng.uniform(-bound, bound, (cfg.r, width)), "B": np.zeros((out, cfg.r))}


@hookimpl
def peft_linear(x, base, p, cfg):
    """The forward pass: x (batch, time, in) -> (batch, time, out), in refpeft.ops and refpeft.fused; gradients follow.

    base(x) is the layer below with its bias, called once. The same for other places: peft_embedding, peft_norm,
    peft_attention, peft_block.
    """
    return base(x) + ops.linear(ops.linear(x, p.A), p.B) * (cfg.alpha / cfg.r)


@hookimpl
def peft_merge(weight, p, cfg):
    """The weight that computes the same alone; without this hook the method cannot be merged. p has arrays here."""
    return weight + (cfg.alpha / cfg.r) * (p.B @ p.A)
'''

TEST = '''\
"""NAME: what `refpeft check` asks, one layer against the equation, and the vectors that make_NAME.py made."""

from pathlib import Path

import numpy as np
import pytest

import refpeft
from refpeft import manager
from refpeft.conformance import conform, report
from refpeft.conformance.check import check
from refpeft.conformance.drivers import Refpeft
from refpeft.conformance.vectors import collect

PLUGIN = Path(__file__).with_name("NAME.py")
VECTORS = Path(__file__).with_name("vectors")


def test_it_is_what_a_method_promises_to_be():
    found = check(PLUGIN)
    assert not found.having("FAILED"), found.text()


def test_a_layer_computes_the_equation():
    model = refpeft.load("embedded", dtype="float64")
    adapter = refpeft.attach(model, str(PLUGIN), {"r": 3, "alpha": 6.0, "targets": ["@q"], "layers": [0]})
    (site,) = adapter.sites
    A, B = (adapter.params[f"{site.name}.{letter}"].data for letter in "AB")
    rng = np.random.default_rng(0)
    B[...] = rng.standard_normal(B.shape)
    x = rng.standard_normal((2, 5, site.shape[1]))
    expected = x @ (site.weight() + 6.0 / 3 * B @ A).T
    assert np.allclose(site(refpeft.Tensor(x)).data, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="no vectors: run make_NAME.py, which needs torch")
def test_it_agrees_with_torch():
    manager.add(PLUGIN)
    made, problems = collect(VECTORS)
    done = conform(Refpeft(), made, problems=problems)
    assert done.ok, report.text(done)
'''

MAKE = '''\
"""Makes golden cases of NAME with torch in float64: python make_NAME.py, then

    refpeft conform refpeft -p NAME.py --vectors vectors

The format is golden/README.md's: any implementation can be held to them. torch is needed here alone.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).with_name("vectors") / "NAME"
CASES = {  # id: (config, out, in, whether there is a bias); an id never changes
    "NAME-linear-plain": ({"r": 2, "alpha": 6.0}, 6, 4, False),
    "NAME-linear-bias": ({"r": 3, "alpha": 3.0}, 5, 7, True),
}


def trained(config, out, width):
    """Shapes of what is trained. Change this, as peft_params was."""
    return {"A": (config["r"], width), "B": (out, config["r"])}


def constant(config, out, width):
    """Shapes of what peft_params gives as a Tensor: not trained, and without a gradient."""
    return {}


def layer(x, weight, bias, p, config):
    """The equation at one layer, from the paper and not from the plugin. Change this."""
    return x @ weight.T + bias + config["alpha"] / config["r"] * x @ p["A"].T @ p["B"].T


def merged(weight, p, config):
    """The weight that computes the same alone. Change this, or leave merged.weight out below."""
    return weight + config["alpha"] / config["r"] * p["B"] @ p["A"]


def outputs(given, config, names, dtype):
    """y, the gradients of sum(y * g), and the merged weight, all computed in dtype."""
    t = {name: array.to(dtype) for name, array in given.items()}
    leaves = {name: t[name].requires_grad_() for name in ("x", *names)}
    y = layer(leaves["x"], t["weight"], t.get("bias", 0), t, config)
    y.backward(t["g"])
    answer = {"y": y, **{f"grad.{name}": leaf.grad for name, leaf in leaves.items()}}
    answer["merged.weight"] = merged(t["weight"], t, config)
    return {name: array.detach().contiguous() for name, array in answer.items()}


def limit(single, expected):
    """Eight times float32's error in eps of the largest number, rounded up to a power of two; at least 8."""
    worst = (single.double() - expected).abs().max() / (torch.finfo(torch.float32).eps * expected.abs().max())
    return max(8, 2 ** math.ceil(math.log2(8 * max(float(worst), 1e-9))))


def make(name, config, out, width, has_bias):
    generator = torch.Generator().manual_seed(len(name))
    shapes = {"x": (2, 3, width), "weight": (out, width), "g": (2, 3, out)} | trained(config, out, width)
    shapes |= constant(config, out, width) | ({"bias": (out,)} if has_bias else {})
    given = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    names = list(trained(config, out, width))
    expected, single = (outputs(given, config, names, dtype) for dtype in (torch.float64, torch.float32))
    checks = {key: dict.fromkeys(("float32", "float64"), limit(single[key], expected[key])) for key in expected}
    case = {
        "id": name,
        "kind": "method",
        "name": "NAME",
        "at": "linear",
        "level": "must",
        "comment": "what is special about this case",
        "flags": ["TransposedFactor"],
        "spec": "arXiv:2106.09685, section 4.1",
        "config": config,
        "inputs": list(given),
        "checks": checks,
        "tensors": f"{name}.safetensors",
        "source": {"oracle": f"torch {torch.__version__} float64", "agrees_with": [], "script": Path(__file__).name},
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors = {f"in.{key}": array for key, array in given.items()} | {f"out.{key}": a for key, a in expected.items()}
    save_file(tensors, FOLDER / f"{name}.safetensors")
    (FOLDER / f"{name}.json").write_text(json.dumps(case, indent=2) + "\\n", "utf-8")


if __name__ == "__main__":
    for name, (config, out, width, has_bias) in CASES.items():
        make(name, config, out, width, has_bias)
        print(FOLDER / f"{name}.json")
'''

_FILES = {"{}.py": METHOD, "test_{}.py": TEST, "make_{}.py": MAKE}


def write(name: str, directory: str | Path = ".") -> list[Path]:
    """Writes NAME.py, test_NAME.py and make_NAME.py into `directory`, which is made where there is none; their paths.

    Raises RefpeftError for a name that is none for a module or that a plugin or a module has, and where a file is there
    already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or iskeyword(name):
        close = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789")
        hint = f", such as {close!r}" if close and not iskeyword(close) else ""
        raise RefpeftError(f"{name!r} is no name for a method: expected small letters, digits and _{hint}")
    files = {Path(directory) / pattern.format(name): text.replace("NAME", name) for pattern, text in _FILES.items()}
    there = [path for path in files if path.exists()]
    if there:
        raise RefpeftError(f"{there[0]} exists: choose another name or --dir")
    known = manager.find()
    if name in known:
        raise RefpeftError(f"a plugin is named {name!r} already, {known[name]}: choose another name")
    if find_spec(name):
        raise RefpeftError(f"{name!r} is a module, which {name}.py would stand in for: choose another name")
    Path(directory).mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_text(path, text)
    return list(files)
