"""The verb plan: what fine-tuning a model of some shape takes."""

from __future__ import annotations

from typing import Any

import click

from refpeft.commands import options
from refpeft.commands.train import flags, said

# What it takes of the flags of `train`, and what it has in their place: a shape has no files that say more.
_PLANNED = (
    "method",
    "quantizer",
    "double_quant",
    "train.optimizer",
    "train.paged",
    "train.batch",
    "data.length",
    "dtype",
)
_DEFAULTS = {"dtype": "bfloat16", "train.batch": 1}
_LENGTH = 512  # or what the model was made for, where that is less
_ALL_LINEAR = ("lora", "loftq")  # they are planned on all linear layers, as QLoRA trains them (arXiv:2305.14314)


@click.command()
@click.option("--shape", required=True, metavar="NAME|PATH", help="llama-65b, ... or a config.json.")
@click.option("--r", "rank", type=click.IntRange(min=1), metavar="N", help="The method's rank: short for --set.")
@flags(*_PLANNED)
@options.as_json
@options.plugins
def plan(shape: str, rank: int | None, sets: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Prints the memory that fine-tuning a model of some shape takes, by part. Neither model nor data is needed.

    Unless told otherwise, LoRA is planned on all linear layers, weights that are not quantized in bfloat16, and a step
    of one row of 512 tokens.
    """
    from refpeft import config as configuration
    from refpeft import plan as planning
    from refpeft import shapes

    methods = given["method"] or ("lora",)
    length = min(_LENGTH, shapes.checkpoint_of(shape).config.context)
    keys = (
        _DEFAULTS
        | {"data.length": length}
        | {f"{method}.targets": "all-linear" for method in methods if method in _ALL_LINEAR}
    )
    defaults = [("refpeft plan", key, value) for key, value in keys.items()]
    chosen = [("--shape", "model", shape), ("--shape", "data.file", configuration.EMBEDDED)]  # no row is read
    chosen += [("--r", f"{methods[0]}.r", rank)] if rank else []
    options.show(planning.plan_shape(configuration.resolve(None, [*defaults, *chosen, *said(given)], sets)), as_json)
