"""refpeft itself under test: on NumPy, and on a GPU with CuPy."""

from functools import partial

from refpeft.conformance.drivers import Refpeft

on_numpy = partial(Refpeft, "cpu")
on_cupy = partial(Refpeft, "cuda")
