"""The front door: under Trainer, SFTTrainer or a loop, the file that the four verbs give."""

import pytest
import torch
from torch import nn

import selective_lite as sl

BUDGET = 0.02


def quiet(model):
    """Without dropout, so that two loops that draw differently agree."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def examples(batches, kind, count=12):
    return [{key: t[0] for key, t in batch.items()} for batch in batches(kind, count, size=1)]


def together(rows, size=2):
    """Batches of so many examples, in order."""
    pairs = (rows[i : i + size] for i in range(0, len(rows), size))
    return [{key: torch.stack([row[key] for row in some]) for key in some[0]} for some in pairs]


def by_hand(model, data, path, steps):
    """Score, select, train and ship, each by its own verb."""
    before = sl.snapshot(model)
    selection = sl.select(sl.squared_gradient(model, data), BUDGET)
    head = sl.head_weights(model)
    model.train()
    with sl.masked(model, selection) as training:
        optimizer = torch.optim.AdamW(
            [*training.parameters(), *training.dense_parameters()], lr=0.01, weight_decay=0.0
        )
        for step in range(steps):
            model(**data[step % len(data)]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    delta = sl.diff(before, model, method="FISH")
    assert delta.count > 0
    assert set(delta.head) == set(head)
    delta.save(path)
    return path.read_bytes()


def arguments(folder, **more):
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "optim": "adamw_torch",
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **more,
        },
    )


def test_under_trainer(build, batches, tmp_path):
    from transformers import Trainer

    rows = examples(batches, "bert")
    model = quiet(build("bert"))
    trainer = Trainer(model, arguments(tmp_path / "out"), train_dataset=rows)
    trainer.model_accepts_loss_kwargs = False  # a loss is its batch's mean, as in the plain loop
    selection = sl.fish(model, trainer.get_train_dataloader(), BUDGET)
    with sl.masked(model, selection) as tuning:
        trainer.train()
    tuning.delta().save(tmp_path / "fish.safetensors")
    expected = by_hand(quiet(build("bert")), together(rows), tmp_path / "expected", 6)
    assert (tmp_path / "fish.safetensors").read_bytes() == expected


@pytest.mark.parametrize("kind", ["bert", "llama", "toy"])
def test_in_a_plain_loop(build, batches, tmp_path, kind):
    data = together(examples(batches, kind))
    model = quiet(build(kind))
    selection = sl.fish(model, data, BUDGET)
    model.train()
    with sl.masked(model, selection) as tuning:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
        for batch in data:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tuning.delta().save(tmp_path / "fish.safetensors")
    expected = by_hand(quiet(build(kind)), data, tmp_path / "expected", len(data))
    assert (tmp_path / "fish.safetensors").read_bytes() == expected


def fused(model):
    """As TRL's trainers compute the loss: they multiply by ``lm_head.weight`` themselves."""

    def loss(input_ids, labels):
        hidden = model.model(input_ids).last_hidden_state
        logits = nn.functional.linear(hidden, model.lm_head.weight).float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return loss


def test_with_a_fused_head(build, batches, tmp_path):
    """Tied embeddings get the gradient of both of their uses: as in the model's own loss."""
    rows = examples(batches, "llama")
    data, model = together(rows), build("llama").double()
    selection = sl.fish(model, data, BUDGET)
    name = "model.embed_tokens.weight"
    assert name in selection.indices
    model.train()
    with sl.masked(model, selection) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.01, weight_decay=0.0)
        for batch in data:
            fused(model)(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    delta, other = tuning.delta(), build("llama").double()
    by_hand(other, data, tmp_path / "expected", len(data))
    expected = sl.load(tmp_path / "expected")
    assert delta.metadata == {**expected.metadata, "encoding": "flat"}
    for key, (where, values) in expected.replaced().items():
        assert where is None or torch.equal(where, delta.positions[key])
        torch.testing.assert_close(delta.replaced()[key][1], values, rtol=1e-9, atol=1e-11)


def tokenizer():
    """Of the tiny model's 53 words; the trainer asks for one even where all texts are tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(53)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", eos_token="w2", unk_token="w1"
    )


def test_under_sft_trainer(build, batches, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = examples(batches, "llama")
    lists = [{key: t.tolist() for key, t in row.items()} for row in rows]
    model = build("llama")
    args = trl.SFTConfig(
        **{
            key: value
            for key, value in arguments(tmp_path / "out").to_dict().items()
            if key in ("max_steps", "per_device_train_batch_size", "learning_rate", "use_cpu")
        },
        output_dir=str(tmp_path / "out"),
        report_to="none",
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    data = datasets.Dataset.from_list(lists)
    trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer())
    before, selection = sl.snapshot(model), sl.fish(trainer.model, together(rows), BUDGET)
    with sl.masked(trainer.model, selection) as tuning:
        trainer.train()
    tuning.delta().save(tmp_path / "fish.safetensors")
    sl.diff(before, model, method="FISH").save(tmp_path / "expected")
    assert (tmp_path / "fish.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert 0.9 * selection.count < tuning.delta().count <= selection.count
    base = build("llama")
    sl.load(tmp_path / "fish.safetensors").apply(base)
    assert all(
        torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters(), strict=True)
    )
