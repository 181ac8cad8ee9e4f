"""The configuration of a run: one TOML file, flags above it, `--set key=value` above those.

`resolve` checks everything at once and raises one RefpeftError with a line for every mistake, each with the place that
it came from. Every value remembers its origin (`run.toml:7`, `--lr`, `--set lora.r`), which the plan shows.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from refpeft import manager, toml
from refpeft.choices import TF32_ON_THE_HOST
from refpeft.errors import RefpeftError, nearest
from refpeft.files import expanded
from refpeft.optim import OPTIMIZERS, OPTIONS
from refpeft.settings import EMBEDDED, STRICT, Data, RunConfig, Train, listed
from refpeft.targets import check_effects

FILE = "run.toml"  # in a run directory: the whole configuration of the run
EMBEDDED_RUN = Path(__file__).parent / "embedded" / FILE  # what `refpeft train` does when it is given nothing


@dataclasses.dataclass(frozen=True)
class Value:
    """One given value and where it came from: "run.toml:7" (its line is 7), "--lr", "--set lora.r"."""

    value: Any
    origin: str
    line: int = 0


class Problems:
    """Every mistake found so far; `finish` raises them together: the file's first, by line, then those of flags."""

    def __init__(self) -> None:
        self._found: list[tuple[float, str]] = []

    def add(self, where: Value | None, message: str) -> None:
        line = where.line if where and where.line else math.inf
        self._found.append((line, f"{where.origin}: {message}" if where and where.origin else message))

    def finish(self) -> None:
        if self._found:
            raise RefpeftError("\n".join(message for _, message in sorted(self._found, key=lambda found: found[0])))


_UNSET = Value(None, "")
Layer = dict[str, Value]  # by key: "seed" of the top level, or "train.lr"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A checked configuration: `options` holds each chosen plugin's Config by name, `origins` where a key was given."""

    run: RunConfig
    options: dict[str, Any]
    origins: dict[str, str]

    def values(self) -> dict[str, Any]:
        """Every value by key, defaults included, in the order of run.toml."""
        tables = {"data": self.run.data, "train": self.run.train}
        found = {name: getattr(self.run, name) for name in RunConfig.model_fields if name not in tables}
        for table, model in tables.items():
            found |= {f"{table}.{name}": getattr(model, name) for name in type(model).model_fields}
        for table, options in self.options.items():
            fields = dataclasses.fields(options) if options else ()  # a plugin without a Config has none
            found |= {f"{table}.{field.name}": getattr(options, field.name) for field in fields}
        return found


def resolve(
    file: str | Path | None = None, flags: Iterable[tuple[str, str, Any]] = (), sets: Iterable[str] = ()
) -> Resolved:
    """The configuration of a run. `flags` are (flag, key, value); `sets` are "key=value", a value TOML or a bare word.

    Raises RefpeftError with one line for every mistake."""
    problems = Problems()
    files = [read_layer(file)] if file else []
    above = {key: Value(value, flag) for flag, key, value in flags} | read_sets(sets, problems)
    if all(_layered([*files, above]).get(key, _UNSET).value in (EMBEDDED, None) for key in ("model", "data.file")):
        files.insert(0, read_layer(EMBEDDED_RUN, "embedded/run.toml"))
    given = _layered([*files, above])
    chosen = _plugins(given, problems)
    for layer in files:  # a file's own plugins that a layer above replaced: their tables stay unread
        unused = set(_names(layer)) - set(chosen)
        given = {k: v for k, v in given.items() if v is not layer.get(k) or k.partition(".")[0] not in unused}

    run, tables = _run(given, chosen, problems)
    options = {name: _options(name, plugin, tables[name], given, problems) for name, plugin in chosen.items()}
    _check_paths(given, problems)
    if run:
        _cross_checks(run, given, problems)
    problems.finish()
    return Resolved(run, options, {key: value.origin for key, value in given.items()})


def plugin_options(plugin: ModuleType, values: Mapping[str, Any]) -> Any:
    """The plugin's Config with `values`, checked as in a run; one RefpeftError names every mistake."""
    problems = Problems()
    name = plugin.__name__.rpartition(".")[2]
    given = {f"{name}.{key}": Value(value, "") for key, value in values.items()}
    options = _options(name, plugin, dict(values), given, problems)
    problems.finish()
    return options


def written(directory: str | Path | None) -> dict[str, Any]:
    """What the run.toml of a run directory says; {} where there is none."""
    return toml.read(Path(directory) / FILE)[0] if run_of(directory) else {}


def run_of(directory: str | Path | None) -> RunConfig | None:
    """The run that a directory is of, from its run.toml; None where there is none. Its files may have gone since.

    It may be a stranger's, so the quantizer in it must be one that is known, not a file beside it.
    """
    file = Path(directory) / FILE if directory else None
    if not file or not file.is_file():
        return None
    given, problems = read_layer(file), Problems()
    run, _ = _run(given, dict.fromkeys(_names(given)), problems)
    problems.finish()
    if run.quantizer:
        manager.path_of(run.quantizer, "quantizer")
    return run


def to_toml(resolved: Resolved) -> str:
    """The whole configuration, defaults included, as the text of a TOML file that gives it again."""
    lines, table = [], ""
    for key, value in resolved.values().items():
        section, _, name = key.rpartition(".")
        if section != table:
            table = section
            lines += ["", f"[{table}]"]
        if value is not None:
            lines.append(f"{name} = {toml.text(value)}")
    return "\n".join(lines) + "\n"


# ---- reading the layers ----


def read_layer(file: str | Path, called: str = "") -> Layer:
    """The values of a TOML file by key, with their lines; messages name it as it is `called`."""
    tree, lines = toml.read(file)
    layer = {}
    for name, value in tree.items():
        is_table = isinstance(value, dict) and value
        for key, inner in ((f"{name}.{k}", v) for k, v in value.items()) if is_table else [(name, value)]:
            line = lines.get(key) or lines.get(name, 1)
            layer[key] = Value(inner, f"{called or file}:{line}", line)
    return layer


def _layered(layers: Iterable[Layer]) -> Layer:
    """All values; those of later layers win."""
    return {key: value for layer in layers for key, value in layer.items()}


def read_sets(sets: Iterable[str], problems: Problems) -> Layer:
    """The values of `--set key=value`."""
    layer = {}
    for text in sets:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)?", key):
            problems.add(None, f"--set {text}: expected key=value, such as train.lr=1e-3 or lora.r=16")
            continue
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            parsed = value  # a bare word
        layer[key] = Value(parsed, f"--set {key}")
    return layer


# ---- checking ----


def _names(layer: Layer) -> list[str]:
    """The plugins that a layer chooses, in its own words: nothing is checked yet."""
    values = [layer[key].value for key in ("method", "quantizer", "adapter_quantizer") if key in layer]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in names if isinstance(name, str)]


def _plugins(given: Layer, problems: Problems) -> dict[str, ModuleType]:
    """The chosen plugins, imported, by name."""
    chosen = {}
    method = given.get("method", Value(RunConfig.model_fields["method"].default, ""))
    quantizer, of_adapter = (given.get(key, _UNSET) for key in ("quantizer", "adapter_quantizer"))
    for kind, given_names in (("method", method), ("quantizer", quantizer), ("quantizer", of_adapter)):
        for name in _names({kind: given_names}):
            try:
                manager.path_of(name, kind)
                if name in chosen and given_names is not of_adapter:
                    raise RefpeftError(f"{kind} {name!r} is named twice")
                chosen[name] = manager.load(name)
            except RefpeftError as error:
                problems.add(given_names, str(error))
    return chosen


def _run(
    given: Layer, chosen: Mapping[str, Any], problems: Problems
) -> tuple[RunConfig | None, dict[str, dict[str, Any]]]:
    """(the run, None where a value is wrong; the given values by table)."""
    tables = _tables(given, chosen, problems)
    values = tables[""] | {name: tables[name] for name in ("data", "train")}
    return _validate(RunConfig, values, "", given, problems), tables


def _tables(given: Layer, chosen: Mapping[str, Any], problems: Problems) -> dict[str, dict[str, Any]]:
    """The given values by table ("" is the top level). A table that nothing reads is a mistake, once."""
    tables: dict[str, dict[str, Any]] = {"": {}, "data": {}, "train": {}} | {name: {} for name in chosen}
    reported = set()
    for key, value in given.items():
        table, dot, name = key.rpartition(".")
        if not dot and isinstance(value.value, dict) and key not in RunConfig.model_fields:  # an empty table
            table, name = key, ""
        if table in tables:
            if name:
                tables[table][name] = value.value
        elif table not in reported:
            reported.add(table)
            if table in manager.find():
                if len(chosen) < len(_names(given)):
                    continue  # a name is misspelled, which has been said: this table may be its own
                why = f"plugin {table!r} is not chosen (this run has {', '.join(chosen) or 'none'})"
            else:
                why = f"unknown table [{table}]{nearest(table, [*tables, *manager.find()])}"
            problems.add(value, why)
    for name in ("data", "train"):
        if name in tables[""]:
            value = tables[""].pop(name)
            if value != {}:
                problems.add(given[name], f"{name} is {value!r}: expected a table [{name}]")
    return tables


def _validate(model: type[BaseModel], values: dict, table: str, given: Layer, problems: Problems) -> BaseModel | None:
    """An instance of `model`, or None and a problem for every key that is wrong."""
    try:
        # JSON, because TOML has JSON's types: in pydantic's JSON mode a list is a tuple, too, however strict it is.
        return model.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        wrong: dict[str, list[Any]] = {}
        for detail in error.errors(include_url=False):
            depth = 2 if not table and detail["loc"][0] in ("data", "train") else 1
            key = ".".join([*([table] if table else []), *map(str, detail["loc"][:depth])])
            wrong.setdefault(key, []).append(detail)
        for key, details in wrong.items():
            where = given.get(key)
            if details[0]["type"] == "extra_forbidden":
                message = _unknown(key, model)
            else:
                expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
                message = f"{key} is {toml.text(where.value) if where else 'missing'}: expected {expected}"
                if details[0]["type"] == "literal_error" and isinstance(where.value, str):
                    message += nearest(where.value, re.findall(r"'([^']*)'", expected))
            problems.add(where, message)
        return None


def _unknown(key: str, model: type[BaseModel]) -> str:
    """The message for a key that its table does not have: the nearest name, or the table that has it."""
    table, _, name = key.rpartition(".")
    fields = model.model_fields
    if table in ("data", "train"):
        fields = {"data": Data, "train": Train}[table].model_fields
    hint = nearest(name, fields)
    if not hint:
        homes = [f"[{other}]" for other, home in (("data", Data), ("train", Train)) if name in home.model_fields]
        homes += ["the top level"] if name in RunConfig.model_fields else []
        hint = (
            f"; it belongs in {homes[0]}"
            if homes
            else f"; {f'[{table}]' if table else 'the top level'} has {', '.join(fields) or 'no options'}"
        )
    return f"unknown key {key!r}{hint}"


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "dict_type": "a table",
    "missing": "a value",
}
_BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "of at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "of at most {le}",
}


def _expected(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        return "a value " + _BOUNDS[kind].format(**{name: f"{bound:g}" for name, bound in context.items()})
    message = detail["msg"]
    return _EXPECTED.get(kind) or message.removeprefix("Input should be ")


def _options(name: str, plugin: ModuleType, values: dict, given: Layer, problems: Problems) -> Any:
    """The plugin's Config, or None and problems. A plugin without a Config has no options."""
    config = getattr(plugin, "Config", None)
    if config is None:
        for key in values:
            problems.add(given[f"{name}.{key}"], f"plugin {name!r} has no options: {key!r} is not one")
        return None
    checked = _validate(_model(config), values, name, given, problems)
    if checked is None:
        return None
    try:
        options = config(**{field: getattr(checked, field) for field in checked.model_fields_set})
        check_effects(options)
        return options
    except ValueError as error:  # from __post_init__, too: options that do not go together
        problems.add(next((given[f"{name}.{key}"] for key in values), None), f"[{name}]: {error}")
        return None


@functools.cache
def _model(config: type) -> type[BaseModel]:
    """A pydantic model with the fields of a plugin's dataclass: the plugin itself knows nothing of pydantic."""
    hints = typing.get_type_hints(config, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default_factory is not dataclasses.MISSING:
            default = Field(default_factory=field.default_factory)
        else:
            default = ... if field.default is dataclasses.MISSING else field.default
        fields[field.name] = (hints[field.name], default)
    return create_model(config.__qualname__, __config__=STRICT, **fields)


def _check_paths(given: Layer, problems: Problems) -> None:
    """Files that are missing and directories that cannot be written, whatever else is wrong."""
    paths = {key: value.value for key, value in given.items() if isinstance(value.value, str)}
    model, out = paths.get("model", ""), paths.get("out")
    if model.startswith((".", "/", "~")) and not os.path.exists(expanded(model)):
        problems.add(given["model"], f"model {model} does not exist")
    for key in ("data.file", "data.replay", "data.earlier", "data.eval_file"):
        found = given.get(key, _UNSET).value
        for file in found if isinstance(found, list) else [found]:
            if not isinstance(file, str) or (key, found) == ("data.file", EMBEDDED):
                continue
            if not os.path.isfile(expanded(file)):
                what = "is not a file" if os.path.exists(expanded(file)) else "does not exist"
                problems.add(given[key], f"{key} {file} {what}")
    if out and (why := _unwritable(expanded(out))):
        problems.add(given["out"], f"out {out} cannot be written: {why}")


def _cross_checks(run: RunConfig, given: Layer, problems: Problems) -> None:
    """What no single value shows: options that need or exclude one another."""

    def problem(key: str, message: str) -> None:
        problems.add(given.get(key), message)

    data, train = run.data, run.train
    if run.dtype == "tf32" and run.device == "cpu":
        problem("dtype", TF32_ON_THE_HOST)
    if run.double_quant and not run.quantizer:
        problem("double_quant", "double_quant quantizes a quantizer's constants: give a quantizer, such as nf4")
    if not run.methods:
        problem("method", "method is []: expected at least one name")
    if data.file is None and run.model != EMBEDDED:
        problem("data.file", "there is no data: give --data FILE, or [data] file in the configuration")
    _check_sets(data, problem)
    if data.eval_file and data.eval_share:
        problem(
            "data.eval_share", "data.eval_share splits data.file, but data.eval_file is given too: keep one of them"
        )
    if train.micro_batch and train.batch % train.micro_batch:
        problem(
            "train.micro_batch",
            f"train.micro_batch is {train.micro_batch}: it must divide train.batch, which is {train.batch}",
        )
    if train.offload_activations and (why := train.no_offload(run.device)):
        problem("train.offload_activations", why)
    if train.group_by_length and (len(data.files) > 1 or data.replay):
        problem(
            "train.group_by_length",
            "train.group_by_length is for rows of one file, and here each row's file is drawn: leave it out",
        )
    taken = inspect.signature(OPTIMIZERS[train.optimizer]).parameters
    for name in OPTIONS:
        if getattr(train, name) is not None and name not in taken:
            has = ", ".join(option for option in OPTIONS if option in taken)
            problem(
                f"train.{name}", f"train.{name} has no effect with the optimizer {train.optimizer}, which has {has}"
            )
    if isinstance(train.warmup, int) and train.steps and train.warmup > train.steps:
        problem("train.warmup", f"train.warmup is {train.warmup} steps, more than the {train.steps} of train.steps")
    held_out = data.eval_file or data.eval_share or (data.file in (None, EMBEDDED) and run.model == EMBEDDED)
    for key, wanted in (("metric", train.metric), ("metrics", train.metrics)):
        if wanted and not held_out:
            problem(f"train.{key}", f"train.{key} needs held-out rows: data.eval_file or data.eval_share")
    for key, wanted in (("early_stop", train.early_stop), ("best", train.best)):
        if wanted and not (held_out and train.eval_every):
            problem(
                f"train.{key}",
                f"train.{key} needs held-out rows (data.eval_file or data.eval_share) and train.eval_every",
            )


def _check_sets(data: Data, problem: Callable[[str, str], None]) -> None:
    """Several data sets, and an earlier task's rows beside them."""
    files, held_out = data.files, listed(data.eval_file)
    if data.file == []:
        problem("data.file", "data.file is []: expected at least one file")
    if len(set(map(expanded, files))) < len(files):
        problem("data.file", "data.file names a file twice: give it once, and its weight in data.mix")
    if data.mix is not None and len(data.mix) != len(files):
        problem(
            "data.mix", f"data.mix has {len(data.mix)} weights for {len(files)} files of data.file: one is for each"
        )
    elif data.mix is not None and len(files) == 1:
        problem("data.mix", "data.mix has no effect: data.file is one file")
    if held_out and files and len(held_out) != len(files):
        problem(
            "data.eval_file",
            f"data.eval_file names {len(held_out)} files and data.file {len(files)}: give held-out rows for each, in "
            "the same order, or data.eval_share",
        )
    if data.replay_share is not None and not data.replay:
        problem("data.replay_share", "data.replay_share has no effect: data.replay names no file of earlier rows")
    training = set(map(expanded, files))
    if data.replay and expanded(data.replay) in training:
        problem("data.replay", "data.replay is one of data.file: it names rows of an earlier task")
    if data.earlier and expanded(data.earlier) in training | {expanded(data.replay or "")}:
        problem("data.earlier", "data.earlier is trained on: it names held-out rows of an earlier task")


def _unwritable(directory: Path) -> str:
    """Why nothing can be written in a directory that may not exist yet; "" where it can."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is a file"
    return "" if os.access(existing, os.W_OK | os.X_OK) else f"no permission in {existing}"
