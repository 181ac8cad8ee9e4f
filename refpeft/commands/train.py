"""The verbs that take a configuration: train and compare."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from refpeft import choices
from refpeft.commands import options

# flag, key of the configuration, metavar, help. Values are checked with the configuration, all at once, not by click.
_FLAGS = (
    (
        "--model",
        "model",
        "PATH|ID",
        "A directory, a GGUF file or a hub id. Default: the model that ships with refpeft.",
    ),
    ("--method", "method", "NAME", "What is trained; `refpeft methods` lists them. Repeatable. Default: lora."),
    ("--quantizer", "quantizer", "NAME", "Quantize frozen weights; `refpeft quantizers` lists them."),
    ("--double-quant", "double_quant", "", "Quantize the quantizer's constants, too, as QLoRA does."),
    ("--adapter-quantizer", "adapter_quantizer", "NAME", "Save the adapter itself in this quantizer's format."),
    ("--task", "task", "|".join(choices.TASKS), "What is learned. Default: what the rows' columns and the model say."),
    ("--data", "data.file", "FILE", "Rows to train on: JSONL, JSON, CSV or TSV. Repeatable: several tasks at once."),
    ("--mix", "data.mix", "W,W,...", "How much of the rows each --data has. Default: as many as it holds."),
    ("--eval-data", "data.eval_file", "FILE", "Held-out rows; of several --data one file for each."),
    ("--replay", "data.replay", "FILE", "Rows of an earlier task, mixed in so that it is not forgotten."),
    ("--replay-share", "data.replay_share", "X", "Their share of all rows. Default: 0.1."),
    ("--earlier", "data.earlier", "FILE", "Held-out rows of an earlier task: what is forgotten of it is measured."),
    ("--fields", "data.fields", "text=COLUMN,...", "What the file calls the columns of its rows' format."),
    ("--overlong", "data.overlong", "|".join(choices.OVERLONG), "What becomes of rows that are too long."),
    ("--epochs", "train.epochs", "N", "How often all rows are seen. Default: 1."),
    ("--steps", "train.steps", "N", "Train for so many steps instead."),
    ("--lr", "train.lr", "X", "Peak learning rate."),
    ("--optimizer", "train.optimizer", "|".join(choices.OPTIMIZERS), "What turns gradients into steps."),
    ("--paged", "train.paged", "", "Keep the optimizer's state in host memory (--device cuda), or in a file (cpu)."),
    ("--batch", "train.batch", "N", "Rows of a step. Default: 8."),
    ("--length", "data.length", "N", "The most tokens of a row."),
    ("--out", "out", "DIR", "The run directory. Default: runs/<model>-<method>."),
    ("--device", "device", "|".join(choices.DEVICES), "Where to compute."),
    (
        "--dtype",
        "dtype",
        "|".join(choices.DTYPES),
        "bfloat16 keeps frozen weights in two bytes each; tf32, on a GPU, multiplies float32 faster, to ten bits.",
    ),
    ("--metric", "train.metric", "NAME", "Tells the best evaluation: accuracy, bleu, ... Default: the task's own."),
    ("--seed", "seed", "N", "The same seed gives the same bits."),
)
_REPEATABLE = ("method", "data.file", "data.eval_file")
_TEXTS = ("model", "quantizer", "adapter_quantizer", "out", "data.replay", "data.earlier")  # never read as numbers


def flags(*keys: str) -> Callable[[Callable], Callable]:
    """The flags of these keys; of all without any."""

    def add(command: Callable) -> Callable:
        for flag, key, metavar, text in reversed(_FLAGS):
            if key in (keys or (key,)):
                how = {"metavar": metavar, "multiple": key in _REPEATABLE} if metavar else {"is_flag": True}
                command = click.option(flag, key.replace(".", "_"), help=text, **how)(command)
        return click.option(
            "--set", "sets", metavar="KEY=VALUE", multiple=True, help="Any option, such as lora.r=16 or train.clip=0.5."
        )(command)

    return add


_seeds = click.option(
    "--seeds", type=click.IntRange(min=2), metavar="N",
    help="N runs, with --seed and the numbers after it, each in OUT/seed-...; mean and standard deviation.",
)  # fmt: skip


def _counts(text: str | None) -> list[int]:
    """`--shots 0,4` as numbers."""
    from refpeft.errors import RefpeftError

    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise RefpeftError(f"--shots is {text!r}: expected numbers of examples, each once, such as 0,4")
    return [int(part) for part in parts]


def said(given: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(flag, key, value) of the flags that were given."""
    found = [(flag, key, given.get(key.replace(".", "_"))) for flag, key, *_ in _FLAGS]
    return [(flag, key, _value(key, value)) for flag, key, value in found if value]


@click.command()
@click.argument("config", required=False, type=click.Path(), metavar="[RUN.TOML]")
@flags()
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run directory.")
@click.option("--dry-run", is_flag=True, help="Print the plan and do not train.")
@_seeds
@options.as_json
@options.plugins
@click.pass_context
def train(
    ctx: click.Context, config: str | None, sets: tuple[str, ...], resume: bool, dry_run: bool, seeds: int | None,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Trains a method on a model.

    Without arguments it trains LoRA on a small model and a task that ship with refpeft. RUN.TOML holds the same options
    as the flags, which win over it; --set wins over both.
    """
    from refpeft import config as configuration

    if resume and config is None and given["out"] and (Path(given["out"]) / configuration.FILE).is_file():
        config = str(Path(given["out"]) / configuration.FILE)
    resolved = configuration.resolve(config, said(given), sets)
    if dry_run:
        from refpeft import plan

        options.show(plan.plan(resolved, resume), as_json)
    elif seeds:
        ctx.exit(_train_seeds(resolved, seeds, resume, as_json))
    else:
        _train(resolved, resume, as_json)


@click.command()
@click.argument("config", required=False, type=click.Path(), metavar="[COMPARE.TOML]")
@click.option("--methods", metavar="NAMES|all", help="With commas between. Default: those that COMPARE.TOML names.")
@flags(*(key for _, key, *_ in _FLAGS if key != "method"))
@click.option(
    "--shots", metavar="K,K,...", callback=lambda ctx, option, text: _counts(text),
    help="Also ask the untrained model, with so many examples before every prompt: 0,4.",
)  # fmt: skip
@click.option(
    "--bench", is_flag=True,
    help="Only time a step of each beside LoRA's, over full rows of random tokens; --model may be a shape of `plan`.",
)  # fmt: skip
@click.option(
    "--limit", type=click.FloatRange(min=0, min_open=True), metavar="S",
    help="With --bench, leave a method that takes longer. Default: 120.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Leave what is finished in the directory, and train the rest.")
@_seeds
@options.as_json
@options.plugins
@click.pass_context
def compare(
    ctx: click.Context, config: str | None, methods: str | None, sets: tuple[str, ...], shots: list[int], bench: bool,
    limit: float | None, resume: bool, seeds: int | None, as_json: bool, out: str | None, **given: Any,
) -> None:  # fmt: skip
    """Trains several methods on the same model, data and steps, one after the other, and prints a table.

    COMPARE.TOML is a run.toml with a line for each method in a table [methods]: `dora = {lr = 5e-3, r = 4}`. Without
    another model or other data it is the embedded run's. Each method runs in a process of its own and has its own
    directory in --out; one that fails does not keep the others from running, but the exit code is 1.
    """
    from refpeft import comparing, run
    from refpeft.errors import RefpeftError

    if bench and (shots or resume or seeds):
        raise RefpeftError("--bench trains nothing to its end: leave out --shots, --seeds and --resume")
    if limit and not bench:
        raise RefpeftError("--limit is of --bench")
    directory = run.free_directory(out, "compare", resume)
    if bench:
        ctx.exit(_bench(directory, methods, config, given, sets, limit, as_json))
    resolve = partial(comparing.resolve, methods, config, said(given), sets)
    with _going_on(directory):
        if seeds:
            rows = comparing.compare_seeds(resolve, seeds, directory, resume, _aloud, shots)
        else:
            rows = comparing.compare(resolve(directory), directory, resume, _aloud, shots)
    ctx.exit(_show(directory, rows, None, as_json))


def _bench(
    directory: Path, methods: str | None, config: str | None, given: dict[str, Any], sets: Sequence[str],
    limit: float | None, as_json: bool,
) -> int:  # fmt: skip
    """Times methods and prints the table; the exit code: 1 where one failed."""
    from refpeft import comparing, timing
    from refpeft.config import EMBEDDED

    unread = [("--bench", "data.file", EMBEDDED)] if config or given["model"] else []
    if methods and timing.BESIDE not in methods.split(",") and methods != "all":
        methods = f"{timing.BESIDE},{methods}"
    resolved = comparing.resolve(methods, config, [*unread, *said(given)], sets, directory)
    steps = int(given["train_steps"] or timing.STEPS)
    rows = timing.bench(resolved, directory, steps, limit or timing.LIMIT, _aloud)
    if as_json:
        options.echo_json({"directory": str(directory), "rows": [dataclasses.asdict(row) for row in rows]})
    else:
        click.echo(timing.text(rows), nl=False)
    return 1 if any(row.error for row in rows) else 0


def _train_seeds(resolved: Any, seeds: int, resume: bool, as_json: bool) -> int:
    from refpeft import comparing, outcomes, run

    directory = run.run_directory(resolved.run, resume)
    with _going_on(directory):
        rows = comparing.compare(comparing.of_seeds(resolved, seeds, directory), directory, resume, _aloud)
    mean = outcomes.averaged("mean", rows)
    outcomes.write(directory, rows, mean)
    return _show(directory, rows, mean, as_json)


def _aloud(line: str) -> None:
    click.echo(line, err=True)


@contextlib.contextmanager
def _going_on(directory: Path) -> Iterator[None]:
    """Within it Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"stopped; go on with the same options and --resume --out {directory}", err=True)
        raise


def _show(directory: Path, rows: Sequence[Any], mean: Any, as_json: bool) -> int:
    """Prints the table of runs, and of a mean over them; the exit code: 1 where one failed."""
    from refpeft import outcomes

    if as_json:
        last = {"mean": dataclasses.asdict(mean)} if mean else {}
        found = {"directory": str(directory), "rows": [dataclasses.asdict(row) for row in rows]}
        options.echo_json(found | last)
    else:
        click.echo(outcomes.text([*rows, *([mean] if mean else [])]), nl=False)
    return 1 if any(row.error for row in rows) else 0


def _train(resolved: Any, resume: bool, as_json: bool) -> None:
    from refpeft import run

    directory = run.run_directory(resolved.run, resume)
    try:
        outcome = run.train(resolved, directory, resume, say=lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        if (directory / "checkpoints").is_dir():
            click.echo(f"stopped; go on with: refpeft train --resume --out {directory}", err=True)
        raise
    if as_json:
        options.echo_json(outcome.as_dict())
    else:
        click.echo("\n" + outcome.report.text(), nl=False)


def _value(key: str, text: Any) -> Any:
    """A flag's text as the number that it is, where it is one; what else it should be, the configuration tells."""
    if isinstance(text, tuple):
        return text[0] if len(text) == 1 and key != "method" else list(text)
    if key == "data.mix":
        return [_value("", weight) for weight in text.split(",")]
    if isinstance(text, bool):
        return text
    if key == "data.fields":
        return options.columns(text)
    for number in () if key in _TEXTS else (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
