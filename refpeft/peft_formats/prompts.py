"""What comes before the tokens: rows, keys and values.

PEFT's files hold these alone, and nothing of a network that gave them: read again, they are trained themselves.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..backend import Array
from ..errors import RefpeftError
from ..models.encoder import Encoder
from ..prompts import encoded, prefix
from ..sites import Adapter
from ..tensor import Tensor
from .common import PREFIX, Entry, Format, Settings

_KEYS = ("num_attention_heads", "num_layers", "token_dim")  # PEFT's, derived from the model; shapes are checked

_PREFIX = "base_model."  # of a head's tensors: one wrapper less than methods in layers have
_ONE_STACK = {"num_transformer_submodules": (1,)}  # not of an encoder and a decoder


def _virtual_tokens(adapter: Adapter, model: Any, heads: int, dim: int) -> dict[str, Any]:
    return {
        "num_virtual_tokens": adapter.cfg.tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.config.layers,
        "num_attention_heads": heads,
        "token_dim": dim,
    }


def _one_stack(config: Settings, model: Any) -> dict[str, Any]:
    """No option; raises RefpeftError where PEFT would put rows before another text than a decoder's or T5's source.

    PEFT's files for T5 have as many rows again for its decoder's text, which are left out of what it computes.
    """
    stacks = config.get("num_transformer_submodules", 1)
    if stacks not in ((1, 2) if model.task == "seq2seq" else (1,)):
        raise RefpeftError(f"num_transformer_submodules = {stacks!r}: expected 1, for a model with one stack of layers")
    return {}


def first_rows(config: dict[str, Any], tensors: dict[str, Array]) -> dict[str, Array]:
    """The tensors of PEFT's file without the rows that it has for a decoder's text and does not use."""
    rows, count = tensors.get("prompt_embeddings"), config.get("num_virtual_tokens")
    used = config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING") and config.get("num_transformer_submodules") == 2
    if not used or rows is None or not isinstance(count, int) or len(rows) != 2 * count:
        return tensors
    return tensors | {"prompt_embeddings": rows[:count]}


def _at_the_embedding(adapter: Adapter, model: Any) -> bool:
    """With a head that reads an encoder's first position PEFT gives it the first row, which is not the text's."""
    as_there = model.read != "first" or getattr(adapter.cfg, "head_reads", "text") == "prompt"
    return adapter.sites == [model.embed] and as_there and model.task != "mlm"


def _read_by_head(model: Any) -> dict[str, Any]:
    """The option that says what PEFT's head reads."""
    return {"head_reads": "prompt"} if model.read == "first" else {}


# ---- rows ------------------------------------------------------------------------------------------------------------


def _prompt_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    settings = _virtual_tokens(adapter, model, model.config.heads, model.embed.shape[1])
    init = getattr(adapter.cfg, "init", "random")
    if init == "text" and model.name:  # PEFT insists on the tokenizer's name, although it does not use it any more
        text = {"prompt_tuning_init_text": adapter.cfg.text, "tokenizer_name_or_path": model.name}
        return settings | {"prompt_tuning_init": "TEXT"} | text
    return settings | {"prompt_tuning_init": "SAMPLE_VOCAB" if init == "vocab" else "RANDOM"}


def _prompt_options(config: Settings, model: Any) -> dict[str, Any]:
    init, text = config.get("prompt_tuning_init"), config.get("prompt_tuning_init_text")
    options = {"tokens": config.need("num_virtual_tokens"), "init": "vocab" if init == "SAMPLE_VOCAB" else "random"}
    options |= _read_by_head(model) | _one_stack(config, model)
    return options | ({"init": "text", "text": text} if init == "TEXT" and text else {})


PROMPT_TUNING = Format(
    "PROMPT_TUNING",
    lambda adapter: [Entry("prompt_embeddings", (f"{adapter.sites[0].name}.prompt",))],
    _prompt_settings,
    _prompt_options,
    any_value=(*_KEYS, "tokenizer_kwargs", "tokenizer_name_or_path"),
    fits=_at_the_embedding,
    values=_ONE_STACK,
    prefix=_PREFIX,
)


SPOT = replace(PROMPT_TUNING, means=lambda config: False)  # a file does not say where the first values came from


def _task_entries(adapter: Adapter) -> list[Entry]:
    """The factors of all tasks as two tensors, of which one task is trained."""
    name, tasks = adapter.sites[0].name, range(adapter.cfg.tasks)
    stacked = {
        f"prefix_task_{letters}": tuple(f"{name}.{letters}{task}" for task in tasks) for letters in ("cols", "rows")
    }
    factors = [Entry(key, names, lambda *arrays: np.stack(arrays), tuple) for key, names in stacked.items()]
    return [Entry("prompt_embeddings", (f"{name}.prompt",)), *factors]


def _task_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg, settings = adapter.cfg, _virtual_tokens(adapter, model, model.config.heads, model.embed.shape[1])
    chosen = {"refpeft_task": cfg.task} if cfg.tasks > 1 else {}  # a key that PEFT does not know, and leaves out
    return settings | {"num_tasks": cfg.tasks, "num_ranks": cfg.ranks} | chosen


def _task_options(config: Settings, model: Any) -> dict[str, Any]:
    tasks, task = config.get("num_tasks", 1), config.get("refpeft_task")
    if task is None and tasks != 1:
        raise RefpeftError(
            f'it has the prompts of {tasks} tasks, and does not say which is meant: add "refpeft_task": 0, or another'
        )
    return {
        "tokens": config.need("num_virtual_tokens"),
        "tasks": tasks,
        "task": task or 0,
        "ranks": config.get("num_ranks", 1),
    } | _read_by_head(model)


MULTITASK_PROMPT = Format(
    "MULTITASK_PROMPT_TUNING",
    _task_entries,
    _task_settings,
    _task_options,
    any_value=(
        *PROMPT_TUNING.any_value,
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
    ),
    fits=_at_the_embedding,
    values=_ONE_STACK,
    prefix=_PREFIX,
)


def _rows_entries(adapter: Adapter) -> list[Entry]:
    """prompt_embeddings (tokens, dim)."""
    names, (site,) = tuple(adapter.params), adapter.sites

    def pack(*arrays: np.ndarray) -> np.ndarray:
        return encoded(_letters(dict(zip(names, map(Tensor, arrays), strict=True)), site.name)).data

    return [Entry("prompt_embeddings", names, pack)]


def _encoder(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg, dim = adapter.cfg, model.embed.shape[1]
    settings = _virtual_tokens(adapter, model, model.config.heads, dim)
    if cfg.encoder == "none":
        return settings
    return settings | {
        "encoder_reparameterization_type": cfg.encoder.upper(),
        "encoder_hidden_size": cfg.hidden or (dim // 2 if cfg.encoder == "lstm" else dim),
        "encoder_num_layers": 2,
        "encoder_dropout": cfg.dropout,
    }


def _encoder_options(config: Settings, model: Any) -> dict[str, Any]:
    options = {"tokens": config.need("num_virtual_tokens"), "encoder": "none"}
    return options | _read_by_head(model) | _one_stack(config, model)


P_TUNING = Format(
    "P_TUNING",
    _rows_entries,
    _encoder,
    _encoder_options,
    any_value=(
        *_KEYS,
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    ),
    fits=_at_the_embedding,
    values=_ONE_STACK,
    prefix=_PREFIX,
)


# ---- keys and values -------------------------------------------------------------------------------------------------


def _prefix_entries(adapter: Adapter) -> list[Entry]:
    """prompt_embeddings (tokens, layers * 2 * kv_heads * head_dim): key then value, layer after layer."""
    names, shape = tuple(adapter.params), adapter.sites[0].shape

    def pack(*arrays: np.ndarray) -> np.ndarray:
        values = dict(zip(names, map(Tensor, arrays), strict=True))
        shared = _letters(values, "shared")
        pairs = np.concatenate([prefix(_letters(values, site.name), shared, shape).data for site in adapter.sites])
        return pairs.transpose(2, 0, 1, 3).reshape(pairs.shape[2], -1)

    def unpack(array: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(array.reshape(len(array), len(names), *shape).transpose(1, 2, 0, 3))

    return [Entry("prompt_embeddings", names, pack, unpack)]


def _letters(values: dict[str, Tensor], place: str) -> SimpleNamespace:
    """The values of one place, as a plugin has them."""
    return SimpleNamespace(
        **{name.rpartition(".")[2]: value for name, value in values.items() if name.rpartition(".")[0] == place}
    )


def _prefix_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    heads, hidden = model.config.kv_heads, adapter.cfg.hidden
    settings = _virtual_tokens(adapter, model, heads, heads * model.config.head_dim)
    return settings | ({"prefix_projection": True, "encoder_hidden_size": hidden} if hidden else {})


_WITH_CACHE = ("bert", "roberta", "xlm-roberta")  # the encoders that transformers gives keys and values of before


def _prefix_fits(adapter: Adapter, model: Any) -> bool:
    everywhere = [site for site in model.sites.values() if site.kind == "attention"]
    known = model.config.family in _WITH_CACHE if isinstance(model, Encoder) else model.task != "seq2seq"
    return adapter.positions == adapter.cfg.tokens and adapter.sites == everywhere and known and model.task != "mlm"


def _prefix_options(config: Settings, model: Any) -> dict[str, Any]:
    if model.task == "seq2seq":
        raise RefpeftError(
            "PEFT's prefixes are read for models with one stack of layers: of T5 it gives the decoder alone some, and "
            "half of its layers those of others"
        )
    return {"tokens": config.need("num_virtual_tokens")}


PREFIX_TUNING = Format(
    "PREFIX_TUNING",
    _prefix_entries,
    _prefix_settings,
    _prefix_options,
    fits=_prefix_fits,
    any_value=(*_KEYS, "encoder_hidden_size", "prefix_projection", "init_weights"),
    values=_ONE_STACK,
    prefix=_PREFIX,
)

PRE_EMBED = replace(PROMPT_TUNING, means=lambda config: False)  # to PEFT, it is prompt tuning


P_TUNING_V2 = replace(PREFIX_TUNING, means=lambda config: False)  # to PEFT, too, it is prefix tuning


# ---- prompts in layers -----------------------------------------------------------------------------------------------


def _adaption_entries(adapter: Adapter) -> list[Entry]:
    entries = []
    for layer in adapter.layers:
        place, name = PREFIX + layer.site.name.removesuffix(".attend"), layer.site.name
        entries += [
            Entry(
                f"{place}.adaption_prompt", (f"{name}.prompt",), lambda array: array[None], lambda array: (array[0],)
            ),
            Entry(f"{place}.adaption_gate", (f"{name}.gate",)),
        ]
    return entries


def _has_adaption_prompts(model: Any) -> bool:
    """Whether PEFT's are LLaMA-Adapter's: it adds the output layer's bias twice, and leaves that layer out in GPT-2."""
    outputs = [site for site in model.sites.values() if "o" in site.roles]
    return all(site.bias is None and site.shape[0] == site.shape[1] for site in outputs)


def _adaption_options(config: Settings, model: Any) -> dict[str, Any]:
    if not _has_adaption_prompts(model):
        raise RefpeftError(
            "PEFT's adaption prompts are LLaMA-Adapter's where attention's output layer has no bias (not on GPT-2); "
            "with one it computes something else"
        )
    return {"tokens": config.need("adapter_len"), "count": config.need("adapter_layers"), "compat": "peft"}


def _adaption_fits(adapter: Adapter, model: Any) -> bool:
    everywhere = [site for site in model.sites.values() if site.kind == "attention"]
    topmost = adapter.sites == everywhere[-len(adapter.sites) :]
    known = model.config.family in ("llama", "mistral")
    return adapter.cfg.compat == "peft" and known and topmost and _has_adaption_prompts(model)


ADAPTION_PROMPT = Format(
    "ADAPTION_PROMPT",
    _adaption_entries,
    lambda adapter, model: {
        "adapter_len": adapter.cfg.tokens,
        "adapter_layers": len(adapter.sites),
        "target_modules": "self_attn",
    },
    _adaption_options,
    fits=_adaption_fits,
    values={"target_modules": ("self_attn",)},
)
