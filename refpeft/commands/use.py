"""The verbs that use a model or an adapter: eval, merge, export."""

from __future__ import annotations

from typing import Any

import click

from refpeft import choices
from refpeft.commands import options


@click.command("eval")
@options.model
@click.option("--data", metavar="FILE", help="Rows to evaluate on; else the adapter's run's held-out rows.")
@click.option("--format", "kind", metavar="NAME", help="The format of the rows; else it is told from their columns.")
@click.option("--length", type=click.IntRange(min=2), metavar="N", help="The most tokens of a row.")
@click.option(
    "--overlong",
    type=click.Choice(choices.OVERLONG),
    help="What becomes of longer rows. Default: as in the adapter's run, or error.",
)
@options.task
@options.labels
@options.fields
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Also this metric, such as bleu. Repeatable.")
@click.option("--shots", type=click.IntRange(min=0), metavar="K", help="Show K examples before every prompt.")
@click.option("--shots-from", metavar="FILE", help="The training file that they are rows of.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which of them.")
@click.option("--rows", "most", type=click.IntRange(min=1), metavar="N", help="With --shots, the first N rows alone.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, metavar="N")
@options.as_json
@options.plugins
def evaluate(
    model: str | None, adapter: str | None, data: str | None, kind: str | None, length: int | None,
    overlong: str | None, fields: dict[str, str], metrics: tuple[str, ...], shots: int | None, shots_from: str | None,
    seed: int, most: int | None, batch: int, as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Gives the loss, and the metrics of the task, on a data file; rows become tokens as in the adapter's run.

    With --shots it is the baseline of fine-tuning, in-context learning: the model, untouched or with an adapter, sees K
    examples before every prompt. Of texts with labels it is asked for the label's name, the likeliest of which counts.
    """
    from refpeft import config, evaluation, inputs, tasks
    from refpeft import shots as in_context
    from refpeft.batches import Batches
    from refpeft.errors import RefpeftError

    loaded = options.load(model, adapter, **how)
    configured = config.run_of(adapter)
    if not (data or (configured and shots is None)):
        raise RefpeftError("there is no data: give --data FILE")
    if shots is None and (shots_from or most or seed):
        raise RefpeftError("--shots-from, --seed and --rows say what --shots shows: give it, too")
    if shots is not None:
        asked = {"kind": kind, "fields": fields, "length": length, "overlong": overlong or "error", "batch": batch}
        asked |= {"names": metrics, "most": most, "seed": seed}
        _tell(*in_context.evaluate(loaded, data, shots_from, shots, **asked), True, as_json)
        return
    configured = configured or config.RunConfig()
    given = {"format": kind, "fields": fields, "length": length, "overlong": overlong}
    changes = {key: value for key, value in given.items() if value}
    if data:
        changes = {"eval_file": data, "format": "auto"} | changes
    elif configured.data.eval_share and changes:  # drawn from rows that are read differently, the share would be others
        raise RefpeftError(f"the run held out a share of its own rows: give --data FILE to set {', '.join(changes)}")
    configured = configured.model_copy(update={"data": configured.data.model_copy(update=changes)})
    if loaded.task is None:
        raise RefpeftError(f"this {loaded.config.family} model has no head to evaluate: give an adapter that has one")
    how = {"labels": loaded.labels, "supervise": configured.data.supervise}
    how |= {"highest_score": configured.data.highest_score, "class_weights": configured.train.class_weights}
    task = tasks.make(loaded.task, loaded.tokenizer, loaded.config, **how)
    rows = inputs.held_out_rows(configured, loaded.config, task)
    if rows is None:
        raise RefpeftError("the run held no rows out: give --data FILE")
    names = evaluation.names_of(task, rows, [*configured.train.metrics, *metrics], configured.train.metric)
    length = inputs.row_length(configured.data.length, loaded.config)
    how = {"batch": batch, "length": length, "seed": configured.seed, "shuffle": False}
    scores = evaluation.of_rows(loaded, rows, lambda one: Batches(one.examples, **how), task, names)()
    _tell(scores, rows, task.outputs in ("texts", "loss"), as_json)


def _tell(scores: dict[str, float], rows: Any, of_texts: bool, as_json: bool) -> None:
    """Prints the scores of rows, of texts with their perplexity."""
    import math

    from refpeft.errors import RefpeftError

    loss = scores.pop("loss")
    if not math.isfinite(loss):
        raise RefpeftError(f"the loss is {loss}: weights of the model, or of the adapter, are not finite numbers")
    found = {"eval_loss": loss} | scores | {"rows": rows.summary.rows}
    if of_texts:
        found["perplexity"] = math.exp(min(loss, 700))
    found |= {"tokens": rows.summary.tokens, "supervised_tokens": rows.summary.supervised_tokens}
    if as_json:
        options.echo_json(found)
    else:
        click.echo("\n".join(rows.summary.lines()), err=True)
        counts = ("eval_loss", "rows", "tokens", "supervised_tokens")
        told = [f"{name} {value:.4g}" for name, value in found.items() if name not in counts]
        click.echo(", ".join([f"loss {loss:.4f}", *told]))


@click.command()
@click.option("--adapter", required=True, metavar="DIR", help="An adapter directory, such as a run's.")
@click.option("--model", metavar="PATH|ID", help="Where the adapter's model is. Default: where its run had it.")
@click.option("--out", required=True, metavar="DIR", help="Where the merged model goes; must not exist.")
@click.option(
    "--into",
    type=click.Choice(choices.INTO),
    help="For a run on quantized weights: into those, dequantized (the default) or quantized again, or into the "
    "model's own.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--data", metavar="FILE", help="Rows to measure the merged model on. Default: the run's held-out rows.")
@click.option("--force", is_flag=True, help="Write the merged model even if it is another one than the run's.")
@options.as_json
@options.plugins
def merge(adapter: str, out: str, as_json: bool, **how: Any) -> None:
    """Folds an adapter into its model and writes a model directory that needs no adapter.

    The files are compared with the run, over held-out rows, before they get their name. A model that says something
    else is not written: bfloat16 and quantized weights cannot hold every small change.
    """
    import dataclasses

    from refpeft import merging

    merged = merging.merge(adapter, out, **how)
    if as_json:
        options.echo_json(dataclasses.asdict(merged))
    else:
        click.echo("\n".join(merged.lines()))


@click.command()
@click.option("--adapter", required=True, metavar="DIR", help="An adapter directory, such as a run's.")
@click.option("--model", metavar="PATH|ID", help="The adapter's model. Default: where its run had it.")
@click.option("--out", required=True, metavar="DIR", help="Where the files go; must not exist.")
@click.option("--name", default="refpeft", show_default=True, help="The adapter's name in AdapterHub.")
@options.plugins
def export(adapter: str, model: str | None, out: str, name: str) -> None:
    """Writes a bottleneck adapter in the form of AdapterHub's library.

    There, `model.load_adapter(DIR, use_safetensors=True)` reads it. PEFT's methods need no export: adapters of runs are
    in its form already.
    """
    from pathlib import Path

    from refpeft import adapterhub
    from refpeft.errors import RefpeftError

    if Path(out).exists():
        raise RefpeftError(f"{out} exists: choose another --out")
    loaded = options.load(model, adapter, None, False, None, "cpu")
    if len(loaded.adapters) > 1:
        names = ", ".join(one.name for one in loaded.adapters)
        raise RefpeftError(f"{adapter} holds {names}: give the directory of one of them")
    adapterhub.save(out, loaded, loaded.adapters[0], name)
    click.echo(f"{out} is {adapter} as AdapterHub's adapter {name!r}")
