"""Task heads under other names: huggingface/peft#577, #310, #1070.

A new head is drawn at random: it has to be trained and shipped whole, and must not eat the budget.
"""

import warnings

import pytest
import torch
from torch import nn

import selective_lite as sl
from tests.cases.helpers import (
    ENCODER,
    SEQ2SEQ,
    SPEECH,
    VIT,
    bert,
    hf,
    some_of_each,
    tokens,
    train,
    vectors,
)

T5 = {
    "vocab_size": 53,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "num_labels": 3,
    "decoder_start_token_id": 0,
}
XLNET = {"vocab_size": 53, "d_model": 16, "n_layer": 1, "n_head": 4, "d_inner": 20, "num_labels": 3}
DISTIL = {"vocab_size": 53, "dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 20}
GPT2 = {"vocab_size": 53, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
LM = {k: v for k, v in ENCODER.items() if k != "num_labels"}
HEADS = {
    "BertForSequenceClassification": (ENCODER, {"classifier"}),
    "BertForTokenClassification": (ENCODER, {"classifier"}),
    "BertForMultipleChoice": (LM, {"classifier"}),
    "BertForQuestionAnswering": (LM, {"qa_outputs"}),
    "RobertaForSequenceClassification": (ENCODER, {"classifier"}),
    "DistilBertForSequenceClassification": (DISTIL, {"pre_classifier", "classifier"}),
    "DebertaV2ForSequenceClassification": (ENCODER, {"pooler", "classifier"}),
    "BartForSequenceClassification": (SEQ2SEQ, {"classification_head"}),
    "T5ForSequenceClassification": (T5, {"classification_head"}),
    "XLNetForSequenceClassification": (XLNET, {"sequence_summary", "logits_proj"}),
    "GPT2ForSequenceClassification": (GPT2 | {"num_labels": 3}, {"score"}),
    "Wav2Vec2ForCTC": (SPEECH, {"lm_head"}),
    "HubertForCTC": (SPEECH, {"lm_head"}),
    "Wav2Vec2ForSequenceClassification": (SPEECH, {"projector", "classifier"}),
    "ViTForImageClassification": (VIT, {"classifier"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_model_for_a_task_is_found(name):
    """peft#577, #310, #1070: BART, T5, XLNet, DistilBERT, speech; under any name, and all of it."""
    options, expected = HEADS[name]
    model = hf(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sl.head_weights(model)
    assert {name.split(".")[0] for name in found} == expected
    assert not set(found) & set(sl.weights(model))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BertForMaskedLM", LM),
        ("GPT2LMHeadModel", GPT2),
        ("BartForConditionalGeneration", {k: v for k, v in SEQ2SEQ.items() if k != "num_labels"}),
        ("T5ForConditionalGeneration", {k: v for k, v in T5.items() if k != "num_labels"}),
    ],
)
def test_a_language_model_has_no_head_and_nobody_warns(name, options):
    """Its output layer is pretrained: weights of it are candidates as any others."""
    model = hf(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sl.head_weights(model) == {}
        assert len(sl.weights(model)) == len(list(model.parameters()))


def test_a_receiver_with_a_new_head_of_its_own_gets_the_tuned_one():
    """T5's classification_head: the receiver's own is drawn from another seed.

    Only the encoder is loaded from the pretrained model.
    """
    pretrained, tuned = (hf("T5ForSequenceClassification", **T5) for _ in range(2))
    receiver = hf("T5ForSequenceClassification", 9, **T5)
    head = {k: v for k, v in receiver.state_dict().items() if "classification_head" in k}
    receiver.load_state_dict({**pretrained.state_dict(), **head})
    ids = torch.cat([torch.randint(3, 53, (4, 6)), torch.ones(4, 1, dtype=torch.long)], 1)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}
    selection = sl.select(sl.squared_gradient(tuned, [batch]), 0.1)
    assert not any("classification_head" in name for name in selection.shapes)
    sl.fit(tuned, sl.fixed_mask(tuned, selection, lr=1e-2, epochs=3), [batch])
    sl.diff(pretrained, tuned).apply(receiver)
    assert torch.equal(receiver.eval()(**batch).logits, tuned.eval()(**batch).logits)


def test_masked_trains_and_ships_the_head_without_being_asked():
    """A user's own loop, with no dense=: the head was frozen, in silence."""
    model = bert()
    before, selection = sl.snapshot(model), some_of_each(model, head=None)
    with sl.masked(model, selection) as tuning:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == len(tuning.parameters()) + len(tuning.dense_parameters())
        train(model, trained, tokens("classes"))
        delta = tuning.delta()
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    assert set(delta.head) == {"classifier.weight", "classifier.bias"}


def test_what_head_was_found_is_said(capsys):
    """So that a wrong guess is seen before a night of training; once, not at every call."""
    for _ in range(3):
        model = hf("DistilBertForSequenceClassification", **DISTIL)
        with sl.masked(model, some_of_each(model, head=None)):
            pass
    assert capsys.readouterr().out.count("pre_classifier") <= 1


class Pooled(nn.Module):
    """A user's own classifier, whose last layer has a name of their own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.out_layer = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out_layer(self.encoder(x).tanh())


def test_a_head_that_is_not_found_is_asked_for():
    """A new head under a name that nobody can know: one warning that says `head=`."""
    with pytest.warns(sl.HeadWarning, match="head="):
        assert sl.head_weights(Pooled()) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(sl.head_weights(Pooled(), ("out_layer",))) == {
            "out_layer.weight",
            "out_layer.bias",
        }
        assert len(sl.weights(Pooled(), ())) == 4


@pytest.mark.parametrize("name", ["classifier", "score", "qa_outputs", "classification_head"])
def test_a_plain_module_with_a_usual_name_for_its_head(name):
    """A user's own `nn.Module` around an encoder."""
    model = nn.ModuleDict({"encoder": nn.Linear(6, 8), name: nn.Linear(8, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(sl.head_weights(model)) == {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision.models.resnet", "fc"),
        ("torchvision.models.vision_transformer", "heads"),
        ("torchvision.models.mobilenetv3", "classifier"),
        ("timm.models.vision_transformer", "head"),
        ("timm.models.resnet", "fc"),
    ],
)
def test_heads_of_vision_libraries_go_by_name(library, name):
    """`model.fc = nn.Linear(512, 10)`, the first line of every transfer-learning tutorial."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 8)
            setattr(self, name, nn.Sequential(nn.Linear(8, 2)))
            if library.startswith("timm."):  # timm's models say where their classifier is
                self.pretrained_cfg = {"classifier": name}

        def forward(self, x):
            return getattr(self, name)(self.body(x))

    Net.__module__ = library
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {n.split(".")[0] for n in sl.head_weights(Net())} == {name}


def test_a_model_wrapped_in_a_users_own_module_keeps_its_head_or_asks():
    """A wrapper that adds a loss: `self.bert = BertForSequenceClassification(...)`."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bert()

        def forward(self, **batch):
            return self.net(**batch)

    model = Wrapper()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = sl.head_weights(model)
    assert found.keys() == {"net.classifier.weight", "net.classifier.bias"} or any(
        "head=" in str(w.message) for w in said
    )


def test_a_delta_for_three_classes_on_a_base_of_two_says_what_differs():
    """num_labels was forgotten when the base was loaded."""
    base, tuned = bert(), bert()
    sl.fit(
        tuned,
        sl.fixed_mask(tuned, some_of_each(tuned, head=None), lr=1e-2, epochs=1),
        [tokens("classes")],
    )
    delta = sl.diff(base, tuned)
    two = hf("BertForSequenceClassification", **ENCODER | {"num_labels": 2})
    with pytest.raises(sl.DeltaError, match=r"classifier|num_labels"):
        delta.apply(two)


def test_head_given_by_hand_is_trained_whole():
    """`head=("out_layer",)` at every verb, on a user's own module."""
    model, batch = Pooled(), vectors()

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    head = ("out_layer",)
    before = sl.snapshot(model)
    selection = sl.fish(model, [batch], 5, loss=loss, head=head)
    assert selection.indices.keys() <= {"encoder.weight", "encoder.bias"}
    with sl.masked(model, selection, head=head) as tuning:
        train(model, [*tuning.parameters(), *tuning.dense_parameters()], batch, loss)
        delta = tuning.delta()
    assert set(delta.head) == {"out_layer.weight", "out_layer.bias"}
    assert delta.count == 5
    assert not torch.equal(before["out_layer.weight"], model.out_layer.weight)
