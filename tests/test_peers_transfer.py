"""Prompts of several tasks against Hugging Face PEFT, task by task, and where a new one starts from."""

import dataclasses

import numpy as np
import pytest
import tiny
from test_peers_peft import FAMILIES, IDS, LIMIT, TARGETS, error, float64, peer, scrambled  # noqa: F401

from refpeft import adapters, files, sites

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

CONFIG = peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=2, task_type="CAUSAL_LM")


def logits_of(model, task: int):
    ids = torch.from_numpy(IDS).long()
    return model(input_ids=ids, task_ids=torch.full((len(ids),), task)).logits[:, -ids.shape[1] :]


def grown(model):
    """PEFT's first factors are so small that the prompt is nearly zero."""
    with torch.no_grad():
        for parameter in model.prompt_encoder["default"].parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return scrambled(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", range(3))
def test_each_task_gives_the_logits_and_gradients_of_peft(task, family, tmp_path):
    theirs = grown(peft.get_peft_model(peer(family, tmp_path), dataclasses.replace(CONFIG)))
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    files.write_json(file, files.read_json(file) | {"refpeft_task": task})
    ours = tiny.model(family)
    (adapter,) = adapters.load(ours, tmp_path / "adapter")
    logits = logits_of(theirs, task)
    assert error(ours(IDS).data, logits.detach().numpy()) < LIMIT

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(TARGETS).long().flatten()).backward()
    encoder, name = theirs.prompt_encoder["default"], adapter.sites[0].name
    got = tiny.gradients(ours, tiny.Batch(IDS, TARGETS))
    want = {"prompt": encoder.embedding.weight.grad}
    want |= {f"cols{task}": encoder.prefix_task_cols.grad[task], f"rows{task}": encoder.prefix_task_rows.grad[task]}
    assert got.keys() == {f"{name}.{letters}" for letters in want}
    for letters, gradient in want.items():
        assert error(got[f"{name}.{letters}"], gradient.numpy()) < LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_a_prompt_of_several_tasks(family, tmp_path):
    ours = tiny.model(family)
    adapter = sites.attach(ours, "multitask_prompt", {"tokens": 4, "tasks": 3, "task": 1, "ranks": 2})
    tiny.scramble(adapter, scale=0.5)
    for tensor in (adapter.params | adapter.constants).values():
        tensor.data[...] = tensor.data.astype("f4")
    adapters.save(tmp_path / "adapter", ours)
    theirs = peft.PeftModel.from_pretrained(peer(family, tmp_path), tmp_path / "adapter").double().eval()
    assert error(ours(IDS).data, logits_of(theirs, 1).detach().numpy()) < LIMIT


@pytest.mark.parametrize("start", ["average", "exact"])
def test_a_new_task_starts_where_that_of_peft_does(start, tmp_path):
    theirs = grown(peft.get_peft_model(peer("llama", tmp_path), dataclasses.replace(CONFIG)))
    source = tmp_path / "source"
    theirs.save_pretrained(source)
    started = dataclasses.replace(
        CONFIG,
        num_tasks=1,
        prompt_tuning_init=f"{start.upper()}_SOURCE_TASK{'S' * (start == 'average')}",
        prompt_tuning_init_state_dict_path=str(source / "adapter_model.safetensors"),
        prompt_tuning_init_task=2,
    )
    new = peft.get_peft_model(peer("llama", tmp_path), started).double().eval()
    file = source / "adapter_config.json"
    files.write_json(file, files.read_json(file) | {"refpeft_task": 0})
    ours = tiny.model()
    options = {"tokens": 3, "ranks": 2, "source": str(source), "start": start}
    sites.attach(ours, "multitask_prompt", options | ({"source_task": 2} if start == "exact" else {}))
    assert np.abs(ours(IDS).data - logits_of(new, 0).detach().numpy()).max() < 1e-5  # PEFT averages in float32
