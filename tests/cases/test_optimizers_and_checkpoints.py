"""Optimizers, schedulers, scalers, and checkpoints that go on where they stopped, or say why not.

adapter-hub/adapters#260 (the optimizer was made first), and resuming with another selection.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import selective_lite as sl
from tests.cases.helpers import (
    SEQ2SEQ,
    SPEECH,
    assert_only_these_moved,
    bert,
    chosen,
    cross_entropy,
    hf,
    llama,
    mlp,
    refused,
    some_of_each,
    tokens,
    train,
    vectors,
)


def batch():
    return tokens("classes")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_that_was_made_before_masking(kind):
    """adapters#260: only the head was trained, and nobody said so."""
    model = bert()
    optimizer = kind(model.parameters(), lr=1e-2)
    with sl.masked(model, some_of_each(model, head=None)):
        model(**batch()).loss.backward()
        with refused("optimizer"):
            optimizer.step()


def test_an_optimizer_made_before_masking_over_what_the_user_had_left_unfrozen():
    """The same, after `requires_grad_(False)` on a part by hand."""
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with sl.masked(model, some_of_each(model, head=None)):
        model(**batch()).loss.backward()
        with refused("optimizer"):
            optimizer.step()


def test_an_optimizer_made_inside_over_all_parameters_is_fine():
    """`AdamW(model.parameters())`: frozen ones get no gradient, and stay, decay or not."""
    model = bert()
    before, selection = sl.snapshot(model), some_of_each(model, head=None)
    with sl.masked(model, selection):
        train(model, model.parameters(), batch())
    assert_only_these_moved(before, model, selection, head=sl.head_weights(model))


def test_another_models_optimizer_is_left_alone():
    """A teacher, a discriminator or a second run in the same process steps as before."""
    model, other = mlp(), mlp(1)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        cross_entropy(other, vectors()).backward()
        optimizer.step()
        train(model, tuning.parameters(), vectors(), cross_entropy)
        two = torch.optim.SGD([*tuning.parameters(), *other.parameters()], lr=0.1)
        (cross_entropy(model, vectors()) + cross_entropy(other, vectors())).backward()
        two.step()
    optimizer.step()


def test_one_optimizer_for_selection_and_one_for_the_head():
    """Two learning rates by two optimizers, each of which holds a part of what is trained."""
    model = bert()
    before, selection = sl.snapshot(model), some_of_each(model, head=None)
    with sl.masked(model, selection) as tuning:
        optimizers = [
            torch.optim.AdamW(tuning.parameters(), lr=1e-2),
            torch.optim.SGD(tuning.head_parameters(), lr=0.1),
        ]
        for _ in range(2):
            model(**batch()).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_only_these_moved(before, model, selection, head=sl.head_weights(model))


class Unused(nn.Module):
    """A layer that the loss does not use, such as a pooler under a loss on tokens."""

    def __init__(self):
        super().__init__()
        self.body, self.pooler, self.classifier = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.classifier(self.body(x))


@pytest.mark.parametrize("how", ["loop", "fit"])
def test_a_selected_tensor_that_the_loss_never_uses_is_named(how):
    """It would be shipped as selected, and never move."""
    model = Unused()
    selection = chosen(model, body__weight=[1, 2], pooler__weight=[3])
    with refused("pooler.weight"):
        if how == "fit":
            phases = sl.fixed_mask(model, selection, lr=1e-2, epochs=1)
            sl.fit(model, phases, [vectors()], loss=cross_entropy)
        with sl.masked(model, selection) as tuning:
            train(model, tuning.parameters(), vectors(), cross_entropy)
    with sl.masked(model, selection, allow_unused=True) as tuning:
        train(model, tuning.parameters(), vectors(), cross_entropy)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "Wav2Vec2ForCTC"])
def test_a_model_that_drops_layers_at_random_trains(name, seed):
    """LayerDrop: a step may leave out a layer with selected weights, the first step too."""
    if name.startswith("Bart"):
        options = {k: v for k, v in SEQ2SEQ.items() if k != "num_labels"}
        model = hf(name, **options, encoder_layerdrop=0.7, decoder_layerdrop=0.7)
        data = tokens()
    else:
        model = hf(name, **SPEECH | {"layerdrop": 0.7, "num_hidden_layers": 2})
        data = {"input_values": torch.randn(2, 64), "labels": torch.tensor([[1, 2], [3, 4]])}
    torch.manual_seed(seed)
    phases = sl.fixed_mask(model, some_of_each(model, head=None), lr=1e-3, epochs=3)
    assert len(sl.fit(model, phases, [data])) == 3


def test_experts_that_no_token_chose_do_not_stop_training():
    """A mixture whose experts are modules of their own: some get no gradient in a step."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(6, 4)
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
            self.classifier = nn.Linear(6, 2)

        def forward(self, x):
            best = self.gate(x).argmax(1)
            used = [(best == e).nonzero().squeeze(1) for e in range(4)]
            hidden = x.clone()
            for e, rows in enumerate(used):
                if len(rows):
                    hidden = hidden.index_copy(0, rows, self.experts[e](x[rows]))
            return self.classifier(hidden)

    torch.manual_seed(0)
    model, one = Mixture(), vectors(2)
    selection = some_of_each(model, head=None, only="experts")
    phases = sl.fixed_mask(model, selection, lr=1e-3, epochs=2)
    sl.fit(model, phases, [one], loss=cross_entropy)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def stopped(make, positions, fresh=mlp):
    """A checkpoint in the middle of training this selection: the model's and optimizer's state."""
    model = fresh()
    with sl.masked(model, chosen(model, **positions), head=()) as tuning:
        optimizer = make(tuning.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model, vectors()).backward()
            optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()


def resumed(make, positions, checkpoint):
    state, moments = checkpoint
    model = mlp()
    with sl.masked(model, chosen(model, **positions), head=()) as tuning:
        model.load_state_dict(state)
        optimizer = make(tuning.parameters())
        optimizer.load_state_dict(moments)
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model, vectors()).backward()
            optimizer.step()
    return model


FIRST = {"0__weight": [1, 5, 9], "2__weight": [2, 3]}


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(make):
    """A loop of one's own that saves `model.state_dict()` and `optimizer.state_dict()`."""
    make = OPTIMIZERS[make]
    whole = mlp()
    with sl.masked(whole, chosen(whole, **FIRST), head=()) as tuning:
        optimizer = make(tuning.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(whole, vectors()).backward()
            optimizer.step()
    model = resumed(make, FIRST, stopped(make, FIRST))
    for name, p in model.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name


OTHERS = {
    "other positions of equal sizes": {"0__weight": [1, 5, 10], "2__weight": [2, 3]},
    "other sizes": {"0__weight": [1, 5, 9, 11], "2__weight": [2]},
    "other tensors": {"0__weight": [1, 5, 9], "2__bias": [0]},
}


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("other", OTHERS)
def test_resuming_with_another_selection_is_refused(make, other):
    """Other weights were trained with the moments of the first ones.

    A fused AdamW crashed the process.
    """
    make = OPTIMIZERS[make]
    with refused("selection"):
        resumed(make, OTHERS[other], stopped(make, FIRST))


@pytest.mark.parametrize("schedule", ["LambdaLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_schedulers_step_as_usual(schedule):
    """A scheduler that is made on the optimizer inside."""
    model = mlp()
    before, selection = sl.snapshot(model), some_of_each(model)
    with sl.masked(model, selection, head=()) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
        rates = torch.optim.lr_scheduler
        made = {
            "LambdaLR": lambda: rates.LambdaLR(optimizer, lambda step: 0.5**step),
            "OneCycleLR": lambda: rates.OneCycleLR(optimizer, 1e-2, total_steps=4),
            "ReduceLROnPlateau": lambda: rates.ReduceLROnPlateau(optimizer),
        }[schedule]()
        for _ in range(3):
            optimizer.zero_grad()
            loss = cross_entropy(model, vectors())
            loss.backward()
            optimizer.step()
            made.step(loss) if schedule == "ReduceLROnPlateau" else made.step()
        made.load_state_dict(made.state_dict())
    assert_only_these_moved(before, model, selection)


def test_a_gradient_scaler_skips_a_step_that_overflows_and_takes_the_next():
    """Mixed precision with float16."""
    model = mlp()
    before, selection = sl.snapshot(model), some_of_each(model)
    with sl.masked(model, selection, head=()) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for factor in (float("inf"), 1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model, vectors()) * factor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            if factor > 1:
                assert all(torch.equal(p, before[n]) for n, p in sl.weights(model, ()).items())
    assert_only_these_moved(before, model, selection)


def test_an_optimizer_with_a_closure():
    """L-BFGS evaluates the loss several times a step."""
    model = mlp()
    before, selection = sl.snapshot(model), some_of_each(model)
    with sl.masked(model, selection, head=()) as tuning:
        optimizer = torch.optim.LBFGS(tuning.parameters(), lr=0.1, max_iter=4)

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model, vectors())
            loss.backward()
            return loss

        first = closure().item()
        optimizer.step(closure)  # it has no gradient before its first evaluation
        assert closure().item() < first
    assert_only_these_moved(before, model, selection)


def test_averaged_weights():
    """torch.optim.swa_utils.AveragedModel copies the model inside masked training."""
    model = mlp()
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        first = average.module(vectors()["x"]).detach()
        train(model, tuning.parameters(), vectors(), cross_entropy, lr=0.1)
        average.update_parameters(model)
        found = average.module(vectors()["x"]).detach()
    assert not torch.equal(found, first)
    assert not torch.equal(found, model(vectors()["x"]))


@pytest.fixture
def trainer(tmp_path):
    """trainer(model, **arguments) -> a `Trainer` of four steps that saves after two."""

    def make(model, *, callbacks=(), **arguments):
        data = batch()
        examples = [{k: v[i % 4] for k, v in data.items()} for i in range(8)]
        options = {
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "train_sampling_strategy": "sequential",
            "logging_strategy": "no",
        }
        return Trainer(
            model,
            TrainingArguments(tmp_path / "run", **options | arguments),
            train_dataset=examples,
            callbacks=list(callbacks),
        )

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_trainer_is_an_ordinary_model(trainer, tmp_path, dtype):
    """bfloat16 checkpoints held vectors of the library's beside the weights."""
    model = bert().to(dtype)
    own = set(model.state_dict())
    with sl.masked(model, some_of_each(model, head=None)):
        trainer(model).train()
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert set(saved) == own
    for name, p in model.named_parameters():
        assert torch.equal(saved[name], p), name
    config = json.loads((tmp_path / "run" / "checkpoint-4" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_trainer_resumes_with_the_same_selection(trainer, tmp_path):
    """`trainer.train(resume_from_checkpoint=...)` in a new process."""
    whole, model = bert(), bert()
    selection = some_of_each(whole, head=None)
    with sl.masked(whole, selection):
        trainer(whole).train()
    with sl.masked(model, selection):
        trainer(model).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, whole.get_parameter(name))


def test_trainer_resumes_with_another_selection(trainer, tmp_path):
    """The seed of the scores was another one: the checkpoint's moments belong to other weights."""
    model, again = bert(), bert()
    with sl.masked(model, some_of_each(model, head=None)):
        trainer(model).train()
    with sl.masked(again, some_of_each(again, head=None, seed=3)), refused("selection"):
        trainer(again).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_trainer_resumes_from_its_deltas(trainer, tmp_path):
    """In bfloat16, where a checkpoint's own weights are rounded; and not with another selection."""
    whole, model, other = (bert().bfloat16() for _ in range(3))
    selection, save = some_of_each(whole, head=None), sl.hf.SaveDelta
    with sl.masked(whole, selection):
        trainer(whole, callbacks=[save()]).train()
    at = tmp_path / "run" / "checkpoint-2"
    with sl.masked(other, some_of_each(other, head=None, seed=3)), refused("selection"):
        trainer(other, callbacks=[save()]).train(resume_from_checkpoint=str(at))
    with sl.masked(model, sl.load(at / "delta.safetensors").selection(model)):
        trainer(model, callbacks=[save()]).train(resume_from_checkpoint=str(at))
    for name, p in model.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name


def test_a_delta_at_every_checkpoint_of_trainer(trainer, tmp_path):
    """huggingface/peft#353: small files at every checkpoint.

    Each is enough to rebuild the model of that step.
    """
    model = bert()
    selection = sl.fish(model, [batch()], 0.02)
    with sl.masked(model, selection) as tuning:
        trainer(model, callbacks=[sl.hf.SaveDelta()]).train()
    path = tmp_path / "run" / "checkpoint-4" / "delta.safetensors"
    fresh = bert()
    sl.load(path).apply(fresh)
    for name, p in model.named_parameters():
        assert torch.equal(p, fresh.get_parameter(name)), name
    assert tuning.delta().count == sl.load(path).count


def test_a_delta_of_a_language_model_under_trainer(trainer):
    """The front door on a decoder without a head: six lines."""
    model, fresh = llama(), llama()
    data = [{k: v[0] for k, v in tokens().items()} for _ in range(8)]
    door = trainer(model)
    door.train_dataset = data
    selection = sl.fish(model, door.get_train_dataloader(), 0.01)
    with sl.masked(model, selection) as tuning:
        door.train()
    tuning.delta().apply(fresh)
    assert torch.equal(fresh(**tokens()).logits, model.eval()(**tokens()).logits)
