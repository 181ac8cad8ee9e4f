"""The verb plan: what fine-tuning a model of some shape takes."""

from __future__ import annotations

from typing import Any

import click

from refpeft.commands import options
from refpeft.commands.train import flags, said

# What it takes of the flags of `train`, and what it has in their place: a shape has no files that say more.
_PLANNED = (
    "task",
    "method",
    "quantizer",
    "double_quant",
    "train.optimizer",
    "train.paged",
    "train.batch",
    "data.length",
    "device",
    "dtype",
)
_DEFAULTS = {"dtype": "bfloat16", "train.batch": 1}
_POSITIVE = click.FloatRange(min=0, min_open=True)
_SHARE = click.FloatRange(min=0, max=1, min_open=True)
_LENGTH = 512  # or what the model was made for, where that is less
_ALL_LINEAR = ("lora", "loftq")  # they are planned on all linear layers, as QLoRA trains them (arXiv:2305.14314)


@click.command()
@click.option("--shape", required=True, metavar="NAME|PATH", help="llama-65b, ... or a config.json.")
@click.option("--r", "rank", type=click.IntRange(min=1), metavar="N", help="The method's rank: short for --set.")
@flags(*_PLANNED)
@click.option("--on", "named", metavar="DEVICE", help="Print the time of a step on a100, h100, rtx4090, ...")
@click.option("--tflops", type=_POSITIVE, metavar="X", help="... or on a device of this peak.")
@click.option("--utilisation", type=_SHARE, metavar="X", help="The share of the peak that is reached. Default: 0.4.")
@options.as_json
@options.plugins
def plan(
    shape: str, rank: int | None, sets: tuple[str, ...], named: str | None, tflops: float | None,
    utilisation: float | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Prints what fine-tuning a model of some shape takes: memory by part, computation, time, what is trained.

    Neither model nor data is needed. Unless told otherwise, LoRA is planned on all linear layers, weights that are not
    quantized in bfloat16, and a step of one row of 512 tokens. Products of matrices are counted as this implementation
    makes them, 2 operations for two numbers that are multiplied; the time is that of these products alone.
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
    resolved = configuration.resolve(None, [*defaults, *chosen, *said(given)], sets)
    options.show(planning.plan_shape(resolved, _speed(named, tflops, utilisation)), as_json)


def _speed(named: str | None, tflops: float | None, utilisation: float | None) -> Any:
    """The cost.Speed that the flags say; None where they say none."""
    from refpeft import cost
    from refpeft.errors import RefpeftError, nearest

    if named and tflops:
        raise RefpeftError("--on and --tflops both say how fast the device is: give one of them")
    if named and named not in cost.DEVICES:
        hint = nearest(named, cost.DEVICES) or f"; there are {', '.join(cost.DEVICES)}"
        raise RefpeftError(f"--on {named}: no device of this name is known{hint}; --tflops takes any other's peak")
    if not (named or tflops):
        if utilisation:
            raise RefpeftError("--utilisation is a share of a device's peak: give --on or --tflops, too")
        return None
    return cost.Speed(tflops or cost.DEVICES[named], utilisation or cost.UTILISATION, named)
