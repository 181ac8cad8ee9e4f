"""The verb that writes a model with quantized weights: quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from refpeft.commands import options


@click.command()
@click.argument("model")
@click.argument("out")
@click.option("--quantizer", required=True, metavar="NAME", help="`refpeft quantizers` lists them.")
@click.option("--double-quant", is_flag=True, help="Quantize the quantizer's constants, too, as QLoRA does.")
@click.option("--compat", metavar="bnb-cpu|bnb-cuda", help="Round as bitsandbytes does there.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="What all weights are made before. Default: each stays what it is.",
)
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="An option of the quantizer, as nf4.block=128.")
@options.as_json
@options.plugins
def quantize(
    model: str, out: str, quantizer: str, double_quant: bool, compat: str | None, dtype: str | None,
    sets: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Writes MODEL with quantized linear weights to the directory OUT.

    MODEL is a directory, a GGUF file, a hub id or "embedded". One weight at a time is in memory. What nf4, fp4 and int8
    make is loaded by transformers with bitsandbytes.
    """
    from refpeft import config, report
    from refpeft.errors import RefpeftError
    from refpeft.models import saving
    from refpeft.models.checkpoint import open_checkpoint
    from refpeft.models.hub import resolve
    from refpeft.quant import make_quantizer

    if Path(out).exists():
        raise RefpeftError(f"{out} exists: models are not written over anything; choose another OUT")
    for text in sets:
        if not text.startswith(f"{quantizer}."):
            raise RefpeftError(f"--set {text}: expected an option of the quantizer, {quantizer}.KEY=VALUE")
    flags = [("--quantizer", "quantizer", quantizer)]
    if compat:
        flags.append(("--compat", f"{quantizer}.compat", compat))
    resolved = config.resolve(None, flags, sets)
    chosen = make_quantizer(resolved.run.quantizer, resolved.options.get(resolved.run.quantizer), double_quant)
    checkpoint = open_checkpoint(resolve(model))
    with _progress(len(checkpoint.names)) as listen:
        made = saving.quantize(checkpoint, out, chosen, dtype, listen)
    after = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    if as_json:
        found = {"model": model, "out": out, "quantizer": str(chosen), "bits": made.bits, "relative_rmse": made.error}
        options.echo_json(found | {"bytes_before": checkpoint.nbytes, "bytes_after": after})
        return
    click.echo(f"{model} as {chosen}, in {out}:")
    click.echo(
        f"{made.bits:.3f} bits a quantized weight, relative RMSE {made.error:.4g}; "
        f"{report.size(checkpoint.nbytes)} before, {report.size(after)} after"
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """To be called with each of so many tensors' names: a bar on a terminal, else a line for each tenth of them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    console, names = Console(stderr=True), []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def listen(name: str) -> None:
            names.append(name)
            progress.update(task, description=name, completed=len(names))
            if not console.is_terminal and len(names) % max(1, total // 10) == 0:
                click.echo(f"{len(names)}/{total} {name}", err=True)

        yield listen
