"""A look at the training data before the first step, for methods that let it decide what they train."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import manager, sites
from .backend import Array, xp_of
from .batches import Batch, Batches, split
from .config import Train as Settings
from .errors import RefpeftError
from .layers import Layer
from .models.base import Model
from .sites import Adapter, Site
from .tensor import Tensor, no_grad


class Survey:
    """What a plugin's `peft_survey` may ask of the model and the training data.

    Rows come in the order of training, again from the start where there are too few. Everything that is attached to the
    model is taken off meanwhile, but for `own_gradients`. `settings` are those of the run.
    """

    def __init__(self, model: Model, adapter: Adapter, batches: Batches, settings: Settings, seed: int):
        self.model, self.adapter, self.batches = model, adapter, batches
        self.settings, self.seed = settings, seed

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.batches.rows)

    @property
    def steps(self) -> int:
        """How many steps the run will make."""
        return self.settings.total_steps(self.batches.steps_per_epoch)

    def gradients(self, chosen: Sequence[Site], rows: int) -> Iterator[dict[str, Array]]:
        """For each of `rows` rows, the gradient of its mean loss by each site's dense weight, by the site's name."""
        with self._alone("full", {"targets": [site.name for site in chosen], "tie": False}) as full:
            for row in self._rows(rows):
                yield _gradients(self.model, row, {site.name: full.params[f"{site.name}.weight"] for site in chosen})

    def own_gradients(self, rows: int) -> Iterator[dict[str, Array]]:
        """For each of `rows` rows, the gradient of its mean loss by what the method trains, by the parameter's name."""
        for row in self._rows(rows):
            yield _gradients(self.model, row, self.adapter.params)

    def inputs(self, chosen: Sequence[Site], batches: int) -> Iterator[dict[str, Array]]:
        """For each of `batches` batches, what linear layers read: (tokens, in) without padding, by the site's name.

        Layers that read the same, such as those of queries and keys, have one array; of a layer that is run several
        times it has all that it reads. Raises RefpeftError for the head, which is not run.
        """
        if self.model.head in chosen:
            raise RefpeftError(f"what {self.model.head.name} reads is not looked at: leave it out of the targets")
        seen: dict[str, list[Array]] = {}
        with sites.bypassed(self.model), _listening(chosen, seen), no_grad():
            for step in range(batches):
                batch = self.batches.at(step)
                self.model.states(batch, batch.asked)
                once: dict[tuple[int, ...], Array] = {}
                for site in chosen:
                    key = tuple(map(id, seen[site.name]))
                    once[key] = self._at_tokens(site, seen[site.name], batch) if key not in once else once[key]
                yield {name: once[tuple(map(id, runs))] for name, runs in seen.items()}
                seen.clear()

    def _at_tokens(self, site: Site, runs: list[Array], batch: Batch) -> Array:
        """What a layer read at real tokens in all its runs: (tokens, in).

        In T5's decoder these are the tokens that are said, but for what it asks the encoder. What layers of DeBERTa
        read beside texts, embeddings of distances, is left out, unless they read nothing else.
        """
        xp, shape = self.model.xp, batch.ids.shape
        real = np.arange(batch.ids.size) if batch.segments is None else np.flatnonzero(batch.segments >= 0)
        if site.home.startswith("decoder.") and not {"cross_k", "cross_v"} & set(site.roles):
            shape, real = batch.said.shape, batch.asked
        texts = [x.reshape(-1, x.shape[-1])[xp.asarray(real)] for x in runs if x.shape[:2] == shape]
        return xp.concatenate(texts or [x.reshape(-1, x.shape[-1]) for x in runs])

    def changes(self, chosen: Sequence[Site], steps: int, lr: float, **options: Any) -> dict[str, Array]:
        """By how much `steps` steps of training in full change the dense weight of each site, by the site's name.

        The biases of these sites are trained too. `options` are those of the method `full`; else see `trained`.
        """
        options |= {"targets": [site.name for site in chosen], "tie": False}
        with self.trained("full", options, steps, lr) as full:
            return {site.name: full.params[f"{site.name}.weight"].data - site.weight() for site in chosen}

    @contextlib.contextmanager
    def trained(self, method: str, config: Any, steps: int, lr: float) -> Iterator[Adapter]:
        """Within it nothing is attached but this method, trained for `steps` steps.

        `config` is its Config, or a dict of options. AdamW with a constant learning rate and no weight decay.
        """
        from .trainer import Trainer

        alone = dict.fromkeys(("eval_every", "save_every", "early_stop"))
        alone |= {"best": False, "warmup": 0, "l2_sp": 0, "kl": 0}
        settings = self.settings.model_copy(
            update=alone | {"steps": steps, "lr": lr, "optimizer": "adamw", "weight_decay": 0.0, "schedule": "constant"}
        )
        with self._alone(method, config) as adapter:
            adapter.settled = True
            Trainer(self.model, self.batches, None, settings, seed=self.seed).run()
            yield adapter

    @contextlib.contextmanager
    def _alone(self, method: str, config: Any) -> Iterator[Adapter]:
        """Within it nothing is attached but this method."""
        with sites.bypassed(self.model):
            adapter = sites.attach(self.model, method, config)
            try:
                yield adapter
            finally:
                sites.detach(self.model, adapter)

    def _rows(self, count: int) -> Iterator[Batch]:
        """One row after another, each a batch."""
        step = 0
        while count > 0:
            rows = split(self.batches.at(step), 1)[:count]
            yield from rows
            step, count = step + 1, count - len(rows)


def settle(model: Model, batches: Batches, settings: Settings, seed: int) -> None:
    """Lets the training data decide what the attached methods leave to them (the hook peft_survey)."""
    for adapter in waiting(model):
        for part in adapter.parts:
            layers = [layer for layer in adapter.layers if layer.part is part]
            survey = Survey(model, adapter, batches, settings, seed)
            rng = model.stream(seed, "survey", adapter.name, part.name)
            found = part.call("peft_survey", layers=layers, survey=survey, rng=rng) or {}
            _put(model, adapter, layers, found)
        adapter.settled = True


def waiting(model: Model) -> list[Adapter]:
    """The adapters of which the data have to decide something."""
    return [adapter for adapter in model.adapters if not adapter.settled and _asks(adapter)]


def _asks(adapter: Adapter) -> bool:
    return any(manager.hook(part.plugin, "peft_survey") for part in adapter.parts)


def shapes(adapter: Adapter) -> dict[str, list[int]] | None:
    """The shapes of all values by name, which a file must tell; None where no method lets the data decide them."""
    return {name: list(value.shape) for name, value in _values(adapter).items()} if _asks(adapter) else None


def reshape(adapter: Adapter, told: Any, most: int) -> None:
    """Gives an adapter that is not on a model the shapes that `shapes` told of another; sites without any are left out.

    Raises RefpeftError for what cannot be shapes of this method's values, and for more than `most` numbers in one.
    """
    values = _values(adapter)
    if not isinstance(told, dict) or not told:
        raise RefpeftError("expected 'shapes', which the training data had decided")
    for name, shape in told.items():
        known = name in values and isinstance(shape, list) and len(shape) == len(values[name].shape)
        if not known or not all(isinstance(n, int) and 0 <= n <= most for n in shape) or math.prod(shape) > most:
            raise RefpeftError(f"shapes has {name!r} as {shape}, which this method has not")
        values[name].data = xp_of(values[name].data).zeros(shape, values[name].dtype)
    for layer in list(adapter.layers):
        if not any(f"{layer.site.name}.{key}" in told for key in layer.values):
            _leave_out(adapter, layer)


def _values(adapter: Adapter) -> dict[str, Tensor]:
    return adapter.params | adapter.constants


def values(adapters: Sequence[Adapter]) -> dict[str, Array]:
    """All values of these adapters by name, to be kept."""
    return {
        f"{number}.{name}": tensor.data
        for number, adapter in enumerate(adapters)
        for name, tensor in _values(adapter).items()
    }


def restore(model: Model, adapters: Sequence[Adapter], kept: dict[str, Array]) -> None:
    """Puts back what `values` gave of the same adapters after they were settled."""
    for number, adapter in enumerate(adapters):
        found: dict[str, Any] = {}
        for layer in adapter.layers:
            names = {key: f"{number}.{layer.site.name}.{key}" for key in layer.values}
            there = {key: kept[name] for key, name in names.items() if name in kept}
            found[layer.site.name] = there or None
        _put(model, adapter, list(adapter.layers), found)
        adapter.settled = True


def _put(model: Model, adapter: Adapter, layers: Sequence[Layer], found: dict[str, Any]) -> None:
    """Gives layers their values, by the site's name and theirs; takes those off their sites that get None."""
    for layer in layers:
        given = found.get(layer.site.name, {})
        if given is None:
            layer.take_off(model)
            _leave_out(adapter, layer)
            continue
        for key, array in given.items():
            value = layer.values[key]
            value.data = model.place(array, value.dtype)


def _leave_out(adapter: Adapter, layer: Layer) -> None:
    adapter.layers.remove(layer)
    for key, value in layer.values.items():
        adapter.kind(value).pop(f"{layer.site.name}.{key}", None)


def _gradients(model: Model, batch: Batch, tensors: dict[str, Tensor]) -> dict[str, Array]:
    """The gradients of the batch's mean loss by these leaves; zeros of those that it does not depend on."""
    for tensor in tensors.values():
        tensor.node.grad = None
    model.loss(batch).backward()
    found = {name: model.xp.zeros_like(t.data) if t.grad is None else t.grad for name, t in tensors.items()}
    for tensor in tensors.values():
        tensor.node.grad = None
    return found


class _Listener:
    """In the place of a Layer: notes what the site reads."""

    row_by_row = False  # it is to read all rows

    def __init__(self, name: str, seen: dict[str, list[Array]]):
        self.name, self.seen = name, seen

    def around(self, inner: Any) -> Any:
        def call(x: Tensor, **keywords: Any) -> Tensor:
            self.seen.setdefault(self.name, []).append(x.data)
            return inner(x, **keywords)

        return call


@contextlib.contextmanager
def _listening(chosen: Sequence[Site], seen: dict[str, list[Array]]) -> Iterator[None]:
    """Within it, what each of these sites reads is added to `seen`, by its name."""
    for site in chosen:
        site.layers.append(_Listener(site.name, seen))
        site.compose()
    try:
        yield
    finally:
        for site in chosen:
            site.layers.pop()
            site.compose()
