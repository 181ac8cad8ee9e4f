import numpy as np
import pytest

from refpeft.errors import RefpeftError
from refpeft.models.config import from_hf
from refpeft.models.rope import inverse_frequencies

EPS = float(np.finfo(np.float32).eps)

# name: (most positions, rope_parameters, length, inverse frequencies for head_dim 16, attention factor); the last two
# from transformers 5.23, ROPE_INIT_FUNCTIONS, which computes in float32.
CASES = {
    "default": (
        256,
        {"rope_type": "default", "rope_theta": 1e4},
        0,
        [1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 10**-2.5, 0.001, 10**-3.5],
        1.0,
    ),
    "linear": (
        256,
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        0,
        [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.0025, 0.000790569466, 0.00025, 7.90569466e-05],
        1.0,
    ),
    "dynamic, longer than the context": (
        256,
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        1000,
        [1.0, 0.240412042, 0.057797946, 0.0138953235, 0.00334060285, 0.000803121133, 0.000193079992, 4.64187542e-05],
        1.0,
    ),
    "dynamic, within the context": (
        256,
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        100,
        [1.0, 0.316227764, 0.1, 0.0316227786, 0.01, 0.00316227786, 0.001, 0.000316227786],
        1.0,
    ),
    "llama3": (
        131072,
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        0,
        [1.0, 0.193922758, 0.0376060307, 0.00729266508, 0.000524846022, 3.42810235e-05, 6.64786967e-06, 1.28917316e-06],
        1.0,
    ),
    "yarn": (
        1024,
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256},
        0,
        [1.0, 0.25693506, 0.0625, 0.0138349654, 0.0025, 0.000790569466, 0.00025, 7.90569466e-05],
        1.138629436111989,
    ),
    "yarn with all its numbers": (
        1024,
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "truncate": False,
        },
        0,
        [1.0, 0.28740859, 0.0424417965, 0.00395284733, 0.00125, 0.000395284733, 0.000125, 3.95284733e-05],
        1.0544565075669314,
    ),
    "yarn with an attention factor": (
        1024,
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "attention_factor": 1.5,
        },
        0,
        [1.0, 0.25693506, 0.0625, 0.0138349654, 0.0025, 0.000790569466, 0.00025, 7.90569466e-05],
        1.5,
    ),
}


def model(context: int, parameters: dict, dim: int = 32):
    sizes = {"vocab_size": 9, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return from_hf(
        {
            "model_type": "llama",
            "hidden_size": dim,
            "max_position_embeddings": context,
            "rope_parameters": parameters,
            **sizes,
        }
    )


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_the_stored_numbers(name):
    context, parameters, length, expected, expected_factor = CASES[name]
    config = model(context, parameters)
    found, factor = inverse_frequencies(config.rope, config.head_dim, length)
    assert found.dtype == np.float64 and found.shape == (8,)
    np.testing.assert_allclose(found, expected, rtol=8 * EPS)
    assert factor == pytest.approx(expected_factor, rel=1e-15)


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name in CASES if name != "default"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_are_those_of_transformers(name, head_dim):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    context, parameters, length, _, _ = CASES[name]
    theirs = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=context,
        rope_parameters=dict(parameters),
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu", seq_len=length)
    found, factor = inverse_frequencies(model(context, parameters, 2 * head_dim).rope, head_dim, length)
    # float32 powers with exponents up to 1 and bases up to e**16: a few eps, times ln(base)
    np.testing.assert_allclose(found, expected.numpy(), rtol=32 * EPS)
    assert factor == pytest.approx(expected_factor, rel=1e-15)


def test_dynamic_scaling_refuses_heads_that_are_too_small():
    config = model(64, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, dim=4)
    with pytest.raises(RefpeftError, match="more than 2 dimensions"):
        inverse_frequencies(config.rope, config.head_dim, 5)
