"""Methods whose matrices have a structure: rotations, reflections, circulants, blocks, few numbers."""

from __future__ import annotations

from typing import Any

from ..errors import RefpeftError
from ..sites import Adapter
from .common import PREFIX, Entry, Format, Settings, module_names, present, renamed, targets_of

_ANY_VALUE = ("fan_in_fan_out", "init_weights", "runtime_config")
_VALUES = {"layers_pattern": ("layers", "h"), "bias": ("none",)}


def _settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    """What all of them have."""
    return {"target_modules": module_names(adapter.sites, model)}


def _linear_only(adapter: Adapter, model: Any) -> bool:
    """Whether PEFT has the method at all of the sites: many of its classes refuse GPT-2's Conv1D."""
    return not any(site.transposed for site in adapter.sites)


def _options(config: Settings, model: Any) -> dict[str, Any]:
    layers = config.get("layers_to_transform")
    return {
        "targets": targets_of(config, model),
        "exclude": present(config.names("exclude_modules"), model),
        "layers": [layers] if isinstance(layers, int) else layers,
    }


# ---- OFT -------------------------------------------------------------------------------------------------------------


def _oft_entries(adapter: Adapter) -> list[Entry]:
    """PEFT's exact form is the rotation by -S, its series the one by S."""
    sign = 1 if adapter.cfg.cayley == "neumann" else -1

    def turned(array: Any) -> Any:
        return sign * array

    return [
        Entry(f"{PREFIX}{site.name}.oft_R.weight", (f"{site.name}.S",), turned, lambda array: (turned(array),))
        for site in adapter.sites
    ]


def _oft_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    return _settings(adapter, model) | {
        "r": 0,
        "oft_block_size": cfg.block_size,
        "block_share": cfg.block_share,
        "use_cayley_neumann": cfg.cayley == "neumann",
        "num_cayley_neumann_terms": cfg.terms,
    }


def _oft_options(config: Settings, model: Any) -> dict[str, Any]:
    options = {"block_size": config.need("oft_block_size"), "block_share": config.get("block_share", False)}
    terms = max(config.get("num_cayley_neumann_terms", 5), 4)  # PEFT computes the same for 3 as for 4
    if config.get("use_cayley_neumann", False):
        options |= {"cayley": "neumann", "terms": terms}
    return _options(config, model) | options


OFT = Format(
    "OFT",
    _oft_entries,
    _oft_settings,
    _oft_options,
    fits=_linear_only,
    any_value=(*_ANY_VALUE, "eps", "module_dropout"),
    values=_VALUES,
)


# ---- BOFT ------------------------------------------------------------------------------------------------------------


def _boft_entries(adapter: Adapter) -> list[Entry]:
    def entries(name: str) -> list[Entry]:
        column = lambda array: array.reshape(-1, 1)  # noqa: E731
        start = f"{PREFIX}{name}."
        return [
            Entry(f"{start}boft_R", (f"{name}.A",)),
            Entry(f"{start}boft_s", (f"{name}.s",), column, lambda array: (array.reshape(-1),)),
        ]

    return [entry for site in adapter.sites for entry in entries(site.name)]


BOFT = Format(
    "BOFT",
    _boft_entries,
    lambda adapter, model: (
        _settings(adapter, model)
        | {"boft_block_size": adapter.cfg.block_size, "boft_n_butterfly_factor": adapter.cfg.butterfly_factors}
    ),
    lambda config, model: (
        _options(config, model)
        | {
            "block_size": config.need("boft_block_size"),
            "butterfly_factors": config.get("boft_n_butterfly_factor", 1),
        }
    ),
    fits=_linear_only,
    any_value=(*_ANY_VALUE, "boft_dropout"),
    values=_VALUES,
)


# ---- HRA -------------------------------------------------------------------------------------------------------------

HRA = Format(
    "HRA",
    renamed({"U": "hra_u"}),
    lambda adapter, model: _settings(adapter, model) | {"r": adapter.cfg.r},
    lambda config, model: _options(config, model) | {"r": config.need("r")},
    fits=_linear_only,
    any_value=_ANY_VALUE,
    values=_VALUES,
)


# ---- RoAd, C3A, FourierFT --------------------------------------------------------------------------------------------


def _variant(config: Settings) -> int:
    """How many numbers RoAd has for a plane."""
    variant = config.get("variant", "road_1")
    if variant not in ("road_1", "road_2", "road_4"):
        raise RefpeftError(f"variant is {variant!r}: expected road_1, road_2 or road_4")
    return int(variant[-1])


ROAD = Format(
    "ROAD",
    renamed({"theta": "road_theta", "alpha": "road_alpha"}),
    lambda adapter, model: (
        _settings(adapter, model) | {"variant": f"road_{adapter.cfg.numbers}", "group_size": adapter.cfg.group_size}
    ),
    lambda config, model: (
        _options(config, model) | {"numbers": _variant(config), "group_size": config.get("group_size", 64)}
    ),
    fits=_linear_only,
    any_value=_ANY_VALUE,
    values=_VALUES,
)


def _c3a_init(config: Settings) -> str:
    init = config.get("init_weights", False)
    return {True: "zeros", False: "xavier_uniform"}.get(init, init)


C3A = Format(
    "C3A",
    renamed({"kernel": "c3a_kernel"}),
    lambda adapter, model: (
        _settings(adapter, model)
        | {
            "block_size": adapter.cfg.block_size,
            "block_size_pattern": adapter.cfg.block_size_pattern,
            "init_weights": adapter.cfg.init == "zeros" or adapter.cfg.init,
        }
    ),
    lambda config, model: (
        _options(config, model)
        | {
            "block_size": config.need("block_size"),
            "block_size_pattern": config.get("block_size_pattern", {}),
            "init": _c3a_init(config),
        }
    ),
    fits=_linear_only,
    any_value=_ANY_VALUE,
    values=_VALUES,
)

FOURIERFT = Format(
    "FOURIERFT",
    renamed({"c": "fourierft_spectrum"}),
    lambda adapter, model: (
        _settings(adapter, model)
        | {
            "n_frequency": adapter.cfg.frequencies,
            "n_frequency_pattern": adapter.cfg.frequencies_pattern,
            "scaling": adapter.cfg.scaling,
            "random_loc_seed": adapter.cfg.places_seed,
            "init_weights": adapter.cfg.init == "zeros",
            "fan_in_fan_out": any(site.transposed for site in adapter.sites),
        }
    ),
    lambda config, model: (
        _options(config, model)
        | {
            "frequencies": config.need("n_frequency"),
            "frequencies_pattern": config.get("n_frequency_pattern", {}),
            "scaling": config.get("scaling", 150.0),
            "places_seed": config.need("random_loc_seed"),
            "init": "zeros" if config.get("init_weights", False) else "gaussian",
        }
    ),
    any_value=_ANY_VALUE,
    values=_VALUES,
)


# ---- MiSS, VB-LoRA ---------------------------------------------------------------------------------------------------


def _miss_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    return _settings(adapter, model) | {
        "r": cfg.r,
        "mini_r": cfg.mini_r or 1,
        "init_weights": "mini" if cfg.mini_r else True,
        "miss_dropout": cfg.dropout,
    }


def _miss_options(config: Settings, model: Any) -> dict[str, Any]:
    form, mini_r = config.get("init_weights", True), config.get("mini_r", 1)
    if form not in (True, False, "mini"):
        raise RefpeftError(f"init_weights = {form!r}: of MiSS refpeft knows true, false and 'mini'")
    return _options(config, model) | {
        "r": config.need("r"),
        "mini_r": mini_r if form == "mini" else None,
        "dropout": config.get("miss_dropout", 0.0),
    }


MISS = Format(
    "MISS",
    renamed({"M": "miss_block"}),
    _miss_settings,
    _miss_options,
    fits=_linear_only,
    any_value=_ANY_VALUE,
    values=_VALUES,
)

_logits = renamed({"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"})
_SAME_IN_VBLORA = ("r", "num_vectors", "vector_length", "topk")

VBLORA = Format(
    "VBLORA",
    lambda adapter: [Entry("base_model.vblora_vector_bank", ("shared.bank",)), *_logits(adapter)],
    lambda adapter, model: (
        _settings(adapter, model)
        | {name: getattr(adapter.cfg, name) for name in _SAME_IN_VBLORA}
        | {
            "vblora_dropout": adapter.cfg.dropout,
            "save_only_topk_weights": False,
            "fan_in_fan_out": any(site.transposed for site in adapter.sites),
        }
    ),
    lambda config, model: (
        _options(config, model)
        | {name: config.need(name) for name in _SAME_IN_VBLORA}
        | {"dropout": config.get("vblora_dropout", 0.0)}
    ),
    any_value=(*_ANY_VALUE, "init_vector_bank_bound", "init_logits_std"),
    values=_VALUES,
)


# ---- RandLoRA --------------------------------------------------------------------------------------------------------

_diagonals = renamed({"L": "randlora_lambda", "G": "randlora_gamma"})


def _randlora_entries(adapter: Adapter) -> list[Entry]:
    """PEFT has A and B once for the model, and again in every layer."""
    places = ["base_model", *(f"{PREFIX}{site.name}" for site in adapter.sites)]
    bases = [Entry(f"{place}.randlora_{letter}", (f"shared.{letter}",)) for place in places for letter in "AB"]
    return bases + _diagonals(adapter)


def _randlora_options(config: Settings, model: Any) -> dict[str, Any]:
    if not config.get("save_projection", True):
        raise RefpeftError("save_projection is false: A and B are not in the file, and depend on the machine")
    return _options(config, model) | {
        "r": config.need("r"),
        "alpha": config.need("randlora_alpha"),
        "dropout": config.get("randlora_dropout", 0.0),
    }


RANDLORA = Format(
    "RANDLORA",
    _randlora_entries,
    lambda adapter, model: (
        _settings(adapter, model)
        | {
            "r": adapter.cfg.r,
            "randlora_alpha": adapter.cfg.alpha,
            "randlora_dropout": adapter.cfg.dropout,
            "save_projection": True,
            "projection_prng_key": 0,
            "fan_in_fan_out": any(site.transposed for site in adapter.sites),
        }
    ),
    _randlora_options,
    any_value=(*_ANY_VALUE, "projection_prng_key", "sparse", "very_sparse"),
    values=_VALUES,
)
