"""Adapters' files of every method that PEFT has; how cases are made of them: peft_files.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import heads
import peft
from common import Case
from peft_files import SEQ2SEQ, File, loaded

PRUNED = [True, False, True, False], [False, True, True, True]
QV, QDOWN = ["q_proj", "v_proj"], ["q_proj", "down_proj"]


def lora(
    variant: str, flags: str, comment: str = "", family: str = "llama", method: str = "lora", **options: Any
) -> File:
    more = {name: options.pop(name) for name in ("settings", "head", "agrees") if name in options}
    options = {"r": 2, "lora_alpha": 6, "target_modules": QV} | options
    return File(method, variant, peft.LoraConfig(**options), family, flags=f"KeyNames {flags}", comment=comment, **more)


def files() -> Iterator[File]:
    yield lora("plain", "Scaling TransposedFactor")
    yield lora("rslora", "RsLoraScale", target_modules="all-linear", use_rslora=True)
    yield lora(
        "patterns",
        "RankPattern AlphaPattern",
        "keys are regular expressions for the ends of names, from a dot on",
        target_modules="all-linear",
        rank_pattern={r"mlp\..*": 3, "0.self_attn.k_proj": 1},
        alpha_pattern={"(gate|up)_proj": 1, "^model.layers.0.self_attn.q_proj": 2},
    )
    yield lora(
        "layers", "TargetNames", "the second layer alone", settings={"num_hidden_layers": 2}, layers_to_transform=[1]
    )
    yield lora(
        "excluded", "TargetNames", target_modules="all-linear", exclude_modules=["down_proj", "self_attn.v_proj"]
    )
    yield lora("expression", "TargetNames", "one regular expression", target_modules=r".*\.[0-9]+\.mlp\.(up|down)_proj")
    yield lora(
        "eva",
        "RankPattern AlphaPattern",
        "init_lora_weights says how first values were made, which is over",
        init_lora_weights="eva",
        rank_pattern={"model.layers.0.self_attn.q_proj": 3},
        alpha_pattern={"model.layers.0.self_attn.q_proj": 9},
        eva_config=peft.EvaConfig(),
    )
    biased = {"attention_bias": True, "mlp_bias": True}
    yield lora("bias", "SavedBias", "biases of the targets are in the file", settings=biased, bias="lora_only")
    yield lora(
        "bias-all",
        "SavedBias",
        "every bias, in the file as base_layer.bias at targets",
        "gpt2",
        target_modules=["c_attn"],
        bias="all",
    )
    yield lora(
        "embedding",
        "EmbeddingFactors",
        "A is (r, vocab), B (dim, r); the table is in the file, too",
        target_modules=["embed_tokens", "v_proj"],
    )
    yield lora("saved", "ModulesToSave", "whole layers are in the file", modules_to_save=["lm_head", "norm"])
    yield lora("tied", "TiedEmbedding", "the head shares the table", "qwen2")
    yield lora(
        "gpt2",
        "FanInFanOut",
        "weights are (in, out), the file's factors as ever",
        "gpt2",
        target_modules=["c_attn", "c_proj"],
    )
    head = {"family": "bert", "target_modules": ["query", "value"]}
    yield lora(
        "classifier",
        "ModulesToSave Pooler",
        "the head comes with the file, the pooler with the model",
        head=heads.SEQUENCE,
        **head,
    )
    yield lora("tags", "ModulesToSave", "the head comes with the file", head=heads.TOKENS, **head)
    roberta = {"family": "roberta", "head": heads.SEQUENCE}
    comment = "a head of two layers, classifier.dense and classifier.out_proj, comes with the file"
    yield lora("roberta", "ModulesToSave Pooler", comment, target_modules=["query", "value"], **roberta)
    deberta = {"family": "deberta-v2", "head": heads.SEQUENCE, "target_modules": ["query_proj", "value_proj"]}
    yield lora("deberta", "ModulesToSave Pooler", "positions go through the adapted layers, too", **deberta)
    comment = "encoder, decoder, and what the decoder reads of the encoder"
    yield lora("t5", "TargetNames", comment, "t5", target_modules=["q", "v"], head=SEQ2SEQ)
    yield lora("plain", "DoraNormOfRows MagnitudeName", "alpha is not r", method="dora", use_dora=True)
    yield lora(
        "gpt2", "DoraNormOfRows MagnitudeName FanInFanOut", "", "gpt2", "dora", target_modules=["c_attn"], use_dora=True
    )
    fitted = "the frozen weight is without the first values, which a reader computes again"
    yield lora("plain", "PissaRank FittedAgain", fitted, method="pissa", init_lora_weights="pissa", agrees=False)
    yield lora("plain", "OloraScale FittedAgain", fitted, method="olora", init_lora_weights="olora", agrees=False)
    yield lora(
        "gpt2",
        "OloraScale FittedAgain FanInFanOut",
        fitted + "; PEFT 0.21 cannot here",
        "gpt2",
        "olora",
        target_modules=["c_attn"],
        init_lora_weights="pissa",
        agrees=False,
    )
    adalora = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9}
    yield File("adalora", "plain", peft.AdaLoraConfig(**adalora, target_modules=QV), flags="KeyNames AdaloraScale")
    left = {f"model.layers.0.self_attn.{name}.lora_E": flags for name, flags in zip(QV, PRUNED, strict=True)}
    yield File(
        "adalora",
        "pruned",
        peft.AdaLoraConfig(**adalora, target_modules=QV),
        flags="KeyNames AdaloraScale RankPattern",
        left=left,
        comment="rank_pattern has flags of triplets; the scale is that of init_r",
    )
    yield File(
        "vera",
        "plain",
        peft.VeraConfig(r=3, target_modules=QDOWN),
        flags="KeyNames VeraShared",
        comment="A and B of the largest sides, once",
    )
    drawn = peft.VeraConfig(r=3, target_modules=QDOWN, save_projection=False, projection_prng_key=11)
    yield File(
        "vera",
        "drawn",
        drawn,
        flags="DrawnAgain VeraShared",
        comment="A and B are what torch draws from the seed in the config, on a CPU",
    )
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 4}}
    yield File(
        "loha",
        "patterns",
        peft.LoHaConfig(r=2, alpha=6, target_modules=QV, **patterns),
        flags="KeyNames RankPattern AlphaPattern HadamardOfProducts",
    )
    yield File("lokr", "plain", peft.LoKrConfig(r=1, alpha=3, target_modules=QDOWN), flags="KeyNames KroneckerOrder")
    yield File(
        "lokr",
        "both",
        peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=QDOWN),
        flags="KeyNames KroneckerOrder",
    )
    yield File("hira", "plain", peft.HiraConfig(r=2, target_modules=QV))
    yield File(
        "delora",
        "plain",
        peft.DeloraConfig(r=2, target_modules=QV),
        flags="KeyNames DeloraNorms",
        comment="the norms of the frozen weight are those in the file",
    )
    yield File(
        "ia3",
        "plain",
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        flags="KeyNames Ia3InputSide",
        comment="(out, 1) or (1, in)",
    )
    yield File(
        "ia3",
        "gpt2",
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        "gpt2",
        flags="KeyNames Ia3InputSide FanInFanOut",
    )
    yield File("ln_tuning", "plain", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    yield File("ln_tuning", "gpt2", peft.LNTuningConfig(target_modules=["ln_1", "ln_f"]), "gpt2")
    yield File(
        "shira",
        "plain",
        peft.ShiraConfig(r=1, target_modules=["q_proj"]),
        flags="KeyNames SparseIndices",
        comment="places are in the file",
    )
    yield File(
        "trainable_tokens",
        "plain",
        peft.TrainableTokensConfig(token_indices=[7, 3]),
        flags="KeyNames TokensReplace",
        comment="rows in the order of token_indices",
    )
    yield File(
        "trainable_tokens",
        "tied",
        peft.TrainableTokensConfig(token_indices=[7, 3]),
        "qwen2",
        flags="KeyNames TokensReplace TokensOfHead",
        comment="the head, which is tied, has the rows as well",
    )
    yield File(
        "trainable_tokens",
        "masked",
        peft.TrainableTokensConfig(token_indices=[7, 3], target_modules=["word_embeddings"]),
        "bert",
        flags="KeyNames TokensReplace TokensOfHead",
        comment="the tied head has a bias, too; PEFT 0.21 leaves it out",
        head=heads.MASKED,
        agrees=False,
    )
    yield File("prompt_tuning", "plain", peft.PromptTuningConfig(num_virtual_tokens=3), flags="KeyNames PromptFirst")
    yield File(
        "multitask_prompt",
        "task",
        peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=2),
        flags="KeyNames PromptFirst TaskFactor",
        comment="the first of three tasks",
    )
    yield File(
        "p_tuning",
        "plain",
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5),
        flags="KeyNames PromptFirst",
        comment="the file has what the network gave",
    )
    yield File(
        "prefix_tuning",
        "plain",
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        settings={"num_hidden_layers": 2, "num_key_value_heads": 2},
        flags="KeyNames PrefixOrder PrefixPositions",
        comment="columns: layer by layer keys of all heads, then values",
    )
    yield File(
        "prefix_tuning",
        "gqa",
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        flags="KeyNames PrefixOrder PrefixGroupedQuery",
    )
    yield File(
        "prefix_tuning",
        "gpt2",
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        "gpt2",
        flags="KeyNames PrefixOrder PrefixPositions",
    )
    yield File(
        "llama_adapter",
        "plain",
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
        settings={"num_hidden_layers": 2},
        flags="KeyNames AdaptionGate AdaptionSoftmax",
        comment="the last layer alone",
    )
    yield File(
        "oft", "series", peft.OFTConfig(oft_block_size=4, target_modules=QV), flags="KeyNames OftSeries OftDirection"
    )
    yield File(
        "oft",
        "exact",
        peft.OFTConfig(oft_block_size=4, target_modules=QV, use_cayley_neumann=False),
        flags="KeyNames OftDirection",
        comment="PEFT's exact form turns the other way than its series",
    )
    yield File(
        "oft",
        "share",
        peft.OFTConfig(oft_block_size=4, target_modules=QV, block_share=True),
        flags="KeyNames SharedBlocks",
    )
    yield File(
        "boft",
        "plain",
        peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["q_proj"]),
        flags="KeyNames ButterflyOrder",
        comment="three factors; PEFT 0.21 computes one where it cannot compile for CUDA",
    )
    yield File("hra", "plain", peft.HRAConfig(r=2, target_modules=QV), flags="KeyNames ReflectionOrder")
    yield File(
        "road", "plain", peft.RoadConfig(variant="road_1", group_size=4, target_modules=QV), flags="KeyNames RoadPlanes"
    )
    yield File(
        "road", "four", peft.RoadConfig(variant="road_4", group_size=4, target_modules=QV), flags="KeyNames RoadPlanes"
    )
    yield File(
        "c3a",
        "plain",
        peft.C3AConfig(block_size=4, target_modules=QV),
        flags="KeyNames CirculantDirection CirculantScale",
    )
    yield File(
        "fourierft",
        "plain",
        peft.FourierFTConfig(n_frequency=7, random_loc_seed=3, n_frequency_pattern={"v_proj": 5}, target_modules=QV),
        flags="KeyNames DrawnAgain FourierPlaces",
        comment="places are what torch draws from the seed in the config",
    )
    yield File("miss", "plain", peft.MissConfig(r=2, target_modules=QV), flags="KeyNames MissShards")
    yield File(
        "miss",
        "mini",
        peft.MissConfig(r=2, mini_r=2, init_weights="mini", target_modules=QV),
        flags="KeyNames MissShards",
    )
    yield File(
        "vblora",
        "plain",
        peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=4, target_modules=QV),
        flags="KeyNames TopOfLogits",
        comment="the bank is there once",
    )
    yield File(
        "randlora",
        "plain",
        peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["q_proj"]),
        flags="KeyNames RandomColumns",
        comment="A and B are there once for the model, and again in every layer",
    )


def cases() -> Iterator[Case]:
    warnings.simplefilter("ignore")
    for file in files():
        yield loaded(file)
