"""What the layers of all models are: where one begins to compute some rows alone."""

from __future__ import annotations

from refpeft import fused
from refpeft.backend import Array
from refpeft.sites import Site
from refpeft.tensor import Tensor

Places = tuple[Array, Array]
"""Some of the rows (batch, time) of an array, none twice: the number of each in the batch, and in time."""


class Block:
    """A layer, with a place around all that it does, `block_out`, and its sites from where each row goes on alone.

    These `late` ones are what gives the last attention's output, and all after it.
    """

    block_out: Site
    late: tuple[Site, ...] = ()

    def __call__(self, x: Tensor, *, rows: Places | None = None, **around: object) -> Tensor:
        """What the layer makes of x (batch, time, dim): as much again, or with `rows` those alone, (rows, dim).

        So the last layer of a model is asked: what other rows would be after its attention is not computed, unless
        something is attached there that may look at rows together.
        """
        if rows is None or self._alone(rows):
            return self.block_out(x, rows=rows, **around)
        return fused.pick(self.block_out(x, rows=None, **around), rows=rows)

    def _alone(self, rows: Places) -> bool:
        return rows[0].size > 0 and all(layer.row_by_row for site in self.late for layer in site.layers)


def chosen(x: Tensor, rows: Places | None) -> Tensor:
    """x (batch, time, ...), or (rows, ...) of it where `rows` are given."""
    return x if rows is None else fused.pick(x, rows=rows)


def beside(heads: Tensor, rows: Places | None) -> Tensor:
    """(batch, heads, time, width) as (batch, time, heads * width), or as (rows, heads * width) of `rows`."""
    found = chosen(heads.transpose(0, 2, 1, 3), rows)
    *rest, count, width = found.shape
    return found.reshape(*rest, count * width)
