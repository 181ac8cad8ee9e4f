"""refpeft itself as an implementation of the golden vectors: what gives its answer to each kind of case."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import refpeft
from refpeft import backend
from refpeft.errors import RefpeftWarning

from ..vectors import Arrays, Case
from . import methods, models, operations, optimizers, quantizers, templates

_DRIVERS: dict[str, Callable[[Case, Arrays, str, ModuleType], Arrays]] = {
    "op": operations.run_op,
    "fused": operations.run_fused,
    "random": operations.run_random,
    "model": models.run_model,
    "block": models.run_block,
    "loss": models.run_loss,
    "method": methods.run_method,
    "optimizer": optimizers.run_optimizer,
    "schedule": optimizers.run_schedule,
    "quantizer": quantizers.run_quantizer,
    "template": templates.run_template,
}
"""By kind: (case, inputs by name, dtype, where arrays are made) -> outputs by name. Inputs are the host's."""


class Refpeft:
    """refpeft, on the host ("cpu") or a GPU ("cuda"). Its plugins are those of the package that this module is in.

    Raises RefpeftError where there is no such device.
    """

    version, dtypes = refpeft.__version__, ("float64", "float32")

    def __init__(self, device: str = "cpu"):
        self.name = "refpeft" if device == "cpu" else f"refpeft on {device}"
        self._xp = backend.module(device)
        if device == "cuda":  # the host computes in float32 where bfloat16 is asked for
            self.dtypes = (*self.dtypes, "bfloat16")

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        """The outputs of a case by name, from its inputs by name, floats in `dtype`.

        Raises NotImplementedError, with the reason, for what refpeft has not, and on a GPU for what is never there.
        """
        driver = _DRIVERS.get(case.kind)
        if driver is None:
            raise NotImplementedError(f"refpeft knows no cases of kind {case.kind!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RefpeftWarning)  # cases choose options that a user is warned of
            answer = driver(case, given, dtype, self._xp)
        return {name: backend.to_host(array) for name, array in answer.items() if array is not None}
