"""What methods take from adapters of other tasks: for authors of such methods."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from . import ops
from .adapters import own_values, stored
from .errors import RefpeftError
from .optim import AdamW, Flat
from .prompts import linear_values
from .tensor import Tensor, no_grad, parameter

if TYPE_CHECKING:
    from .rng import Stream
    from .sites import Site


def prompt(directory: str, site: Site, tokens: int) -> np.ndarray:
    """The rows (tokens, dim) that the adapter in `directory` puts before the embeddings of `site`, in float64.

    Raises RefpeftError where it adds none, or another number of them, and as `adapters.stored` does.
    """
    try:
        adapter = stored(directory, [site])
    except RefpeftError as error:
        raise RefpeftError(f"{directory} holds no prompt for {site.name}: {error}") from None
    (layer,) = adapter.layers
    with no_grad():
        rows = layer.around(lambda ids: Tensor(np.zeros((1, 1, site.shape[1]))))(np.zeros((1, 1), int)).data[0, :-1]
    if not len(rows):
        raise RefpeftError(f"{directory} holds {adapter.name}, which has no prompt")
    if len(rows) != tokens:
        raise RefpeftError(f"the prompt of {directory} has {len(rows)} tokens, and tokens is {tokens}")
    return rows


def prompts_of_tasks(directory: str, site: Site, tokens: int, ranks: int) -> tuple[int, dict[str, np.ndarray]]:
    """(how many tasks, the values by name) of the adapter of multitask_prompt in a directory.

    Raises RefpeftError where it is another method's, or of other sizes, and as `adapters.stored` does.
    """
    (layer,) = stored(directory, [site]).layers
    found = layer.part.cfg
    if layer.part.name != "multitask_prompt" or (found.tokens, found.ranks) != (tokens, ranks):
        wanted = f"multitask_prompt of {tokens} tokens and {ranks} ranks"
        raise RefpeftError(f"{directory} holds {layer.part.name} of {found}: expected {wanted}")
    return found.tasks, vars(layer.arrays)


def bottlenecks(directories: Sequence[str], site: Site, size: int, activation: str) -> dict[str, np.ndarray]:
    """The values of the bottlenecks that the adapters in these directories have at a place, stacked.

    Raises RefpeftError where one has none there, of another size or activation, or is of another method.
    """
    dim, found = site.shape[0], []
    shapes = {"down": (size, dim), "down_bias": (size,), "up": (dim, size), "up_bias": (dim,)}
    for directory in directories:
        method, options, values = own_values(directory)
        if method not in ("pfeiffer", "adapterdrop", "houlsby") or options.get("norms") or options.get("drop"):
            known = "pfeiffer, adapterdrop with drop = 0, or houlsby with norms = false"
            raise RefpeftError(f"{directory} holds {method} with {options}: expected {known}")
        has = options.get("activation")
        if has != activation:
            raise RefpeftError(f"the adapter in {directory} has activation = {has!r}, and activation is {activation!r}")
        here = {name: values.get(f"{site.name}.{name}") for name in shapes}
        if any(array is None for array in here.values()):
            places = sorted({name.rpartition(".")[0] for name in values})
            raise RefpeftError(
                f"the adapter in {directory} has no bottleneck at {site.name}, but at {', '.join(places)}"
            )
        for name, array in here.items():
            if array.shape != shapes[name]:
                what = f"{site.name}.{name} in {directory} has shape {array.shape}"
                raise RefpeftError(f"{what}: expected {shapes[name]}, for size = {size}")
        found.append(here)
    return {name: np.stack([here[name].astype("f4") for here in found]) for name in shapes}


# ---- a subspace of prompts (Qin et al., 2021, arXiv:2110.07867) ------------------------------------------------------


def decoder_values(rng: Stream, d: int, hidden: int, width: int) -> dict[str, np.ndarray]:
    """First values of a decoder from d numbers to `width`: inner (hidden, d), outer (width, hidden), biases."""
    return linear_values(rng, "inner", hidden, d) | linear_values(rng, "outer", width, hidden)


def decoded(z: Tensor, p: SimpleNamespace) -> Tensor:
    """outer tanh(inner z + inner_bias) + outer_bias: z (n, d) gives (n, width)."""
    return ops.linear(ops.tanh(ops.linear(z, p.inner, p.inner_bias)), p.outer, p.outer_bias)


def fitted_decoder(rng: Stream, rows: np.ndarray, d: int, hidden: int, steps: int, lr: float) -> dict[str, np.ndarray]:
    """The values of the decoder of an auto-encoder whose linear encoder finds d numbers for each of `rows` (n, width).

    `steps` of Adam on the mean squared error of all rows at once, in float32 on the host.
    """
    x = Tensor(rows.astype("f4"))
    values = linear_values(rng, "encoder", d, rows.shape[1]) | decoder_values(rng, d, hidden, rows.shape[1])
    p = SimpleNamespace(**{name: parameter(array.astype("f4")) for name, array in values.items()})
    optimizer = AdamW(Flat(vars(p).items()), (0.9, 0.999), 1e-8, 0.0)
    for _ in range(steps):
        error = decoded(ops.linear(x, p.encoder, p.encoder_bias), p) - x
        ops.mean(error * error).backward()
        optimizer.step(lr)
    return {name: value.data for name, value in vars(p).items() if not name.startswith("encoder")}
