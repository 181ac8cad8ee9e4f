"""Methods that start from the adapters of other tasks, or share them: what they take, and what they refuse."""

import numpy as np
import pytest
import tiny
from sources import prompts, write_prompt

from refpeft import adapters, files, sites
from refpeft.errors import RefpeftError
from refpeft.prompts import linear_values
from refpeft.rng import Stream
from refpeft.transfer import decoder_values, fitted_decoder, prompt

EMBED = "model.embed_tokens"


def saved(folder, method: str, options: dict):
    """A directory with an adapter of this method, moved away from its start; and its values."""
    model = tiny.model()
    adapter = sites.attach(model, method, options)
    tiny.scramble(adapter)
    adapters.save(folder, model)
    return str(folder), {name: value.data for name, value in (adapter.params | adapter.constants).items()}


def first_values(method: str, options: dict) -> dict[str, np.ndarray]:
    adapter = sites.attach(tiny.model(), method, options, seed=1)
    return {name.removeprefix(f"{EMBED}."): t.data for name, t in (adapter.params | adapter.constants).items()}


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt_tuning", {}),
        ("p_tuning", {"hidden": 4}),
        ("multitask_prompt", {"tasks": 2, "task": 1}),
        ("prompt_tuning", {"targets": ["embed_tokens"], "init": "ids", "ids": [3]}),
    ],
)
def test_the_prompt_of_any_method_is_the_rows_that_it_puts_first(method, options, tmp_path):
    model = tiny.model()
    tiny.scramble(sites.attach(model, method, {"tokens": 3} | options))
    adapters.save(tmp_path, model)
    rows = prompt(str(tmp_path), tiny.model().embed, 3)
    assert np.allclose(rows, model.embed(tiny.ids()).data[1, :3], atol=1e-6)


def test_a_source_without_such_a_prompt_is_an_error(tmp_path):
    embed = tiny.model().embed
    (source,) = prompts(1)
    with pytest.raises(RefpeftError, match="has 3 tokens, and tokens is 4"):
        prompt(source, embed, 4)
    other, _ = saved(tmp_path / "a", "trainable_tokens", {"token_indices": [3], "targets": ["@embed"]})
    with pytest.raises(RefpeftError, match="holds trainable_tokens, which has no prompt"):
        prompt(other, embed, 3)
    other, _ = saved(tmp_path / "b", "lora", {})
    with pytest.raises(RefpeftError, match=r"target .* matches no site"):
        prompt(other, embed, 3)
    wide = write_prompt(tmp_path / "wide", np.ones((3, 32)))
    with pytest.raises(RefpeftError, match=r"'prompt_embeddings' has shape \(3, 32\): expected \(3, 24\)"):
        prompt(wide, embed, 3)
    with pytest.raises(RefpeftError, match="holds no adapter"):
        prompt(str(tmp_path / "nowhere"), embed, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "spot.sources is empty: name an adapter directory"),
        ({"sources": ["a"], "top": 2}, "top is 2: expected 1 to 1"),
        ({"sources": ["a", "b"]}, "expected both or neither"),
        ({"sources": ["a"], "task": "b"}, "expected both or neither"),
    ],
)
def test_spot_without_what_it_starts_from_is_an_error(options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), "spot", options)


def test_spot_starts_from_the_source_most_similar_to_the_task():
    *three, task = prompts(4)
    embed = tiny.model().embed
    rows = [prompt(source, embed, 3) for source in three]
    near = prompt(task, embed, 3).mean(axis=0)
    cosines = [row.mean(axis=0) @ near / np.linalg.norm(row.mean(axis=0)) for row in rows]
    found = first_values("spot", {"tokens": 3, "sources": three, "task": task})["prompt"]
    assert np.allclose(found, rows[int(np.argmax(cosines))], rtol=1e-14)


def test_an_average_of_sources_that_are_not_similar_is_an_error(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 24))
    near, far, task = (write_prompt(tmp_path / name, rows * sign) for name, sign in (("a", 2), ("b", -1), ("c", 1)))
    options = {"tokens": 3, "sources": [near, far], "task": task}
    assert np.allclose(first_values("spot", options)["prompt"], 2 * rows, atol=1e-6)
    with pytest.raises(RefpeftError, match=r"spot.top is 2, and only 1 sources are similar to the task"):
        first_values("spot", options | {"top": 2})


# ---- prompts of several tasks ----------------------------------------------------------------------------------------

THREE = {"tokens": 3, "ranks": 2, "tasks": 3, "task": 2}


@pytest.mark.parametrize("start", ["average", "exact", "shared"])
def test_a_new_task_starts_from_those_before(start, tmp_path):
    source, values = saved(tmp_path, "multitask_prompt", THREE)
    values = {name.removeprefix(f"{EMBED}."): array for name, array in values.items()}
    options = {"tokens": 3, "ranks": 2, "source": source, "start": start}
    found = first_values("multitask_prompt", options | ({"source_task": 1} if start == "exact" else {}))
    assert np.array_equal(found["prompt"], values["prompt"])
    wanted = {"average": sum(values[f"rows{k}"] for k in range(3)) / 3, "exact": values["rows1"]}
    if start == "shared":
        assert np.array_equal(found["rows0"], first_values("multitask_prompt", {"tokens": 3, "ranks": 2})["rows0"])
    else:
        assert np.allclose(found["rows0"], wanted[start], rtol=1e-14)


def test_the_next_task_goes_on_with_all_that_is_there(tmp_path):
    source, values = saved(tmp_path, "multitask_prompt", THREE)
    adapter = sites.attach(tiny.model(), "multitask_prompt", THREE | {"task": 0, "source": source, "start": "all"})
    assert set(adapter.params) == {f"{EMBED}.{name}" for name in ("prompt", "cols0", "rows0")}
    for name, tensor in (adapter.params | adapter.constants).items():
        assert np.allclose(tensor.data, values[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 1}, "expected multitask_prompt of 3 tokens and 1 ranks"),
        ({"start": "exact", "source_task": 3}, "has 3 tasks, which does not go with tasks or source_task"),
        ({"start": "all"}, "has 3 tasks, which does not go with tasks"),
        ({"source": "", "start": "shared"}, "say what is taken from `source`"),
        ({"task": 1}, "task less than tasks, which is 1"),
        ({"source_task": 1}, 'source_task has an effect only with start = "exact"'),
    ],
)
def test_tasks_that_do_not_fit_are_an_error(options, message, tmp_path):
    source, _ = saved(tmp_path, "multitask_prompt", THREE)
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), "multitask_prompt", {"tokens": 3, "ranks": 2, "source": source} | options)


def test_a_file_of_several_tasks_that_names_none_is_refused(tmp_path):
    saved(tmp_path, "multitask_prompt", THREE)
    config = files.read_json(tmp_path / "adapter_config.json")
    assert config.pop("refpeft_task") == 2
    files.write_json(tmp_path / "adapter_config.json", config)
    with pytest.raises(RefpeftError, match=r'has the prompts of 3 tasks, .* add "refpeft_task": 0'):
        adapters.load(tiny.model(), tmp_path)
    files.write_json(tmp_path / "adapter_config.json", config | {"refpeft_task": 1, "num_tasks": 10**12})
    with pytest.raises(RefpeftError, match=r"tasks = 1000000000000, but no tensor in .* has a side of more than 24"):
        adapters.load(tiny.model(), tmp_path)


# ---- a subspace of prompts -------------------------------------------------------------------------------------------


def test_a_decoder_learns_to_give_the_prompts_that_it_was_fitted_to():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 30))  # six prompts in a plane
    errors = []
    for steps in (1, 2000):
        decoder = fitted_decoder(Stream(0), rows, d=2, hidden=16, steps=steps, lr=1e-2)
        assert {name: array.shape for name, array in decoder.items()} == {
            "inner": (16, 2),
            "inner_bias": (16,),
            "outer": (30, 16),
            "outer_bias": (30,),
        }
        errors.append(nearest_in_image(decoder, rows))
    assert errors[1] < 0.2 < 0.6 < errors[0]


@pytest.mark.real
@pytest.mark.parametrize("steps", [1, 5])
def test_a_decoder_is_fitted_as_torch_fits_it(steps):
    torch = pytest.importorskip("torch")
    rows = np.random.default_rng(0).normal(size=(6, 30)).astype("f4") + 1
    first = linear_values(stream := Stream(0), "encoder", 3, 30) | decoder_values(stream, 3, 8, 30)
    t = {name: torch.tensor(array.astype("f4"), requires_grad=True) for name, array in first.items()}
    x, linear = torch.from_numpy(rows), torch.nn.functional.linear
    optimizer = torch.optim.Adam(t.values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        inner = torch.tanh(linear(linear(x, t["encoder"], t["encoder_bias"]), t["inner"], t["inner_bias"]))
        torch.nn.functional.mse_loss(linear(inner, t["outer"], t["outer_bias"]), x).backward()
        optimizer.step()
    found = fitted_decoder(Stream(0), rows, d=3, hidden=8, steps=steps, lr=0.05)
    assert set(found) == {"inner", "inner_bias", "outer", "outer_bias"}
    for name, array in found.items():
        assert np.allclose(array, t[name].detach().numpy(), rtol=0, atol=2e-4), name


def nearest_in_image(decoder: dict[str, np.ndarray], rows: np.ndarray) -> float:
    """How far the rows are from what the decoder gives over a grid of z, relative to their size."""
    z = np.stack(np.meshgrid(*[np.linspace(-3, 3, 61)] * 2), axis=-1).reshape(-1, 2)
    image = np.tanh(z @ decoder["inner"].T + decoder["inner_bias"]) @ decoder["outer"].T + decoder["outer_bias"]
    return max(np.linalg.norm(image - row, axis=1).min() / np.linalg.norm(row) for row in rows)


def test_a_fitted_decoder_is_constant_and_the_same_again():
    options = {"tokens": 3, "d": 4, "hidden": 6, "prompts": prompts(2), "fit_steps": 30}
    first, again = (first_values("ipt", options) for _ in range(2))
    random = first_values("ipt", options | {"prompts": []})
    for name in ("inner", "inner_bias", "outer", "outer_bias"):
        assert np.array_equal(first[name], again[name]) and not np.array_equal(first[name], random[name])
    assert set(sites.attach(tiny.model(), "ipt", options).params) == {f"{EMBED}.z"}
    with pytest.raises(RefpeftError, match="has 3 tokens, and tokens is 4"):
        first_values("ipt", options | {"tokens": 4})
