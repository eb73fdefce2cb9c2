"""The four committed deltas are those of their rows, and answer as the rows say."""

import pytest
import torch

import selective_lite as sl
from selective_lite.lab import evaluate, load_classifier, load_task, results
from selective_lite.lab.data.sentiment import DOMAINS
from selective_lite.lab.experiments import four_deltas

ROWS = {
    (row["config"]["method"], row["config"]["task"]): row for row in results.read(four_deltas.NAME)
}


def test_every_task_has_a_delta_and_a_lora():
    assert set(ROWS) == {(method, task) for method in four_deltas.METHODS for task in DOMAINS}


@pytest.mark.parametrize("task", DOMAINS)
def test_a_shipped_file_is_its_row_s_and_answers_as_recorded(task):
    row = ROWS["lt_sft", task]
    file = results.find(f"{task}.safetensors")
    assert (four_deltas.sha256(file), file.stat().st_size) == (row["sha256"], row["bytes"])
    delta = four_deltas.opened(task)
    assert delta.count == row["trained"] == round(row["config"]["budget"] * delta.metadata["total"])
    model, tokenizer = load_classifier()
    before = sl.snapshot(model)
    sizes = {"train": row["config"]["train"], "validation": row["config"]["validation"]}
    test = load_task(task, tokenizer, **sizes, device=model.device).test
    some = torch.arange(0, len(test), 25)
    recorded = torch.from_numpy(results.unpack(row["correct"], row["tested"]))[some]
    for part in (test.texts, test.labels, test.documents, test.tokens):
        part[:] = [part[i] for i in some]
    with delta.apply(model):
        found = evaluate(model, test)["correct"]
    # an answer on the fence may turn with the machine
    assert (found == recorded).float().mean() > 0.99
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_task_without_a_delta_is_named():
    with pytest.raises(FileNotFoundError, match="task='songs' has no delta"):
        four_deltas.opened("songs")
