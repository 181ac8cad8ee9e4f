"""The words that some options take, known once for the configuration, the library and the commands. Nothing heavy."""

from typing import Literal, get_args

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "tf32", "bfloat16", "float64"]
Optimizer = Literal["adamw", "adamw8bit", "sgd", "lion", "adafactor"]
Overlong = Literal["error", "drop", "truncate", "split"]
Supervise = Literal["response", "all"]
Task = Literal["causal-lm", "seq2seq", "classify", "regress", "tag", "mlm", "embed"]
Into = Literal["original", "dequantized", "requantized"]

DEVICES: tuple[str, ...] = get_args(Device)
DTYPES: tuple[str, ...] = get_args(Dtype)
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
OVERLONG: tuple[str, ...] = get_args(Overlong)
SUPERVISE: tuple[str, ...] = get_args(Supervise)
TASKS: tuple[str, ...] = get_args(Task)
INTO: tuple[str, ...] = get_args(Into)

TF32_ON_THE_HOST = "dtype 'tf32' is for a GPU's tensor cores: choose device 'cuda' with it, or dtype 'float32'"
"""Said where both are asked for that do not go together."""
