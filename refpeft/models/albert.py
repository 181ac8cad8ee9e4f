"""ALBERT (Lan et al., 2019, arXiv:1909.11942): an encoder that runs the same layers several times.

A layer that is run several times is one set of sites: an adapter acts in every run, and its gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from refpeft import fused
from refpeft.backend import Array
from refpeft.models.albert_config import FAMILY, WIDEN, AlbertConfig
from refpeft.models.base import Cache, Frozen
from refpeft.models.block import Places
from refpeft.models.encoder import Encoder
from refpeft.models.encoder_config import PREFIX
from refpeft.tensor import Tensor


class Albert(Encoder):
    """An encoder with shared layers, without a head."""

    def __init__(self, config: AlbertConfig, weights: Callable[..., Frozen], dtype: np.dtype, xp: ModuleType = np):
        super().__init__(config, weights, dtype, xp)
        self.widen = self.linear(PREFIX[FAMILY] + WIDEN, "embed_proj", bias=True)
        for site in self.sites.values():
            site.runs = 1 if site.index is None else config.order.count(site.index)

    def trunk(
        self,
        ids: Array,
        positions: Array | None,
        segments: Array | None,
        cache: Cache | None,
        types: Array | None = None,
        rows: Array | None = None,
    ) -> Tensor:
        hidden, virtual = self.tokens(ids, positions, types, cache)
        hidden = self.widen(self.first_norm(hidden))
        mask = fused.Mask(ids.shape[1], None, segments, causal=False, padded=positions is None)
        places, last = self.places(rows, ids, virtual), len(self.config.order) - 1
        for number, group in enumerate(self.config.order):
            wanted = places if number == last else None
            hidden = self.run(self._layer, hidden, number=number, group=group, rows=wanted, mask=mask)
        return hidden if places else self.of_text(hidden, virtual)

    def _layer(self, x: Tensor, *, number: int, group: int, rows: Places | None, mask: fused.Mask) -> Tensor:
        self.mode.run = number  # dropout: another mask in each run of a layer, the same one when it is recomputed
        y = self.layers[group](x, rows=rows, mask=mask, cache=None)
        self.mode.run = 0
        return y
