"""Methods at linear layers whose matrices have a structure: rotations, reflections, circulants, blocks, few numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import peft
import torch
from common import Case
from linear_methods import Equation, Variant, cases_of, shapes_of
from peft.tuners.boft import layer as peft_boft


def cases() -> Iterator[Case]:
    yield from oft()
    yield from boft()
    yield from hra()


# ---- OFT ---------------------------------------------------------------------------------------------------------


def skew(above: torch.Tensor, n: int) -> torch.Tensor:
    """S (blocks, n, n) with S^T = -S; `above` the diagonal row by row."""
    rows, columns = torch.triu_indices(n, n, 1)
    S = above.new_zeros(len(above), n, n)
    S[:, rows, columns] = above
    return S - S.mT


def oft_rotation(t: dict, config: dict, inp: int) -> torch.Tensor:
    n = config["block_size"]
    S, one = skew(t["S"], n), torch.eye(n, dtype=t["S"].dtype)
    if config["cayley"] == "exact":
        R = (one + S) @ torch.linalg.inv(one - S)
    else:
        powers = [torch.linalg.matrix_power(S, k) for k in range(config["terms"])]
        R = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
    return torch.block_diag(*(R if len(R) > 1 else R.expand(inp // n, n, n)))


def oft() -> Iterator[Case]:
    config = {"block_size": 2, "block_share": False, "cayley": "exact", "terms": 5}
    neumann = config | {"cayley": "neumann"}

    def trained(config, out, inp):
        n = config["block_size"]
        return {"S": (1 if config["block_share"] else inp // n, n * (n - 1) // 2)}

    equation = Equation(
        "oft",
        "arXiv:2306.07280, section 3; the series: PEFT's",
        trained,
        lambda f, x, weight, t, config: f(x @ oft_rotation(t, config, x.shape[-1])),
        merged=lambda weight, t, config: weight @ oft_rotation(t, config, weight.shape[1]).mT,
        peft=lambda config, targets: peft.OFTConfig(
            oft_block_size=config["block_size"],
            block_share=config["block_share"],
            use_cayley_neumann=True,
            num_cayley_neumann_terms=config["terms"],
            target_modules=targets,
        ),
        names={"S": "oft_R.default.weight"},
        flags="OftDirection OftSide",
    )
    three = config | {"block_size": 3}
    yield from cases_of(
        equation,
        *shapes_of(config, peft=False),
        Variant("three", three, inp=6, peft=False, comment="(I + S) (I - S)^-1; PEFT 0.21 has the inverse here"),
        Variant("one-block", config | {"block_size": 4}, peft=False),
        Variant("share", three | {"block_share": True}, inp=6, peft=False, flags="SharedBlocks"),
        Variant(
            "neumann", neumann | {"block_size": 3}, inp=6, comment="I + 2 S + 2 S^2 + 2 S^3 + S^4", flags="OftSeries"
        ),
        Variant("neumann-terms", neumann | {"block_size": 4, "terms": 6}, bias=True, flags="OftSeries BaseBias"),
        models=config | {"block_size": 4},
    )


# ---- BOFT --------------------------------------------------------------------------------------------------------


class BlockDiagonal:
    """What PEFT's CUDA extension does, without which PEFT computes one factor alone."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


peft_boft.get_fbd_cuda = lambda: True
peft_boft.FastBlockDiag = BlockDiagonal


def boft_rotation(t: dict, config: dict) -> torch.Tensor:
    n, half = config["block_size"], config["block_size"] // 2
    one, product = torch.eye(n, dtype=t["A"].dtype), None
    for number, A in enumerate(t["A"]):
        S, apart = (A - A.mT) / 2, 2**number
        inp = len(A) * n
        # the inputs in the order in which the blocks take them: halves that lie `apart` halves from each other
        order = torch.arange(inp).reshape(-1, 2, apart, half).transpose(1, 2).flatten() if number else torch.arange(inp)
        place = torch.argsort(order)
        factor = torch.block_diag(*((one - S) @ torch.linalg.inv(one + S)))[place][:, place]
        product = factor if product is None else factor @ product
    return product


def boft() -> Iterator[Case]:
    config = {"block_size": 2, "butterfly_factors": 2}

    def trained(config, out, inp):
        n = config["block_size"]
        return {"A": (config["butterfly_factors"], inp // n, n, n), "s": (out,)}

    def value(f, x, weight, t, config):
        return (x @ boft_rotation(t, config)) @ weight.mT * t["s"] + f(torch.zeros_like(x))

    equation = Equation(
        "boft",
        "arXiv:2311.06243, section 4; S and its sign: the authors' code",
        trained,
        value,
        merged=lambda weight, t, config: t["s"][:, None] * (weight @ boft_rotation(t, config).mT),
        merged_bias=lambda bias, t, config: bias,
        start=lambda letters, weight, config: letters | {"s": letters["s"] + np.float32(1)},
        peft=lambda config, targets: peft.BOFTConfig(
            boft_block_size=config["block_size"],
            boft_n_butterfly_factor=config["butterfly_factors"],
            target_modules=targets,
        ),
        names={"A": "boft_R.default", "s": "boft_s.default"},
        flags="OftSide ButterflyOrder",
    )
    yield from cases_of(
        equation,
        *shapes_of(config, peft_conv1d=False),
        Variant("one-factor", config | {"block_size": 3, "butterfly_factors": 1}, inp=6, bias=True, flags="BaseBias"),
        Variant("three-factors", config | {"butterfly_factors": 3}, inp=8),
        Variant("wide-blocks", {"block_size": 4, "butterfly_factors": 2}, inp=16, out=5),
        models=config,
    )


# ---- HRA ---------------------------------------------------------------------------------------------------------


def reflections(t: dict) -> torch.Tensor:
    """H_1 ... H_r"""
    product = torch.eye(len(t["U"]), dtype=t["U"].dtype)
    for u in t["U"].mT:
        product = product @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return product


def hra() -> Iterator[Case]:
    config = {"r": 2}
    equation = Equation(
        "hra",
        "arXiv:2405.17484, section 3.1",
        lambda config, out, inp: {"U": (inp, config["r"])},
        lambda f, x, weight, t, config: f(x @ reflections(t).mT),
        merged=lambda weight, t, config: weight @ reflections(t),
        peft=lambda config, targets: peft.HRAConfig(r=config["r"], target_modules=targets),
        names={"U": "hra_u.default"},
        flags="OftSide ReflectionOrder",
    )
    yield from cases_of(
        equation,
        *shapes_of(config, peft_conv1d=False),
        Variant("four", {"r": 4}, inp=6, comment="reflections do not commute"),
        models=config,
    )
