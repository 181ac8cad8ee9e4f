"""What methods take from adapters of other tasks: for authors of such methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .adapters import stored
from .errors import RefpeftError
from .tensor import Tensor, no_grad

if TYPE_CHECKING:
    from .sites import Site


def prompt(directory: str, site: Site, tokens: int) -> np.ndarray:
    """The rows (tokens, dim) that the adapter in `directory` puts before the embeddings of `site`, in float64.

    Raises RefpeftError where it adds none, or another number of them, and as `adapters.stored` does.
    """
    adapter = stored(directory, [site])
    (layer,) = adapter.layers
    with no_grad():
        rows = layer.around(lambda ids: Tensor(np.zeros((1, 1, site.shape[1]))))(np.zeros((1, 1), int)).data[0, :-1]
    if not len(rows):
        raise RefpeftError(f"{directory} holds {adapter.name}, which has no prompt")
    if len(rows) != tokens:
        raise RefpeftError(f"the prompt of {directory} has {len(rows)} tokens, and tokens is {tokens}")
    return rows
