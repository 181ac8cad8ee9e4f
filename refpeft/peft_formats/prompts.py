"""What comes before the tokens: rows, keys and values.

PEFT's files hold these alone, and nothing of a network that gave them: read again, they are trained themselves.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..errors import RefpeftError
from ..prompts import encoded, prefix
from ..sites import Adapter
from ..tensor import Tensor
from .common import PREFIX, Entry, Format, Settings

_KEYS = ("num_attention_heads", "num_layers", "token_dim")  # PEFT's, derived from the model; shapes are checked

_ONE_STACK = {"num_transformer_submodules": (1,)}  # not of an encoder and a decoder


def _virtual_tokens(adapter: Adapter, model: Any, heads: int, dim: int) -> dict[str, Any]:
    return {
        "num_virtual_tokens": adapter.cfg.tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.config.layers,
        "num_attention_heads": heads,
        "token_dim": dim,
    }


def _at_the_embedding(adapter: Adapter, model: Any) -> bool:
    return adapter.sites == [model.embed]


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
    return options | ({"init": "text", "text": text} if init == "TEXT" and text else {})


PROMPT_TUNING = Format(
    "PROMPT_TUNING",
    lambda adapter: [Entry("prompt_embeddings", (f"{adapter.sites[0].name}.prompt",))],
    _prompt_settings,
    _prompt_options,
    any_value=(*_KEYS, "tokenizer_kwargs", "tokenizer_name_or_path"),
    fits=_at_the_embedding,
    values=_ONE_STACK,
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
    }


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


P_TUNING = Format(
    "P_TUNING",
    _rows_entries,
    _encoder,
    lambda config, model: {"tokens": config.need("num_virtual_tokens"), "encoder": "none"},
    any_value=(
        *_KEYS,
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    ),
    fits=_at_the_embedding,
    values=_ONE_STACK,
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


def _prefix_fits(adapter: Adapter, model: Any) -> bool:
    everywhere = [site for site in model.sites.values() if site.kind == "attention"]
    apart = all(site.runs == 1 for site in everywhere)  # PEFT has keys and values for each run of a layer
    return adapter.positions == adapter.cfg.tokens and adapter.sites == everywhere and apart


PREFIX_TUNING = Format(
    "PREFIX_TUNING",
    _prefix_entries,
    _prefix_settings,
    lambda config, model: {"tokens": config.need("num_virtual_tokens")},
    fits=_prefix_fits,
    any_value=(*_KEYS, "encoder_hidden_size", "prefix_projection", "init_weights"),
    values=_ONE_STACK,
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
