"""Masked training under Hugging Face's `Trainer`: a plain loop's weights.

Its checkpoints are ordinary models.
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import selective_lite as sl

STEPS, ACCUMULATE, SIZE = 6, 2, 2


def quiet(model):
    """Without dropout, so that two loops that draw differently can agree."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def under_trainer(tmp_path, batches):
    """under_trainer(kind, model, **arguments) -> a `Trainer`.

    Its options are the ones that could do harm.
    """

    def make(kind, model, *, compute_metrics=None, **arguments):
        examples = [
            {k: v[0] for k, v in b.items()}
            for b in batches(kind, STEPS * ACCUMULATE * SIZE, size=1)
        ]
        options = {
            "max_steps": STEPS,
            "per_device_train_batch_size": SIZE,
            "gradient_accumulation_steps": ACCUMULATE,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "optim": "adamw_torch",
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        arguments = TrainingArguments(tmp_path, **{**options, **arguments})
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples,
            eval_dataset=examples[:4],
            compute_metrics=compute_metrics,
        )
        # a loss is its batch's mean; `Trainer` has other counts for some
        trainer.model_accepts_loss_kwargs = False
        return trainer

    return make


def plain_loop(kind, model, selection, batches, autocast):
    """What the `Trainer` above does, with dense gradients.

    They are masked, and unselected weights are put back.
    """
    data = batches(kind, STEPS * ACCUMULATE * SIZE, size=1)
    named, before, head = dict(model.named_parameters()), sl.snapshot(model), sl.head_weights(model)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in head.items()}
    masks |= {name: mask for name, mask in selection.masks().items() if name in selection.indices}
    decays = {name: not re.search(r"bias|norm|\.ln_", name.lower()) for name in masks}
    groups = [
        {"params": [named[name] for name in masks if decays[name] == on], "weight_decay": 0.1 * on}
        for on in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / 2 if s < 2 else (STEPS - s) / (STEPS - 2)
    )
    model.train()
    for step in range(STEPS):
        for part in range(ACCUMULATE):
            start = (step * ACCUMULATE + part) * SIZE
            batch = {
                key: torch.cat([b[key] for b in data[start : start + SIZE]]) for key in data[0]
            }
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss / ACCUMULATE
            loss.backward()
        for name, mask in masks.items():
            named[name].grad *= mask
        nn.utils.clip_grad_norm_([named[name] for name in masks], 0.5)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                named[name][~mask] = before[name][~mask]


def assert_only_the_selection_moved(before, model, selection, head=()):
    masks, moved = selection.masks(), 0
    for name, p in model.named_parameters():
        if name not in head:
            mask = masks.get(name, torch.zeros(p.shape, dtype=torch.bool))
            assert torch.equal(p.detach()[~mask], before[name][~mask]), name
            moved += int((p.detach()[mask] != before[name][mask]).sum())
    assert moved > 0.5 * selection.count


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("bert", "float64"), ("bert", "bfloat16"), ("gpt2", "float64"), ("llama", "float64")],
)
def test_trainer_trains_as_a_plain_loop_does(build, batches, pick, under_trainer, kind, dtype):
    autocast, precise = dtype == "bfloat16", torch.float32 if dtype == "bfloat16" else torch.float64
    model, reference = quiet(build(kind)).to(precise), quiet(build(kind)).to(precise)
    selection, before, head = pick(model), sl.snapshot(model), tuple(sl.head_weights(model))
    some = {
        name: index for number, (name, index) in enumerate(selection.indices.items()) if number % 3
    }
    selection = sl.Selection(some, selection.shapes)  # of every third tensor nothing is trained
    with sl.masked(model, selection, dense=head):
        under_trainer(kind, model, bf16=autocast).train()
    plain_loop(kind, reference, selection, batches, autocast)
    # autocast rounds dense gradients
    near = {"rtol": 1e-3, "atol": 1e-3} if autocast else {"rtol": 1e-9, "atol": 1e-12}
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, **near)
    assert_only_the_selection_moved(before, model, selection, head)
    delta = sl.diff(before, model, head=head)
    assert delta.count <= selection.count
    again = build(kind).to(precise)
    delta.apply(again)
    assert all(
        torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("bert", torch.float32),
        ("llama", torch.float32),
        ("gpt2", torch.float32),  # half precision goes on from deltas: test_hf
    ],
)
def test_a_resumed_training_ends_with_the_same_bits(
    build, pick, under_trainer, tmp_path, kind, dtype
):
    ends = []
    for resume in (None, tmp_path / "checkpoint-3"):
        # everything from before is gone: base, mask, optimizer; dropout draws as before
        model = build(kind).to(dtype)
        selection = pick(model)
        with sl.masked(model, selection, dense=tuple(sl.head_weights(model))):
            trainer = under_trainer(
                kind,
                model,
                save_strategy="steps",
                save_steps=3,
                train_sampling_strategy="random",
                learning_rate=1e-3,
            )
            trainer.train(resume_from_checkpoint=resume)
        ends.append((sl.snapshot(model), trainer.optimizer.state_dict()["state"]))
        if resume is None:
            shutil.rmtree(tmp_path / "checkpoint-6")
    (straight, moments), (resumed, resumed_moments) = ends
    assert {name for name, p in straight.items() if not torch.equal(p, resumed[name])} == set()
    assert moments.keys() == resumed_moments.keys()
    assert all(
        torch.equal(moments[i][key], resumed_moments[i][key]) for i in moments for key in moments[i]
    )


@pytest.mark.parametrize("kind", ["bert", "bert_tied", "llama", "gpt2"])
def test_a_model_that_is_saved_inside_is_the_ordinary_one_that_leaving_gives(
    build, pick, under_trainer, tmp_path, kind
):
    model = build(kind)
    with sl.masked(model, pick(model), dense=tuple(sl.head_weights(model))):
        trainer = under_trainer(kind, model)
        trainer.train()
        trainer.save_model(tmp_path / "inside")
    model.save_pretrained(tmp_path / "after")
    inside, after = (
        load_file(tmp_path / place / "model.safetensors") for place in ("inside", "after")
    )
    assert inside.keys() == after.keys()
    assert {name for name in after if not torch.equal(inside[name], after[name])} == set()
    loaded = type(model).from_pretrained(tmp_path / "inside")
    assert all(
        torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_the_best_model_is_the_one_that_leaving_gives(build, pick, under_trainer, tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    model = build("bert")
    with sl.masked(model, pick(model), dense=tuple(sl.head_weights(model))):
        trainer = under_trainer(
            "bert",
            model,
            compute_metrics=lambda _: {"score": next(scores)},
            load_best_model_at_end=True,
            metric_for_best_model="score",
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
        )
        trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best, last = (
        load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6)
    )
    assert all(torch.equal(p, best[name]) for name, p in model.named_parameters())
    assert any(not torch.equal(best[name], last[name]) for name in best)


# its new name is too new
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(build, pick, under_trainer, reentrant):
    models = []
    for options in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        },
    ):
        model = quiet(build("bert"))
        with sl.masked(model, pick(model), dense=tuple(sl.head_weights(model))):
            under_trainer("bert", model, **options).train()
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)
