"""BitFit against the authors' code (Ben Zaken et al. 2022): counts and names on BERTs."""

import json
from pathlib import Path

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.bitfit import QUERY_AND_MLP, bitfit

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = json.loads((DATA / "bitfit.json").read_text())
# What the stored configurations leave open: attention heads (which change no count), and positions.
OPEN = {"bert-base-cased": (12, 512), "bert-large-cased": (16, 512), "tiny": (2, 20)}
# The authors add the pooler's bias to every partial set, and match parts of names: `output` is in
# attention blocks too.
PARTS = {
    "all": None,
    "query+intermediate": (*QUERY_AND_MLP, "pooler"),
    "output": ("output.dense", "pooler"),
    "output_layernorm": ("output.LayerNorm", "pooler"),
    "attention_layernorm": ("attention.output.LayerNorm", "pooler"),
}


def bert(which):
    from transformers import BertConfig, BertForSequenceClassification

    heads, positions = OPEN[which]
    config = BertConfig(
        **GOLDEN[which]["config"], num_attention_heads=heads, max_position_embeddings=positions
    )
    with torch.device("meta"):
        return BertForSequenceClassification(config)


@pytest.fixture(scope="module", params=OPEN)
def which(request):
    return request.param, bert(request.param)


@pytest.mark.parametrize("part", PARTS)
def test_the_counts_and_the_names_are_the_authors(which, part):
    name, model = which
    expected, selection = GOLDEN[name][part], bitfit(model, PARTS[part])
    head = sl.head_weights(model)
    assert selection.count == expected["trainable_excl_classifier"]
    assert selection.count + sum(p.numel() for p in head.values()) == expected["trainable"]
    assert len(selection.indices) + len(head) == expected["n_tensors"]
    if "names" in expected:
        assert [*selection.indices, *head] == expected["names"]
    for bias, index in selection.indices.items():
        assert len(index) == model.get_parameter(bias).numel()


def test_the_shares_of_the_model_are_the_authors(which):
    name, model = which
    total = sum(p.numel() for p in model.parameters())
    assert total == GOLDEN[name]["total_params"]
    assert 100 * bitfit(model).count / total == pytest.approx(
        GOLDEN[name]["all"]["pct_excl_classifier"]
    )
