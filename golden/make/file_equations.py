"""What the tensors of an adapter's file compute, from the methods' equations: independent of whoever wrote the file.

A file's names are those of PEFT 0.21; which letter of a method each of them is stands in golden/README.md, Methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import encoder_reference
import heads
import layer_prompts
import reference
import torch
from common import Compute, Tensors
from compositions import equation
from equations import prefix, prompt
from models import real_only

START = "base_model.model."
LORA = {"lora_A.weight": "A", "lora_B.weight": "B"}
LETTERS: dict[str, dict[str, str]] = {
    "lora": LORA,
    "dora": LORA | {"lora_magnitude_vector": "m"},
    "pissa": LORA,
    "olora": LORA,
    "adalora": {"lora_A": "Q", "lora_B": "P", "lora_E": "E"},
    "vera": {"vera_lambda_d": "d", "vera_lambda_b": "b"},
    "loha": {f"hada_w{i}_{letter.lower()}": f"{letter}{i}" for i in "12" for letter in "AB"},
    "lokr": {
        f"lokr_w{i}{f'_{part}' if part else ''}": f"{n}{part}" for i, n in ("1C", "2D") for part in ("", "a", "b")
    },
    "hira": {"hira_A": "A", "hira_B": "B"},
    "delora": {"delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": "w"},
    "ia3": {"ia3_l": "gain"},
    "oft": {"oft_R.weight": "S"},
    "boft": {"boft_R": "A", "boft_s": "s"},
    "hra": {"hra_u": "U"},
    "road": {"road_theta": "theta", "road_alpha": "alpha"},
    "c3a": {"c3a_kernel": "kernel"},
    "fourierft": {"fourierft_spectrum": "c"},
    "miss": {"miss_block": "M"},
    "vblora": {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"},
    "randlora": {"randlora_lambda": "L", "randlora_gamma": "G"},
    "shira": {"shira_weight": "values", "shira_indices": "indices"},
}
"""By method: the ends of a file's names -> letters."""

SHARED = {
    "base_model.vera_A": "A",
    "base_model.vera_B": "B",
    "base_model.vblora_vector_bank": "bank",
    "base_model.randlora_A": "A",
    "base_model.randlora_B": "B",
}
FLAT = ("E", "gain", "s")  # columns or rows in a file


def patterned(patterns: dict, site: str, otherwise: float) -> float:
    """The value of the first key that is the end of the site's name, as a regular expression after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", site)), otherwise)


def options_of(method: str, c: dict, site: str) -> dict:
    """A method's options at a site, from adapter_config.json."""
    if method in ("lora", "dora", "pissa", "olora"):
        return {
            "r": patterned(c["rank_pattern"], site, c["r"]),
            "alpha": patterned(c["alpha_pattern"], site, c["lora_alpha"]),
            "rslora": c["use_rslora"],
        }
    if method in ("loha", "lokr"):
        return {
            "r": patterned(c["rank_pattern"], site, c["r"]),
            "alpha": patterned(c["alpha_pattern"], site, c["alpha"]),
        }
    names = {
        "adalora": {"init_r": "init_r", "alpha": "lora_alpha"},
        "boft": {"block_size": "boft_block_size"},
        "delora": {"r": "r"},
        "fourierft": {"frequencies": "n_frequency", "scaling": "scaling", "places_seed": "random_loc_seed"},
        "oft": {"block_size": "oft_block_size", "block_share": "block_share", "terms": "num_cayley_neumann_terms"},
        "randlora": {"r": "r", "alpha": "randlora_alpha"},
        "road": {"group_size": "group_size"},
        "vblora": {"topk": "topk"},
    }
    options = {ours: c[theirs] for ours, theirs in names.get(method, {}).items()}
    if method == "fourierft":
        options["frequencies"] = patterned(c["n_frequency_pattern"], site, options["frequencies"])
    if method == "ia3":
        options["feedforward"] = site.endswith(tuple(c["feedforward_modules"]))
    if method == "oft":
        options["cayley"] = "neumann" if c["use_cayley_neumann"] else "exact"
    if method == "road":
        options["numbers"] = int(c["variant"][-1])
    return options


def letters_at(method: str, file: Tensors, site: str) -> Tensors:
    """The letters of a site; none where the method does not stand there."""
    names = LETTERS[method] | ({"lora_embedding_A": "A", "lora_embedding_B": "B"} if method == "lora" else {})
    ours = {letter: file[f"{START}{site}.{end}"] for end, letter in names.items() if f"{START}{site}.{end}" in file}
    if ours:
        ours |= {letter: file[name] for name, letter in SHARED.items() if name in file}
    return {letter: t.flatten() if letter in FLAT else t for letter, t in ours.items()}


def weights_with(t: Tensors, file: Tensors, c: dict) -> Tensors:
    """The model's own tensors, with those that the file has in their place."""
    found = {name: tensor for name, tensor in t.items() if not name.startswith("file.")}
    for name, tensor in file.items():
        own = name.removeprefix(START).replace(".base_layer", "").replace(".ln_tuning_layers", "")
        if own in found:
            found[own] = tensor
        if name.endswith(".trainable_tokens_delta"):
            table = own.replace("trainable_tokens_delta", "weight")
            if table in found:  # a tied head has none of its own
                found[table] = found[table].index_copy(0, torch.tensor(c["token_indices"]), tensor)
    return found


def by_equation(method: str, model: dict, c: dict, drawn: Tensors | None = None, head: str | None = None) -> Compute:
    """Logits of a model with what a file has. `drawn`: matrices that the file lacks and a seed gives, by letter."""

    def compute(t: Tensors) -> Tensors:
        file = {name.removeprefix("file."): tensor for name, tensor in t.items() if name.startswith("file.")}
        weights = weights_with(t, file, c)
        if head:
            return {"logits": folded(weights, file)}
        sites = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
        advice = {} if method not in LETTERS else dict(filter(None, (advise(file, site, weights) for site in sites)))
        advice |= rows_before(file, weights) | prefixes(file) | gated(file, weights)
        logits = reference.model(model, weights, advice)(
            t["ids"], first_position=c["num_virtual_tokens"] if c["peft_type"] == "PREFIX_TUNING" else 0
        )
        return {"logits": logits}

    def advise(file: Tensors, site: str, weights: Tensors) -> tuple[str, Callable] | None:
        letters = letters_at(method, file, site)
        if not letters:
            return None
        options, weight = options_of(method, c, site), weights[f"{site}.weight"]
        if model["model_type"] == "gpt2" and "wte" not in site:
            weight = weight.mT
        if f"{START}{site}.lora_embedding_A" in file:
            scale = options["alpha"] / options["r"]
            return site, lambda f, ids: f(ids) + scale * (letters["B"] @ letters["A"]).mT[ids]
        letters |= {letter: matrix.to(torch.get_default_dtype()) for letter, matrix in (drawn or {}).items()}
        if method == "oft" and options["cayley"] == "exact":
            letters["S"] = -letters["S"]
        if method == "delora":
            return site, lambda f, x: f(x) + x @ delora(letters, options).mT
        return site, lambda f, x: equation(method).value(f, x, weight, letters, options)

    def rows_before(file: Tensors, weights: Tensors) -> reference.Advice:
        rows = file.get("prompt_embeddings")
        if rows is None or c["peft_type"] == "PREFIX_TUNING":
            return {}
        if "prefix_task_cols" in file:
            rows = rows * (file["prefix_task_cols"] @ file["prefix_task_rows"])[0]
        embed = "transformer.wte" if model["model_type"] == "gpt2" else "model.embed_tokens"
        return {embed: lambda f, ids: prompt(f, ids, rows)}

    def prefixes(file: Tensors) -> reference.Advice:
        if c["peft_type"] != "PREFIX_TUNING":
            return {}
        gpt2 = model["model_type"] == "gpt2"
        layers = model["n_layer"] if gpt2 else model["num_hidden_layers"]
        count = model["n_head"] if gpt2 else model["num_key_value_heads"]
        pairs = file["prompt_embeddings"].unflatten(1, (layers, 2, count, -1)).permute(1, 2, 3, 0, 4)
        name = "transformer.h.{}.attn.attend" if gpt2 else "model.layers.{}.self_attn.attend"
        return {
            name.format(i): lambda f, q, k, v, pair=pair: prefix(f, q, k, v, pair[0], pair[1])
            for i, pair in enumerate(pairs)
        }

    def gated(file: Tensors, weights: Tensors) -> reference.Advice:
        places = [name.removesuffix(".adaption_gate") for name in file if name.endswith(".adaption_gate")]

        def advise(place: str) -> Callable:
            rows, gate = file[f"{place}.adaption_prompt"][0], file[f"{place}.adaption_gate"]
            here = place.removeprefix(START)

            def attend(f, q, k, v):
                keys, values = layer_prompts.keys_and_values(weights, here, rows, k)
                return layer_prompts.gated(f, q, k, v, keys, values, gate, {"compat": "peft"})

            return attend

        return {f"{place.removeprefix(START)}.attend": advise(place) for place in places}

    def folded(weights: Tensors, file: Tensors) -> torch.Tensor:
        """Of LoRA in an encoder: the weights that it makes, under what its head says."""
        for site in {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}:
            letters = letters_at(method, file, site) if method in LETTERS else {}
            if letters:
                options = options_of(method, c, site)
                delta = options["alpha"] / options["r"] * letters["B"] @ letters["A"]
                weights[f"{site}.weight"] = weights[f"{site}.weight"] + delta
        if "said" in weights:
            return encoder_reference.model(model, weights)(weights["ids"], weights["said"])
        logits = heads.logits_of(head, model, weights, weights)
        return logits if logits.ndim == 2 else real_only(logits, weights["segments"])

    return compute


def delora(t: Tensors, options: dict) -> torch.Tensor:
    """Its norms of the frozen weight are in the file."""
    inner = (t["B"].square().sum(0) * t["A"].square().sum(1)).sqrt()
    return t["B"] @ torch.diag(t["strength"] / (options["r"] * inner)) @ t["A"] * t["w"]
