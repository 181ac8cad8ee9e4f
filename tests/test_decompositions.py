"""What PiSSA, OLoRA and LoftQ compute does not hang on the signs that a decomposition chooses, nor on the process."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from variants import quantizer

from refpeft import adapters, learning, sites
from refpeft.optim import AdamW, Flat

METHODS = {"pissa": "eigh", "olora": "qr", "loftq": "eigh"}
"""By name, what finds first values."""


def attached(method: str):
    model = tiny.model("llama", "float32", quantizer() if method == "loftq" else None)
    return model, sites.attach(model, method, {"r": 3})


def train(model, adapter) -> None:
    optimizer = AdamW(Flat(adapter.params.items(), learning.rates(model)), (0.9, 0.999), 1e-8, 0.01)
    for _ in range(3):
        model.loss(tiny.batch()).backward()
        optimizer.step(0.01)


def with_other_signs(find):
    """A decomposition whose every other column has the opposite sign, as another library's may."""

    def found(matrix):
        first, second = find(matrix)
        signs = np.where(np.arange(matrix.shape[1]) % 2, 1, -1)
        if find.__name__ == "eigh":
            return first, second * signs
        return first * signs[: first.shape[1]], second * signs[: second.shape[0], None]

    return found


@pytest.mark.parametrize("method", METHODS)
def test_signs_change_factors_and_nothing_that_is_computed_with_them(method, monkeypatch, tmp_path):
    model, adapter = attached(method)
    monkeypatch.setattr(np.linalg, METHODS[method], with_other_signs(getattr(np.linalg, METHODS[method])))
    other, turned = attached(method)
    assert any(not np.array_equal(value.data, turned.params[name].data) for name, value in adapter.params.items())
    for one, same in zip(adapter.layers, turned.layers, strict=True):
        assert np.array_equal(one.site.weight(), same.site.weight())
    for one, its in ((model, adapter), (other, turned)):
        train(one, its)
    expected = model(tiny.ids()).data
    assert np.array_equal(other(tiny.ids()).data, expected)
    adapters.save(tmp_path, other)
    again = tiny.model("llama", "float32", quantizer() if method == "loftq" else None)
    adapters.load(again, tmp_path)
    assert np.array_equal(again(tiny.ids()).data, expected)


ELSEWHERE = """
import hashlib, sys
import numpy as np
import tiny
from variants import quantizer
from refpeft import adapters

def none(matrix):
    raise AssertionError("what is loaded is decomposed again")

np.linalg.eigh = np.linalg.qr = np.linalg.svd = none
model = tiny.model("llama", "float32", quantizer() if sys.argv[2] == "loftq" else None)
adapters.load(model, sys.argv[1])
print(hashlib.sha256(model(tiny.ids()).data.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("method", METHODS)
def test_another_process_computes_the_same_bits_and_decomposes_nothing(method, tmp_path):
    model, adapter = attached(method)
    train(model, adapter)
    adapters.save(tmp_path, model)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ELSEWHERE, tmp_path, method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == hashlib.sha256(model(tiny.ids()).data.tobytes()).hexdigest(), done.stderr
