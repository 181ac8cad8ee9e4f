"""Methods at linear layers whose matrices have a structure: rotations, reflections, circulants, blocks, few numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import peft
import torch
from common import Case
from linear_methods import Equation, Variant, cases_of, dropout_of, shapes_of
from peft.tuners.boft import layer as peft_boft


def cases() -> Iterator[Case]:
    yield from oft()
    yield from boft()
    yield from hra()
    yield from road()
    yield from c3a()
    yield from fourierft()
    yield from miss()
    yield from vblora()
    yield from randlora()


# ---- OFT ---------------------------------------------------------------------------------------------------------


FAR = "S has numbers around 1, for which the series is no rotation: R R^T is up to 42 away from I"


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
    yield from cases_of(
        replace(equation, start=lambda letters, weight, config: {"S": 3 * letters["S"]}),
        Variant("far", neumann | {"block_size": 3}, inp=6, comment=FAR, flags="OftSeries"),
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
        flags="OftSide ReflectionOrder Householder",
    )
    yield from cases_of(
        equation,
        *shapes_of(config, peft_conv1d=False),
        Variant("four", {"r": 4}, inp=6, comment="reflections do not commute"),
        models=config,
    )


# ---- RoAd --------------------------------------------------------------------------------------------------------


def road_matrix(t: dict, config: dict, out: int) -> torch.Tensor:
    """R (out, out), plane by plane."""
    group, half = config["group_size"], config["group_size"] // 2
    R = torch.zeros(out, out, dtype=t["theta"].dtype)
    for g in range(out // group):
        for j in range(half):
            for side, here, there in (
                (0, g * group + j, g * group + half + j),
                (1, g * group + half + j, g * group + j),
            ):
                if config["numbers"] == 1:
                    first = second = g * half + j
                elif config["numbers"] == 2:
                    first = second = here
                else:
                    first, second = 2 * g * group + side * half + j, (2 * g + 1) * group + side * half + j
                R[here, here] = t["alpha"][first] * torch.cos(t["theta"][first])
                R[here, there] = (1 if side else -1) * t["alpha"][second] * torch.sin(t["theta"][second])
    return R


def road() -> Iterator[Case]:
    config = {"numbers": 1, "group_size": 2}

    def trained(config, out, inp):
        return dict.fromkeys(("theta", "alpha"), (out * config["numbers"] // 2,))

    equation = Equation(
        "road",
        "arXiv:2409.00119, section 3.2; the planes: PEFT's, by the authors",
        trained,
        lambda f, x, weight, t, config: f(x) @ road_matrix(t, config, len(weight)).mT,
        merged=lambda weight, t, config: road_matrix(t, config, len(weight)) @ weight,
        merged_bias=lambda bias, t, config: road_matrix(t, config, len(bias)) @ bias,
        start=lambda letters, weight, config: letters | {"alpha": letters["alpha"] + np.float32(1)},
        peft=lambda config, targets: peft.RoadConfig(
            variant=f"road_{config['numbers']}", group_size=config["group_size"], target_modules=targets
        ),
        names={"theta": "road_theta.default", "alpha": "road_alpha.default"},
        flags="RoadPlanes",
    )
    yield from cases_of(
        equation,
        *shapes_of(config, peft_conv1d=False),
        Variant("two", {"numbers": 2, "group_size": 4}, out=8, bias=True),
        Variant("four", {"numbers": 4, "group_size": 4}, out=8, bias=True),
        Variant("one-group", {"numbers": 1, "group_size": 6}, comment="outputs 0 and 3, 1 and 4, 2 and 5"),
        models={"numbers": 4, "group_size": 4},
    )


# ---- C3A ---------------------------------------------------------------------------------------------------------


def circulant(kernel: torch.Tensor) -> torch.Tensor:
    """Blocks whose first row is the kernel's, each row the one above turned by one."""
    rows = [torch.stack([row.roll(j) for j in range(len(row))]) for row in kernel.flatten(0, 1)]
    return torch.cat([torch.cat(list(blocks), 1) for blocks in torch.stack(rows).unflatten(0, kernel.shape[:2])])


def c3a() -> Iterator[Case]:
    config = {"block_size": 2}
    wrong = "PEFT 0.21 has another gradient of x for blocks of more than two, which is not that of its output"

    def trained(config, out, inp):
        size = config["block_size"]
        return {"kernel": (out // size, inp // size, size)}

    equation = Equation(
        "c3a",
        "arXiv:2407.19342, section 3; 1 / in: the authors' code",
        trained,
        lambda f, x, weight, t, config: f(x) + x @ circulant(t["kernel"]).mT / x.shape[-1],
        merged=lambda weight, t, config: weight + circulant(t["kernel"]) / weight.shape[1],
        start=lambda letters, weight, config: {"kernel": letters["kernel"] * np.float32(8)},
        peft=lambda config, targets: peft.C3AConfig(block_size=config["block_size"], target_modules=targets),
        names={"kernel": "c3a_kernel.default"},
        flags="CirculantDirection CirculantScale",
        flags_on_models="CirculantGradient",
    )
    yield from cases_of(
        equation,
        *shapes_of(config, peft_conv1d=False),
        Variant("three", {"block_size": 3}, out=3, inp=6, peft=False, comment=wrong, flags="CirculantGradient"),
        Variant("one-block", {"block_size": 5}, out=5, inp=5, bias=True, peft=False, flags="CirculantGradient"),
        models={"block_size": 4},
    )


# ---- FourierFT ---------------------------------------------------------------------------------------------------


def fourier_update(t: dict, config: dict, weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(config["places_seed"])
    places = torch.randperm(weight.numel(), generator=generator)[: config["frequencies"]]
    spectrum = torch.zeros(weight.numel(), dtype=weight.dtype).index_put((places,), t["c"])
    return config["scaling"] * torch.fft.ifft2(spectrum.reshape(weight.shape)).real


def fourierft() -> Iterator[Case]:
    config = {"frequencies": 7, "scaling": 10.0, "places_seed": 777}
    equation = Equation(
        "fourierft",
        "arXiv:2405.03003, section 3.1; places: PEFT's",
        lambda config, out, inp: {"c": (config["frequencies"],)},
        lambda f, x, weight, t, config: f(x) + x @ fourier_update(t, config, weight).mT,
        merged=lambda weight, t, config: weight + fourier_update(t, config, weight),
        peft=lambda config, targets: peft.FourierFTConfig(
            n_frequency=config["frequencies"],
            scaling=config["scaling"],
            random_loc_seed=config["places_seed"],
            target_modules=targets,
        ),
        names={"c": "fourierft_spectrum.default"},
        flags="FourierScale FourierPlaces",
    )
    yield from cases_of(
        equation,
        *shapes_of(config),
        Variant("odd", config | {"frequencies": 9}, out=5, inp=7, comment="odd sides"),
        Variant("seed", config | {"places_seed": 3, "scaling": 150.0}, out=4, inp=6),
        Variant("all", config | {"frequencies": 24}, comment="every place"),
        models=config,
    )


# ---- MiSS --------------------------------------------------------------------------------------------------------


def shards(M: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """M^T (out, r) again and again, to the right and, where it has fewer rows, down: (out, in)."""
    rows, columns = torch.arange(out) % M.shape[1], torch.arange(inp) % len(M)
    return M.mT[rows][:, columns]


def miss() -> Iterator[Case]:
    config = {"r": 2, "mini_r": None}
    equation = Equation(
        "miss",
        "arXiv:2409.15371, section 3",
        lambda config, out, inp: {"M": (config["r"], config["mini_r"] or out)},
        lambda f, x, weight, t, config: f(x) + x @ shards(t["M"], *weight.shape).mT,
        merged=lambda weight, t, config: weight + shards(t["M"], *weight.shape),
        peft=lambda config, targets: peft.MissConfig(
            r=config["r"],
            mini_r=config["mini_r"] or 1,
            init_weights="mini" if config["mini_r"] else True,
            target_modules=targets,
        ),
        names={"M": "miss_block.default"},
        flags="MissShards",
    )
    yield from cases_of(
        equation,
        *shapes_of(config, peft_conv1d=False),
        Variant("rest", {"r": 3, "mini_r": None}, inp=7, comment="the last shard has one input"),
        Variant("mini", {"r": 2, "mini_r": 3}, bias=True),
        dropout_of(config),
        models={"r": 4, "mini_r": 2},
    )


# ---- VB-LoRA -----------------------------------------------------------------------------------------------------


def mixtures(logits: torch.Tensor, bank: torch.Tensor, topk: int) -> torch.Tensor:
    """The weighted sum of the `topk` vectors with the largest logits."""
    top = logits.topk(topk, dim=-1)
    return (torch.softmax(top.values, dim=-1)[..., None] * bank[top.indices]).sum(-2)


def vblora_factors(t: dict, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = (mixtures(t[name], t["bank"], config["topk"]) for name in ("logits_A", "logits_B"))
    return A.flatten(1), torch.cat(list(B.mT))


def vblora() -> Iterator[Case]:
    config = {"r": 2, "num_vectors": 5, "vector_length": 2, "topk": 2}

    def trained(config, out, inp):
        r, length, count = config["r"], config["vector_length"], config["num_vectors"]
        return {"logits_A": (r, inp // length, count), "logits_B": (out // length, r, count)}

    def value(f, x, weight, t, config):
        A, B = vblora_factors(t, config)
        return f(x) + x @ A.mT @ B.mT

    def merged(weight, t, config):
        A, B = vblora_factors(t, config)
        return weight + B @ A

    equation = Equation(
        "vblora",
        "arXiv:2405.15179, section 3",
        trained,
        value,
        merged=merged,
        bank=lambda config: {"bank": (config["num_vectors"], config["vector_length"])},
        peft=lambda config, targets: peft.VBLoRAConfig(**config, target_modules=targets),
        names={
            "logits_A": "vblora_logits_A.default",
            "logits_B": "vblora_logits_B.default",
            "shared.bank": "vblora_vector_bank.default",
        },
        flags="TopOfLogits",
    )
    yield from cases_of(
        equation,
        *shapes_of(config),
        Variant("three", config | {"vector_length": 1, "topk": 3}, out=3, inp=5),
        Variant("all", config | {"topk": 5}, comment="every vector"),
        dropout_of(config),
        models=config | {"vector_length": 4},
    )


# ---- RandLoRA ----------------------------------------------------------------------------------------------------


def randlora_update(t: dict, config: dict, weight: torch.Tensor) -> torch.Tensor:
    """The sum of B_j L_j A G_j (larger side, smaller side), so turned that it is (out, in)."""
    (out, inp), (count, small) = weight.shape, t["G"].shape
    A, B = t["A"][:, 0, :small], t["B"][: max(out, inp), :count].flatten(1)
    terms = [B[:, j::count] @ torch.diag(t["L"][:, j]) @ A @ torch.diag(t["G"][j]) for j in range(count)]
    return config["alpha"] / config["r"] * (sum(terms) if inp == small else sum(terms).mT)


def randlora() -> Iterator[Case]:
    config = {"r": 2, "alpha": 6.0}

    def trained(config, out, inp):
        count = -(-min(out, inp) // config["r"])
        return {"L": (config["r"], count), "G": (count, min(out, inp))}

    def shared(config, out, inp):
        count = -(-min(out, inp) // config["r"])
        return {"A": (config["r"], 1, min(out, inp)), "B": (max(out, inp), count, config["r"])}

    equation = Equation(
        "randlora",
        "arXiv:2502.00987, section 4; which columns of B make a term: PEFT's, by the authors",
        trained,
        lambda f, x, weight, t, config: f(x) + x @ randlora_update(t, config, weight).mT,
        merged=lambda weight, t, config: weight + randlora_update(t, config, weight),
        shared=shared,
        peft=lambda config, targets: peft.RandLoraConfig(
            r=config["r"], randlora_alpha=config["alpha"], target_modules=targets
        ),
        names={"L": "randlora_lambda.default", "G": "randlora_gamma.default"},
        peft_constants={"A": "randlora_A.default", "B": "randlora_B.default"},
        flags="Scaling RandomColumns",
    )
    yield from cases_of(
        equation,
        *shapes_of(config),
        Variant("narrow", config, out=3, inp=8, bias=True, comment="more inputs than outputs; the last term is cut"),
        dropout_of(config),
        Variant("three", config | {"r": 3}, out=6, inp=7, comment="N and r differ, so that columns of B show"),
        models=config | {"r": 3},
    )
