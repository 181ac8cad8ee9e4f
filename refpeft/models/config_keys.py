"""Reading a `config.json` completely or not at all: every key is read, known to change nothing, or refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from refpeft.errors import RefpeftError
from refpeft.models.quantized_files import check_method

REQUIRED = object()
"""The default of a key that must be there."""

# Keys that change nothing that is computed here: book-keeping, initialization, output options, dropout (off in a frozen
# base), classification heads (absent), and the generation options that transformers 4 kept in config.json.
_HARMLESS_KEYS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_pdrop bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_llama_config label2id length_penalty max_length max_new_tokens min_length
    model_type n_ctx n_special name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_scores predict_special_tokens prefix
    problem_type remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache
"""
_HARMLESS = frozenset(_HARMLESS_KEYS.split())

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_MAX_LAYERS = 4096  # so that a hostile file cannot ask for tuples that fill the memory


def read(
    config: dict,
    family: str,
    keys: Mapping[str, Any],
    only: Mapping[str, Any],
    harmless: Iterable[str] = (),
    architectures: tuple[str, ...] = ("ForCausalLM", "LMHeadModel", "Model", "ForSequenceClassification"),
) -> dict[str, Any]:
    """The values of `keys` in a parsed `config.json`, those of `keys` itself (its defaults) where it has none.

    only           keys that change the maths, with the one value that refpeft has (null is taken as well)
    harmless       keys that change nothing in this family, beside those that never do
    architectures  how the names of its classes may end

    Raises RefpeftError, naming the key, for anything else.
    """
    if config.get("quantization_config") is not None:
        check_method(config["quantization_config"])
    if config.get("auto_map") is not None:
        raise RefpeftError("config key auto_map names Python code of the model's own, which refpeft never runs")
    known = keys.keys() | _HARMLESS | set(harmless) | {"quantization_config", "auto_map"}
    for key, value in config.items():
        if key in known:
            continue
        if key not in only:
            raise RefpeftError(
                f"config key {key!r} = {reprlib.repr(value)} is not known for {family} and may change what is "
                "computed; if it does not, remove it from config.json"
            )
        if value is not None and value != only[key]:
            raise RefpeftError(f"config key {key} = {value!r}: for {family}, refpeft has only {only[key]!r}")
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not name.endswith(architectures):
            raise RefpeftError(
                f"config key architectures has {name!r}; of {family}, refpeft has {', '.join(architectures)}"
            )
    values = dict(keys) | {key: value for key, value in config.items() if key in keys}
    for key, value in values.items():
        if value is REQUIRED:
            raise RefpeftError(f"config key {key} is missing; a {family} model needs it")
    return values


def special_ids(values: dict) -> dict:
    """bos_id, eos_ids and pad_id. A negative number (Llama 1 had pad_token_id -1) means that there is none."""
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = values[key] if isinstance(values[key], list) else [values[key]]
        if any(value is not None and type(value) is not int for value in found):
            raise RefpeftError(f"config key {key} = {values[key]!r}: expected a token number")
        ids[key] = tuple(value for value in found if value is not None and value >= 0)
    bos, pad = ids["bos_token_id"], ids["pad_token_id"]
    return {
        "bos_id": bos[0] if bos else None,
        "eos_ids": ids["eos_token_id"],
        "pad_id": pad[0] if pad else None,
    }


def count(values: dict, key: str, least: int = 1) -> int:
    value = values[key]
    if type(value) is not int or not least <= value < 2**31:
        raise RefpeftError(f"config key {key} = {value!r}: expected a whole number of at least {least}")
    return value


def layer_count(values: dict, key: str) -> int:
    found = count(values, key)
    if found > _MAX_LAYERS:
        raise RefpeftError(f"config key {key} = {found}: refpeft takes at most {_MAX_LAYERS}")
    return found


def positive(values: dict, key: str) -> float:
    value = values[key]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise RefpeftError(f"config key {key} = {value!r}: expected a positive number")
    return float(value)


def flag(values: dict, key: str) -> bool:
    if type(values[key]) is not bool:
        raise RefpeftError(f"config key {key} = {values[key]!r}: expected true or false")
    return values[key]


def activation(values: dict, key: str) -> str:
    if not isinstance(values[key], str) or values[key] not in _ACTIVATIONS:
        raise RefpeftError(f"config key {key} = {values[key]!r}; refpeft has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[values[key]]
