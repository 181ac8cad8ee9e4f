"""Frequencies of rotary position embedding (RoPE, arXiv:2104.09864), with the scalings of checkpoints."""

import functools
import math
from types import ModuleType

import numpy as np

from refpeft.backend import Array
from refpeft.capturing import keep
from refpeft.errors import RefpeftError
from refpeft.models.config import RopeConfig


def frequencies(xp: ModuleType, rope: RopeConfig, head_dim: int, length: int) -> tuple[Array, float]:
    """inverse_frequencies as an array of `xp`, which stays there: a captured step copies nothing from the host."""
    inverse, factor = _cached(xp, rope, head_dim, length if rope.kind == "dynamic" else 0)
    return keep(inverse), factor


@functools.lru_cache(maxsize=256)
def _cached(xp: ModuleType, rope: RopeConfig, head_dim: int, length: int) -> tuple[Array, float]:
    inverse, factor = inverse_frequencies(rope, head_dim, length)
    return xp.asarray(inverse), factor


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[np.ndarray, float]:
    """Radians a position for each pair of dimensions, float64 (head_dim / 2,), and the factor on cos and sin.

    `length` is the longest sequence at hand: with kind `dynamic` the frequencies depend on it.
    """
    if rope.kind == "dynamic":
        return _dynamic(rope, head_dim, length), 1.0
    plain = _plain(rope.theta, head_dim)
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":  # position interpolation, arXiv:2306.15595
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_attention_factor(rope)
    raise RefpeftError(f"rope scaling of type {rope.kind!r} is not known")


def _plain(theta: float, head_dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def _dynamic(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """NTK-aware scaling whose base grows with the sequence (bloc97, emozilla; see arXiv:2309.00071)."""
    if head_dim <= 2:
        raise RefpeftError(f"rope scaling dynamic needs heads of more than 2 dimensions, found {head_dim}")
    stretch = rope.factor * max(length, rope.context) / rope.context - (rope.factor - 1)
    return _plain(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1's scaling (arXiv:2407.21783; numbers in meta-llama/llama-models `apply_scaling`).

    Waves that fit `high_freq_factor` times into the old context stay, those that do not fit `low_freq_factor` times are
    slowed by `factor`, and between the two the speeds are blended.
    """
    turns = rope.context * plain / (2 * math.pi)  # of each wave, over the old context
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = np.clip(share, 0.0, 1.0)
    return share * plain + (1 - share) * plain / rope.factor


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071, section 3.2): as `_llama3`, with a ramp that is linear in the dimension."""

    def dimension(turns: float) -> float:
        """The pair of dimensions, as a fraction, whose wave makes so many turns over the old context."""
        return head_dim * math.log(rope.context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the authors' code avoids the division by zero
    slowed = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return slowed * plain / rope.factor + (1 - slowed) * plain


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """The square root of YaRN's temperature (arXiv:2309.00071, equation 22), on cos and sin alike."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
