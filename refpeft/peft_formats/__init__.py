"""How Hugging Face PEFT 0.21 writes methods down: settings, names and layouts of tensors, in both directions."""

from .common import PREFIX, Entry, Format, Settings
from .lora import DORA, EVA, LORA, OLORA, PISSA
from .low_rank import ADALORA, DELORA, HIRA, LOHA, LOKR, VERA
from .others import IA3, LN_TUNING
from .prompts import (
    ADAPTION_PROMPT,
    MULTITASK_PROMPT,
    P_TUNING,
    P_TUNING_V2,
    PRE_EMBED,
    PREFIX_TUNING,
    PROMPT_TUNING,
    SPOT,
)
from .selective import SHIRA, TRAINABLE_TOKENS
from .structured import BOFT, C3A, FOURIERFT, HRA, MISS, OFT, RANDLORA, ROAD, VBLORA

__all__ = ["FORMATS", "PREFIX", "Entry", "Format", "Settings"]

FORMATS = {
    "dora": DORA,
    "eva": EVA,
    "pissa": PISSA,
    "olora": OLORA,
    "lora": LORA,
    "adalora": ADALORA,
    "vera": VERA,
    "loha": LOHA,
    "lokr": LOKR,
    "hira": HIRA,
    "delora": DELORA,
    "ia3": IA3,
    "ln_tuning": LN_TUNING,
    "shira": SHIRA,
    "trainable_tokens": TRAINABLE_TOKENS,
    "prompt_tuning": PROMPT_TUNING,
    "spot": SPOT,
    "multitask_prompt": MULTITASK_PROMPT,
    "p_tuning": P_TUNING,
    "prefix_tuning": PREFIX_TUNING,
    "p_tuning_v2": P_TUNING_V2,
    "llama_adapter": ADAPTION_PROMPT,
    "pre_embed": PRE_EMBED,
    "oft": OFT,
    "boft": BOFT,
    "hra": HRA,
    "road": ROAD,
    "c3a": C3A,
    "fourierft": FOURIERFT,
    "miss": MISS,
    "vblora": VBLORA,
    "randlora": RANDLORA,
}
"""By the plugin's name; of those that share a peft_type, the first that an adapter_config.json means."""
