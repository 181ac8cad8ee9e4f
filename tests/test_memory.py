"""What a training step keeps: bytes on the tape by formula, nothing of frozen weights, no needless gradient."""

import gc
import tracemalloc
import weakref

import numpy as np
import pytest
import tiny

from refpeft import fused, manager, sites
from refpeft.models.base import Model
from refpeft.quant import Quantizer
from refpeft.tape import Node
from refpeft.tensor import Tensor, parameter

SIZE = 4  # bytes of a float32
BATCH, TIME, RANK = 2, 9, 8


def nodes(tensor: Tensor) -> list[Node]:
    """Every node of the tape below `tensor`, leaves left out."""
    found, stack = {}, [tensor.node]
    while stack:
        node = stack.pop()
        if node is not None and node.op is not None and id(node) not in found:
            found[id(node)] = node
            stack.extend(node.parents)
    return list(found.values())


def arrays(value) -> list[np.ndarray]:
    """The arrays in saved values, also within tuples."""
    if isinstance(value, np.ndarray):
        return [value]
    return [array for one in value for array in arrays(one)] if isinstance(value, tuple) else []


def buffer(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def kept(tensor: Tensor, but: list[np.ndarray]) -> dict[int, int]:
    """Buffer -> bytes of all that the tape below `tensor` keeps, without the buffers of `but`."""
    left_out = {id(buffer(array)) for array in but}
    buffers = [buffer(array) for node in nodes(tensor) for array in arrays(node.saved)]
    return {id(b): b.nbytes for b in buffers if id(b) not in left_out}


def frozen(model: Model) -> list[np.ndarray]:
    """The model's frozen arrays, of norms and biases too."""
    return [site.weight() for site in model.sites.values() if site.weight] + [
        site.bias for site in model.sites.values() if site.bias is not None
    ]


def block(name: str, targets: list[str], trained_input: bool = True):
    """(model, output, bytes kept, input) of the last layer with LoRA on `targets`."""
    model = tiny.model(name, "float32")
    sites.attach(model, "lora", {"targets": targets, "r": RANK})
    x = np.random.default_rng(0).standard_normal((BATCH, TIME, model.config.dim)).astype("f4")
    x = parameter(x) if trained_input else Tensor(x)
    around = {"mask": fused.Mask(TIME), "cache": None}
    tables = []
    if name != "gpt2":
        tables = list(model._tables(np.arange(TIME)[None], TIME))
        around |= dict(zip(("cos", "sin"), tables, strict=True))
    out = model.layers[-1](x, **around)
    but = [*frozen(model), *tables, *(tensor.data for _, tensor in model.trained())]
    return model, out, sum(kept(out, but).values()), x


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_llama_block_with_lora_on_q_and_v_keeps_this_much(name):
    model, _, found, _ = block(name, ["q_proj", "v_proj"])
    c = model.config
    first_norm = c.dim + 1  # its input, normalized, and the factor of each row
    lora = c.dim + 2 * RANK  # the norm's output, which both A's read, and A x for each B
    attention = 2 * c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim + c.heads  # q and y, k and v, a number a row
    second_norm = c.dim + 1
    mlp = 2 * c.ff  # gate and up
    assert found == BATCH * TIME * SIZE * (first_norm + lora + attention + second_norm + mlp)


def test_the_first_trained_block_keeps_nothing_of_its_first_norm():
    model, _, found, _ = block("llama", ["q_proj", "v_proj"])
    _, _, first, _ = block("llama", ["q_proj", "v_proj"], trained_input=False)
    assert first == found - BATCH * TIME * SIZE * (model.config.dim + 1)


def test_a_gpt2_block_with_lora_on_q_k_and_v_keeps_this_much():
    model, _, found, _ = block("gpt2", ["c_attn"])
    c = model.config
    norms = 2 * (c.dim + 1)
    lora = c.dim + RANK
    attention = 3 * c.dim + c.dim + c.heads  # q, k and v are parts of one array; y; a number a row
    mlp = c.ff  # the slope of the GELU
    assert found == BATCH * TIME * SIZE * (norms + lora + attention + mlp)


def test_no_saved_array_is_a_frozen_matrix():
    for name in ("llama", "gpt2"):
        model, out, _, _ = block(name, ["all-linear"])
        matrices = {id(buffer(a)) for a in frozen(model) if a.ndim > 1}
        assert not any(id(buffer(a)) in matrices for node in nodes(out) for a in arrays(node.saved))


def loss_of(model: Model) -> tuple[Tensor, dict[int, int]]:
    """The loss of the tiny batch, and what its tape keeps beside frozen and trained values."""
    loss = model.loss(tiny.batch())
    return loss, kept(loss, [*frozen(model), *(tensor.data for _, tensor in model.trained())])


def test_quantized_weights_add_nothing_to_the_tape():
    plugin = manager.load("nf4")
    found = []
    for quantizer in (None, Quantizer(plugin, plugin.Config())):
        model = tiny.model("llama", "float32", quantizer)
        sites.attach(model, "lora")
        found.append(sum(loss_of(model)[1].values()))
    assert found[0] == found[1]


def test_with_checkpointing_only_the_blocks_inputs_are_kept():
    model = tiny.model("llama", "float32")
    sites.attach(model, "lora")
    model.checkpointing = True
    loss, buffers = loss_of(model)
    blocks = [node for node in nodes(loss) if node.op.name == "_recompute"]
    c, rows = model.config, tiny.batch().supervised
    assert len(blocks) == c.layers
    inputs = c.layers * BATCH * TIME * c.dim * SIZE
    end = rows * (c.dim + 1) * SIZE + rows * c.dim * SIZE  # the last norm; the gradient of its output
    assert sum(buffers.values()) == inputs + end


def test_the_tape_is_all_that_a_step_keeps(monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, "larger", tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 128})
    model = tiny.model("larger", "float32")
    sites.attach(model, "lora")
    batch = tiny.batch(8, 60)
    model.loss(batch).backward()  # so that gradients exist, and caches are warm
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        loss = model.loss(batch)
        held = tracemalloc.get_traced_memory()[0] - before
        tape = sum(kept(loss, [*frozen(model), *(tensor.data for _, tensor in model.trained())]).values())
        loss.backward()
        after = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert tape <= held <= 1.02 * tape + 50_000
    assert after < 50_000


# ---- nothing is computed for nobody ----------------------------------------------------------------------------------


def count_weights(model: Model) -> dict[str, int]:
    """How often the frozen matrix of each linear layer is asked for, from now on."""
    linear = [site for site in model.sites.values() if site.kind == "linear"]
    asked = {site.name: 0 for site in linear}

    def counting(site):
        weight = site.weight

        def count():
            asked[site.name] += 1
            return weight()

        site.weight = count

    for site in linear:
        counting(site)
    return asked


def test_gradients_below_the_first_trained_site_are_never_computed():
    model = tiny.model("llama", "float32")
    sites.attach(model, "lora", {"targets": ["v_proj"], "layers": [1]})
    asked = count_weights(model)
    loss = model.loss(tiny.batch())
    ops = [node.op.name for node in nodes(loss)]
    assert ops.count("attention") == ops.count("silu_mul") == 1  # the last layer's
    assert ops.count("rope") == 0 and ops.count("rms_norm") == 2  # v passes neither; of norms, those after attention
    loss.backward()
    once = {name for name in asked if name.startswith("model.layers.0.")}
    once |= {f"model.layers.1.self_attn.{p}_proj" for p in "qkv"} | {"lm_head"}
    assert asked == {name: 1 if name in once else 2 for name in asked}


@pytest.mark.parametrize("method", ["prefix_tuning", "ia3", "bitfit"])
def test_methods_on_the_last_layer_leave_the_first_alone(method):
    model = tiny.model("gpt2", "float32")
    sites.attach(model, method, {"layers": [1]})
    asked = count_weights(model)
    model.loss(tiny.batch()).backward()
    assert {count for name, count in asked.items() if name.startswith("transformer.h.0.")} == {1}


# ---- and it goes away ------------------------------------------------------------------------------------------------


def test_a_step_leaves_nothing_behind():
    model = tiny.model("llama", "float32")
    sites.attach(model, "lora")
    gc.collect()
    gc.disable()
    try:
        loss = model.loss(tiny.batch())
        saved = [weakref.ref(array) for node in nodes(loss) for array in arrays(node.saved)]
        ours = {id(a) for a in frozen(model)} | {id(tensor.data) for _, tensor in model.trained()}
        loss.backward()
        left = [ref() for ref in saved if ref() is not None and id(ref()) not in ours]
        assert left == []
    finally:
        gc.enable()
