"""The task head is found in every classifier of transformers; language models have none."""

import importlib
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

import selective_lite as sl
from tests.architectures import PACKAGES, build

ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a default configuration leaves out or contradicts, by the beginning of the class's name.
SETTINGS = {
    "CohereCompass": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "Dots1": {"n_routed_experts": 2, "moe_intermediate_size": 8, "n_shared_experts": 1},
    "Esm": {"vocab_size": 33, "pad_token_id": 1},
    "HunYuan": {"head_dim": 64},
    "Lfm2Moe": {"layer_types": ["full_attention", "full_attention"]},
    "Ministral": {"head_dim": 64},
    "Nemotron": {"num_key_value_heads": 8, "head_dim": 64},
    "Wav2Vec2Bert": {"vocab_size": 12},
    "Wav2Vec2Conformer": {"vocab_size": 12},
}
NOT_BUILT = {  # their own default configuration does not build them
    "DbrxForCausalLM": "its attention's configuration has no rope_theta",
    "Gemma4AssistantForCausalLM": "its default configuration is refused",
    "Gemma4UnifiedAssistantForCausalLM": "its default configuration is refused",
    "LayoutLMv2ForSequenceClassification": "needs detectron2",
}
# Where the base model is the model itself, or holds the head: there is nothing outside it.
ELSEWHERE = {"LasrForCTC": "ctc_head", "ParakeetForCTC": "ctc_head"}
INSIDE = (
    "GraniteSpeech5ForCTC",  # tied to the output that its encoder conditions itself on
    "PerceiverForSequenceClassification",  # its decoder is a part of the base model
)


@cache
def classes(*endings):
    """``{class: module}`` of the transformers that is installed, by the ending of the name."""
    pattern = re.compile(rf"^class (\w+(?:{'|'.join(endings)}))\(", re.MULTILINE)
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    return {
        name: f"transformers.models.{file.parent.name}.{file.stem}"
        for file in files
        for name in pattern.findall(file.read_text(encoding="utf-8"))
        if not name.startswith("Auto")
    }


def on_meta(name):
    """The model with its default configuration, of two layers if that can be said."""
    module = classes(*ENDINGS)[name]
    cls = getattr(importlib.import_module(module), name)
    own = next((s for start, s in SETTINGS.items() if name.startswith(start)), {})
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return cls(cls.config_class(num_hidden_layers=2, **own))
        except Exception:  # more places say how many layers there are
            return cls(cls.config_class(**own))


def cases(*endings):
    return [
        pytest.param(n, marks=pytest.mark.skip(reason=NOT_BUILT[n]) if n in NOT_BUILT else ())
        for n in classes(*ENDINGS)
        if n.endswith(endings) and n not in INSIDE
    ]


TRANSLATORS = {
    name
    for names in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    for name in ([names] if isinstance(names, str) else names)
}
CLASSIFIERS = ("ForSequenceClassification", "ForCTC")
LANGUAGE = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")
ENDINGS = (*CLASSIFIERS, *LANGUAGE, *sorted(TRANSLATORS))


@pytest.mark.parametrize("name", cases(*CLASSIFIERS))
def test_head_of_a_classifier_is_what_is_outside_its_base_model(name, recwarn):
    model = on_meta(name)
    inside = {id(p) for p in model.base_model.parameters()}
    expected = {n for n, p in model.named_parameters() if id(p) not in inside}
    if name in ELSEWHERE:
        assert not expected
        prefix = ELSEWHERE[name] + "."
        expected = {n for n, _ in model.named_parameters() if n.startswith(prefix)}
    assert expected
    assert set(sl.head_weights(model)) == expected
    assert not expected & set(sl.weights(model, with_frozen=True))
    assert not [w for w in recwarn if issubclass(w.category, sl.HeadWarning)]


@pytest.mark.parametrize("name", cases(*LANGUAGE, *TRANSLATORS))
def test_language_model_has_no_head(name):
    model = on_meta(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sl.HeadWarning)
        assert sl.head_weights(model) == {}


@pytest.mark.parametrize("name", INSIDE)
def test_head_inside_the_base_model_is_asked_for(name):
    with pytest.warns(sl.HeadWarning, match=r"head="):
        assert sl.head_weights(on_meta(name)) == {}


def test_nearly_every_classifier_of_transformers_is_built():
    assert len(cases(*CLASSIFIERS)) >= 100
    assert len(set(NOT_BUILT) & set(classes(*ENDINGS))) <= 5


@pytest.mark.parametrize("name", PACKAGES)
def test_head_of_torchvision_and_timm_is_their_classifier(name):
    model = build(name)
    head = sl.head_weights(model)
    assert {p.shape[0] for p in head.values()} == {3}  # the last layer: a row for each class
    assert len(head) == 2


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        (("conv1", "fc"), "fc"),
        (("features", "classifier"), "classifier"),
        (("features", "head"), "head"),
        (("encoder", "heads"), "heads"),
    ],
)
def test_head_by_name_in_a_module_of_torchvision(children, expected):
    class Net(nn.Module):
        __module__ = "torchvision.models.net"

    model = Net()
    for name in children:
        model.add_module(name, nn.Linear(2, 2))
    assert set(sl.head_weights(model)) == {f"{expected}.weight", f"{expected}.bias"}


def test_only_the_last_layer_of_torchvisions_stack_is_a_head():
    class VGG(nn.Module):
        __module__ = "torchvision.models.vgg"

    model = VGG()
    model.features = nn.Linear(2, 2)
    model.classifier = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert set(sl.head_weights(model)) == {"classifier.2.weight", "classifier.2.bias"}


@pytest.mark.parametrize("classifier", ["head.fc", ("head", "head_dist")])
def test_timm_says_itself_where_its_head_is(classifier):
    model = nn.Module()
    model.body = nn.Linear(2, 2)
    model.head = nn.Linear(2, 2)
    model.head.fc = nn.Linear(2, 2)
    model.head_dist = nn.Linear(2, 2)
    model.pretrained_cfg = {"classifier": classifier}
    prefixes = (classifier,) if isinstance(classifier, str) else classifier
    expected = {
        n for n, _ in model.named_parameters() if n.startswith(tuple(p + "." for p in prefixes))
    }
    assert set(sl.head_weights(model)) == expected


@pytest.mark.parametrize("name", ["classifier", "score", "qa_outputs", "classification_head"])
def test_child_with_a_heads_name_is_the_head_of_a_plain_module(name):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), name: nn.Linear(2, 2)})
    assert set(sl.head_weights(model)) == {f"{name}.weight", f"{name}.bias"}


def test_plain_module_with_another_name_is_asked_about():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(2, 2), nn.Linear(2, 2)

    model = Net()
    with pytest.warns(sl.HeadWarning, match=r"Net.*head=\('fc',\)"):
        assert set(sl.weights(model)) == {n for n, _ in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", sl.HeadWarning)
        assert set(sl.head_weights(model, head=("fc",))) == {"fc.weight", "fc.bias"}
        assert set(sl.weights(model, head=())) == {n for n, _ in model.named_parameters()}
