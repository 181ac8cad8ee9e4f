"""Methods at linear layers whose matrices have a structure: rotations, reflections, circulants, blocks, few numbers."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import torch
from common import Case
from linear_methods import Equation, Variant, cases_of, shapes_of


def cases() -> Iterator[Case]:
    yield from oft()


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
