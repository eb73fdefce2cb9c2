"""Hugging Face: a file that knows its base, and a delta at every checkpoint to resume."""

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

import selective_lite as sl
from selective_lite import hf
from selective_lite.ship.file import bits

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def shipped(base, folder, **kwargs):
    """A base saved in a folder and loaded from it, the same model tuned, and the delta's file."""
    base.save_pretrained(folder / "base")
    tuned = type(base).from_pretrained(folder / "base", **kwargs)
    start = sl.snapshot(tuned)
    with torch.no_grad():
        for p in list(tuned.parameters())[2::3]:
            p.view(-1)[:2] += 1
        for p in sl.head_weights(tuned).values():
            p.add_(1)
    sl.diff(start, tuned).save(folder / "delta")
    return tuned, folder / "delta"


def same(one, other):
    theirs = sl.snapshot(other)
    return all(torch.equal(t, theirs[name]) for name, t in sl.snapshot(one).items())


# from_delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_the_file_loads_its_base(build, batches, tmp_path, kind, dtype):
    tuned, file = shipped(build(kind), tmp_path, dtype=dtype)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, delta = hf.from_delta(file)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model) is type(tuned)
    assert model.dtype == dtype
    assert not model.training
    assert same(model, tuned)
    assert delta.count == sl.load(file).count


def test_labels_come_with_it(build, tmp_path):
    base = build("bert")
    base.save_pretrained(tmp_path / "base")
    names = {0: "bad", 1: "good"}
    tuned = type(base).from_pretrained(
        tmp_path / "base", num_labels=2, id2label=names, ignore_mismatched_sizes=True
    )
    start = sl.snapshot(tuned)
    with torch.no_grad():
        tuned.get_parameter(QUERY).view(-1)[:2] += 1
    sl.diff(start, tuned).save(tmp_path / "delta")
    model, _ = hf.from_delta(tmp_path / "delta", ignore_mismatched_sizes=True)
    assert model.config.id2label == names
    assert model.config.label2id == {"bad": 0, "good": 1}
    assert same(model, tuned)


def test_a_base_that_was_moved_is_given(build, tmp_path):
    tuned, file = shipped(build("bert"), tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"base '.*base' cannot be loaded; give base=, a folder"):
        hf.from_delta(file)
    model, _ = hf.from_delta(file, base=tmp_path / "moved")
    assert same(model, tuned)


def test_another_base_is_refused(build, tmp_path):
    _, file = shipped(build("bert"), tmp_path)
    build("bert", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(sl.DeltaError, match="not the base that this delta was made from"):
        hf.from_delta(file, base=tmp_path / "other")


def test_arguments_win_over_the_file(build, tmp_path):
    _, file = shipped(build("bert"), tmp_path)
    with pytest.raises(sl.DeltaError, match="is torch.float64, the delta's base is torch.float32"):
        hf.from_delta(file, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name_or_path": None}, "does not say where its base is; give base="),
        ({"class": None}, "is for a None, which is not a model of transformers"),
        ({"class": "MyOwnModel"}, "is for a MyOwnModel, which is not a model of transformers"),
        ({"class": "pipeline"}, "is for a pipeline, which is not a model"),
        ({"class": "BertTokenizer"}, "is for a BertTokenizer, which is not a model"),
    ],
)
def test_what_the_file_does_not_say_is_said(build, tmp_path, change, message):
    _, file = shipped(build("bert"), tmp_path)
    delta = sl.load(file)
    said = {**delta.metadata["base"], **change}
    delta.metadata["base"] = {key: value for key, value in said.items() if value}
    delta.save(file)
    with pytest.raises(sl.DeltaError, match=message):
        hf.from_delta(file)


def test_the_module_imports_no_transformers():
    code = "import sys, selective_lite.hf; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'SaveEverything'"):
        _ = hf.SaveEverything
    assert hf.SaveDelta is hf.SaveDelta


# SaveDelta


@pytest.fixture
def train(tmp_path, batches):
    """train(model, **arguments) -> a Trainer with the callback, run for 6 steps, saving at 3."""

    def make(model, *, resume=None, callback=None, kind="bert", **arguments):
        examples = [{k: v[0] for k, v in b.items()} for b in batches(kind, 24, size=1)]
        options = {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = Trainer(
            model,
            TrainingArguments(tmp_path, **{**options, **arguments}),
            train_dataset=examples,
            callbacks=[callback or hf.SaveDelta()],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return make


def test_every_checkpoint_has_its_delta(build, pick, train, tmp_path):
    model = build("bert")
    with sl.masked(model, pick(model)) as tuning:
        train(model)
        sl.load(tmp_path / "checkpoint-3" / "delta.safetensors").apply(build("bert"))
    last = sl.load(tmp_path / "checkpoint-6" / "delta.safetensors")
    assert last.count == tuning.selection.count
    base = build("bert")
    last.apply(base)
    assert same(base, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_stopped_and_resumed_is_as_if_never_stopped(build, pick, train, tmp_path, kind, dtype):
    ends, checkpoint = [], tmp_path / "checkpoint-3"
    for resume in (None, str(checkpoint)):
        model = build(kind).to(dtype)
        if resume is None:
            selection = pick(model)
        else:  # of the file, as a new process would have it
            selection = sl.load(checkpoint / "delta.safetensors").selection(model)
        with sl.masked(model, selection) as tuning:
            train(model, kind=kind, resume=resume)
        ends.append((sl.snapshot(model), tuning.values(precise=True)))
        if resume is None:
            shutil.rmtree(tmp_path / "checkpoint-6")
    for straight, resumed in zip(*ends, strict=True):
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(bits(t), bits(resumed[name])) for name, t in straight.items())


@pytest.fixture
def stopped(build, pick, train, tmp_path):
    """The checkpoint of a training that was stopped."""
    model = build("bert")
    with sl.masked(model, pick(model)):
        train(model, max_steps=3)
    return tmp_path / "checkpoint-3"


def test_resuming_with_another_selection_is_refused(build, pick, train, stopped):
    model = build("bert")
    with (
        sl.masked(model, pick(model, seed=1)),
        pytest.raises(ValueError, match="delta is of another selection: it has 3 weights of 'bert"),
    ):
        train(model, resume=str(stopped))


def test_resuming_with_a_larger_selection_is_refused(build, pick, train, stopped):
    model = build("bert")
    chosen = pick(model)
    free = ~chosen.masks()[QUERY].view(-1)
    more = torch.cat([chosen.indices[QUERY], free.nonzero().squeeze(1)[:2]]).sort().values
    larger = sl.Selection({**chosen.indices, QUERY: more}, chosen.shapes)
    with (
        sl.masked(model, larger),
        pytest.raises(
            ValueError, match="another selection: it has 3 .* training has 5, they share 3"
        ),
    ):
        train(model, resume=str(stopped))


def test_resuming_without_masked_training_is_refused(build, train, stopped):
    with pytest.raises(ValueError, match="SaveDelta needs a model in masked training"):
        train(build("bert"), resume=str(stopped))


def test_resuming_without_the_delta_is_refused(build, pick, train, stopped, tmp_path):
    (stopped / "delta.safetensors").rename(tmp_path / "delta.safetensors")
    model = build("bert")
    with (
        sl.masked(model, pick(model)),
        pytest.raises(ValueError, match=r"checkpoint-3.delta.safetensors is missing"),
    ):
        train(model, resume=str(stopped))
    model = build("bert")
    with sl.masked(model, pick(model)) as tuning:
        train(model, resume=str(stopped), callback=hf.SaveDelta(folder=tmp_path))
    assert tuning.delta().count > 0


def test_resuming_from_a_model_that_was_loaded_tuned_is_refused(build, pick, train, stopped):
    model = type(build("bert")).from_pretrained(stopped)
    with (
        sl.masked(model, pick(model)),
        pytest.raises(sl.DeltaError, match="not the base .* already carries a delta"),
    ):
        train(model, resume=str(stopped))
