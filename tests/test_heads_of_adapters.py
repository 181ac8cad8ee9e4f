"""What adapters' files have of a task's head: read again, left out for others, and each mistake's message."""

import numpy as np
import pytest
import tiny
from test_encoder import rows
from test_heads import LABELS, asked, headed, write_base

import refpeft
from refpeft import adapters, files, sites
from refpeft.errors import RefpeftError
from refpeft.quant import make_quantizer


def trained(folder, family: str = "bert", task: str = "classify", method: str = "lora", **options):
    """(the base's directory, the adapter's, the model with it) of a random adapter, saved with its head."""
    base = write_base(folder / "base", family)
    model = refpeft.load(base, dtype="float64", task=task, labels=LABELS if task in ("classify", "tag") else ())
    tiny.scramble(sites.attach(model, method, options))
    for tensor in model.adapters[0].params.values():
        tensor.data[...] = tensor.data.astype("f4")
    adapters.save(folder / "adapter", model)
    return base, folder / "adapter", model


def change(folder, rename=None, **settings) -> None:
    """An adapter's files with some tensors under other names (None: without them), and other settings."""
    config = files.read_json(folder / "adapter_config.json")
    files.write_json(folder / "adapter_config.json", config | settings)
    found = files.read_safetensors(folder / "adapter_model.safetensors")
    found = {(rename or (lambda name: name))(name): np.array(array) for name, array in found.items()}
    found.pop(None, None)
    files.write_safetensors(folder / "adapter_model.safetensors", found, {"format": "pt"})


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix_tuning", "bitfit", "full"])
@pytest.mark.parametrize(("family", "task"), [("bert", "regress"), ("roberta", "tag"), ("distilbert", "classify")])
def test_task_and_head_come_with_the_adapter(family, task, method, tmp_path):
    base, adapter, model = trained(tmp_path, family, task, method, **({"tokens": 3} if "prefix" in method else {}))
    again = refpeft.load(base, adapter, dtype="float64")
    assert again.task == task and len(again.labels) == len(model.labels)
    assert np.allclose(again(**rows(family)).data, model(**rows(family)).data, rtol=1e-6, atol=1e-7)


def test_an_adapter_for_vectors_has_the_names_of_a_model_without_a_head(tmp_path):
    base, adapter, model = trained(tmp_path, task="embed")
    found = files.read_safetensors(adapter / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.encoder.layer.") for name in found)
    again = refpeft.load(base, adapter, dtype="float64", task="embed")
    assert np.allclose(again(**rows("bert")).data, model(**rows("bert")).data, rtol=1e-6, atol=1e-7)


def test_labels_without_names_have_those_of_the_models_own_config(tmp_path):
    base, adapter, _ = trained(tmp_path)
    assert refpeft.load(base, adapter).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    names = {"id2label": {str(i): name for i, name in enumerate(LABELS)}}
    named = write_base(tmp_path / "named", "bert", architectures=["BertForSequenceClassification"], **names)
    assert refpeft.load(named, adapter).labels == LABELS
    assert refpeft.load(base, adapter, labels=("a", "b", "c"), task="classify").labels == ("a", "b", "c")


def test_an_adapter_in_a_quantizers_format_has_its_head_in_it_too(tmp_path):
    base, _, model = trained(tmp_path)
    quantizer = make_quantizer("int8", None, False)
    adapters.quantize(model, quantizer)
    adapters.save(tmp_path / "small", model, quantizer=quantizer)
    again = refpeft.load(base, tmp_path / "small", dtype="float64", task="classify", labels=LABELS)
    assert np.allclose(again(**rows("bert")).data, model(**rows("bert")).data, rtol=1e-6, atol=1e-7)


def test_prompts_that_start_from_an_adapter_with_a_head_leave_that_out(tmp_path):
    _, adapter, model = trained(tmp_path, method="prompt_tuning", tokens=3, head_reads="prompt")
    found = adapters.stored(adapter, [model.embed])
    assert list(found.params) == ["bert.embeddings.word_embeddings.prompt"]


# ---- what the head reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "multitask_prompt"])
@pytest.mark.parametrize("family", ["bert", "deberta-v3", "albert"])
def test_a_head_reads_the_texts_first_token_or_the_first_row_before_it(family, method):
    given, said = rows(family), {}
    for reads in ("text", "prompt"):
        model = headed(family, "classify")
        adapter = sites.attach(model, method, {"tokens": 3, "head_reads": reads})
        said[reads] = model(**given).data
        before = given["ids"].shape[1]
        model.of_text = lambda hidden, virtual: hidden  # all rows
        hidden = model._hidden(given["ids"], None, given["segments"], types=given.get("types"))
        assert hidden.shape[1] == before + 3
        place = 3 if reads == "text" else 0
        assert np.allclose(said[reads], model.head(model.finish(hidden[:, place])).data, rtol=1e-12)
        assert adapter.read_by_head == (reads == "prompt")
    assert not np.allclose(said["text"], said["prompt"])


def test_gradients_go_through_the_row_that_a_head_reads():
    model = headed("roberta", "classify")
    adapter = sites.attach(model, "prompt_tuning", {"tokens": 2, "head_reads": "prompt"})
    tiny.scramble(adapter)
    batch = asked("roberta", "classify")
    said = model(batch.ids, segments=batch.segments).data
    log_p = said - np.log(np.exp(said).sum(axis=-1, keepdims=True))
    assert float(model.loss(batch).data) == pytest.approx(-log_p[[0, 1], batch.targets[:, 0]].mean(), rel=1e-12)
    tiny.assert_slope(adapter, lambda: model.loss(batch))


@pytest.mark.parametrize(("family", "task"), [("llama", "classify"), ("bert", "tag"), ("bert", "embed")])
def test_a_head_that_reads_other_places_has_no_such_choice(family, task):
    with pytest.raises(RefpeftError, match=r"prompt_tuning.head_reads = 'prompt' is for encoders that classify texts"):
        sites.attach(headed(family, task), "prompt_tuning", {"tokens": 2, "head_reads": "prompt"})


@pytest.mark.parametrize(
    ("family", "task", "method", "options", "kind"),
    [
        ("bert", "classify", "prompt_tuning", {}, "REFPEFT"),
        ("bert", "classify", "prompt_tuning", {"head_reads": "prompt"}, "PROMPT_TUNING"),
        ("bert", "tag", "prompt_tuning", {}, "PROMPT_TUNING"),
        ("bert", "mlm", "prompt_tuning", {}, "REFPEFT"),
        ("bert", "mlm", "prefix_tuning", {}, "REFPEFT"),
        ("bert", "classify", "prefix_tuning", {}, "PREFIX_TUNING"),
        ("distilbert", "classify", "prefix_tuning", {}, "REFPEFT"),
        ("llama", "classify", "prompt_tuning", {}, "PROMPT_TUNING"),
        ("llama", "classify", "prefix_tuning", {}, "PREFIX_TUNING"),
    ],
)
def test_what_peft_computes_otherwise_is_not_written_in_its_form(family, task, method, options, kind, tmp_path):
    _, adapter, _ = trained(tmp_path, family, task, method, tokens=3, **options)
    assert files.read_json(adapter / "adapter_config.json")["peft_type"] == kind


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_a_head_that_is_missing_is_said_with_what_to_do(tmp_path):
    base, adapter, _ = trained(tmp_path, "deberta-v3")
    change(adapter, lambda name: None if "pooler" in name else name)
    message = (
        r"'base_model.model.pooler.dense.weight', of the head .* modules_to_save = \['classifier', 'pooler.dense'\]"
    )
    with pytest.raises(RefpeftError, match=message):
        refpeft.load(base, adapter)


def test_an_adapter_for_labels_without_a_head_is_not_loaded_on_a_model_without_one(tmp_path):
    base, adapter, _ = trained(tmp_path)
    change(adapter, lambda name: None if "classifier" in name or "pooler" in name else name)
    with pytest.raises(
        RefpeftError, match="task_type is SEQ_CLS, and the model is loaded for task None: load it for 'cl"
    ):
        refpeft.load(base, adapter)
    with pytest.raises(RefpeftError, match=r"pooler.dense.weight', of the head that is trained with it, is missing"):
        refpeft.load(base, adapter, task="classify", labels=LABELS)


def test_an_adapter_of_another_task_is_refused(tmp_path):
    base, adapter, _ = trained(tmp_path, task="tag")
    with pytest.raises(RefpeftError, match="task_type is TOKEN_CLS, and the model is loaded for task 'classify'"):
        refpeft.load(base, adapter, task="classify", labels=LABELS)


def test_an_adapter_of_other_labels_is_refused(tmp_path):
    base, adapter, _ = trained(tmp_path)
    with pytest.raises(RefpeftError, match="its head tells 3 labels apart, and the model is loaded for 2"):
        refpeft.load(base, adapter, task="classify", labels=("a", "b"))


def test_a_head_of_another_family_is_refused(tmp_path):
    base, adapter, _ = trained(tmp_path)
    change(adapter, lambda name: name.replace("model.classifier", "model.score"))
    with pytest.raises(
        RefpeftError, match=r"it holds a head, 'base_model.model.score.weight', of another model: the head of"
    ):
        refpeft.load(base, adapter)


def test_a_head_on_a_model_that_has_none_is_refused(tmp_path):
    base, adapter, _ = trained(tmp_path)
    change(adapter, lambda name: None if "pooler" in name else name, task_type=None, modules_to_save=["classifier"])
    with pytest.raises(RefpeftError, match=r"it holds a head, 'base.*', of another model: task None has no head"):
        refpeft.load(base, adapter)
