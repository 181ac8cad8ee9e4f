"""The table of methods that `refpeft methods --markdown` prints and the README holds, made from the plugins."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from refpeft import manager, memory, shapes, sites, toml
from refpeft.errors import RefpeftError
from refpeft.layers import INPUTS
from refpeft.manager import Listing
from refpeft.models.checkpoint import Checkpoint
from refpeft.peft_formats import FORMATS, Format
from refpeft.quant import make_quantizer

SHAPE = "llama-3-8b"
NEEDED = {
    "adapterfusion": {"adapters": ["runs/a", "runs/b"]},
    "bitfit": {"create": True},
    "lora_bitfit": {"create": True},
    "s4": {"create": True},
    "spot": {"sources": ["runs/other"]},
    "trainable_tokens": {"token_indices": [0]},
}
"""The least options of methods that SHAPE cannot have at their defaults; the table names them."""

_HEAD = ("method", "family", "what it computes", "trained of Llama-3-8B", "merges", "PEFT's file", "source")
COUNT = _HEAD.index("trained of Llama-3-8B")


def markdown(listings: Iterable[Listing]) -> str:
    """The table, by families; each of its lines ends in a line break."""
    rows = [_HEAD, ["---"] * len(_HEAD), *map(cells, ordered(listings))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def ordered(listings: Iterable[Listing]) -> list[Listing]:
    """The methods as they stand in the table."""
    return [listing for group in manager.by_family(listings).values() for listing in group]


def cells(listing: Listing, counted: bool = True) -> list[str]:
    """A method's row; without `counted` its COUNT is left empty, which is faster."""
    recipe = not any(f"peft_{kind}" in listing.hooks for kind in INPUTS)  # of companions, which do what it does
    adapter = _adapter(listing) if counted or recipe else None
    form = _form(listing.name, adapter)
    merges = _all_merge(adapter) if recipe else "peft_merge" in listing.hooks
    count = f"{adapter.size:,}" if adapter else "-"
    options = ", ".join(f"`{key} = {toml.text(value)}`" for key, value in NEEDED.get(listing.name, {}).items())
    return [
        f"`{listing.name}`",
        listing.family,
        listing.summary.removesuffix(".").replace("|", "\\|"),
        (f"{count} ({options})" if options else count) if counted else "",
        "yes" if merges else "no",
        "no" if form is None else "read" if form.fitted else "yes",
        _link(listing.source),
    ]


def _form(name: str, adapter: sites.Adapter | None) -> Format | None:
    """PEFT's form of a method; of a recipe of one method that one's."""
    inside = [part for part in adapter.parts if not part.is_recipe] if adapter else []
    return FORMATS.get(inside[0].name if len(inside) == 1 else name)


def _all_merge(adapter: sites.Adapter | None) -> bool:
    return adapter is not None and all(manager.hook(layer.part.plugin, "peft_merge") for layer in adapter.layers)


def _adapter(listing: Listing) -> sites.Adapter | None:
    """What the method is on SHAPE, without weights; None where it needs options that cannot be guessed."""
    try:
        return sites.prepare(
            memory.skeleton(_checkpoint(), make_quantizer("nf4")), listing.name, NEEDED.get(listing.name)
        )
    except RefpeftError:
        return None


@functools.cache
def _checkpoint() -> Checkpoint:
    return shapes.checkpoint_of(SHAPE)


def _link(source: str) -> str:
    if source.startswith("arXiv:"):
        number = source.removeprefix("arXiv:")
        return f"[{number}](https://arxiv.org/abs/{number})"
    return f"[{source.split('/')[2]}]({source})" if source else "-"
