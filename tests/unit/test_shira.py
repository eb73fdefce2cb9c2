"""SHiRA: peft loads the folder and computes what the delta does; what does not fit raises."""

import copy

import peft
import pytest
import torch
from torch import nn

import selective_lite as sl


def shift(model, counts):
    """Change so many random weights of the tensors whose names end so."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            count = next((c for end, c in counts.items() if name.endswith(end)), 0)
            p.view(-1)[torch.randperm(p.numel(), generator=generator)[:count]] += 0.3
    return model


def check(base, tuned, folder, batch):
    delta = sl.diff(base, tuned)
    sl.to_shira(delta, base, folder)
    with torch.no_grad():
        plain = base(**batch).logits
        with delta.apply(base):
            expected = base(**batch).logits
        loaded = peft.PeftModel.from_pretrained(base, folder).eval()
        found = loaded(**batch).logits
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    return loaded


def test_peft_computes_what_the_delta_does(build, batches, tmp_path):
    tuned = shift(build("bert"), {"query.weight": 30, "output.dense.weight": 7})
    with torch.no_grad():
        tuned.classifier.weight += 0.5
    (batch,) = batches("bert", 1)
    loaded = check(build("bert"), tuned, tmp_path / "shira", batch)
    assert {path.name for path in (tmp_path / "shira").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    layers = [
        module for module in loaded.modules() if isinstance(module, peft.tuners.shira.ShiraLayer)
    ]
    assert len(layers) == 2 + 2 * 2
    # 30 entries need 2 (12 + 12) in every layer
    assert {layer.r["default"] for layer in layers} == {2}


def test_a_model_without_a_new_head_fits_too(build, batches, tmp_path):
    tuned = shift(build("llama"), {"gate_proj.weight": 20})
    (batch,) = batches("llama", 1)
    loaded = check(build("llama"), tuned, tmp_path / "shira", batch)
    assert loaded.peft_config["default"].modules_to_save is None


class Nested(nn.Module):
    """A layer's path is the end of another one's, and holds a dot, which in a pattern is any."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"inner": nn.ModuleDict({"0": nn.Linear(5, 5)})})
        self.inner = nn.ModuleDict({"0": nn.Linear(5, 5)})

    def forward(self, x):
        return self.inner["0"](torch.tanh(self.block["inner"]["0"](x)))


def test_only_the_layers_of_the_delta_are_adapted(tmp_path):
    torch.manual_seed(0)
    base, tuned = Nested(), Nested()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.inner["0"].weight[0, :3] += 1
    sl.to_shira(sl.diff(base, tuned), base, tmp_path)
    x = torch.randn(4, 5)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    layers = [
        module for module in loaded.modules() if isinstance(module, peft.tuners.shira.ShiraLayer)
    ]
    assert len(layers) == 1
    torch.testing.assert_close(loaded(x), tuned(x))


def _biases(model):
    return shift(model, {"query.bias": 3})


def _dense(model):
    with torch.no_grad():
        model.bert.pooler.dense.bias += 1
    return model


def _modules(model):
    sl.add_adapters(model, "bert.pooler.dense.weight", rank=1)
    return model


REFUSED = [
    (_biases, "'bert.encoder.layer.0.attention.self.query.bias' is bias of a Linear"),
    (
        lambda model: shift(model, {"word_embeddings.weight": 3}),
        "embeddings.weight' is weight of a Embedding",
    ),
    (_dense, "this delta has 'bert.pooler.dense.bias'"),
    (_modules, "this delta has 'bert.pooler.dense.weight'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_raises_and_writes_nothing(build, tmp_path, change, message):
    base = build("bert")
    delta = sl.diff(base, change(build("bert")))
    with pytest.raises(ValueError, match=message):
        sl.to_shira(delta, base, tmp_path / "shira")
    assert not (tmp_path / "shira").exists()


def test_the_fullest_layer_must_not_ask_too_much_of_a_small_one(tmp_path):
    torch.manual_seed(0)
    base, tuned = (nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 1)) for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned[0].weight[:2] += 1
        tuned[1].weight[0, 0] += 1
    delta = sl.diff(base, tuned)
    with pytest.raises(ValueError, match=r"needs r=1: 21 entries in '1.weight', which has 20"):
        sl.to_shira(delta, base, tmp_path / "shira")
    assert not (tmp_path / "shira").exists()


def test_a_tied_layer_another_base_and_an_odd_head_are_refused(build, tmp_path):
    base = build("bert")
    delta = sl.diff(base, shift(build("bert"), {"query.weight": 3}))
    with pytest.raises(sl.DeltaError, match="not the base"):
        sl.to_shira(delta, build("bert", seed=1), tmp_path / "shira")
    tied = build("bert")
    layers = tied.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    one = copy.deepcopy(tied)
    with torch.no_grad():
        one.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"query.weight' is weight of a Linear and a Linear"):
        sl.to_shira(sl.diff(tied, one), tied, tmp_path / "shira")
    bias = sl.diff(base, shift(build("bert"), {"query.weight": 3}), head=["classifier.bias"])
    with pytest.raises(ValueError, match="'classifier' is none"):
        sl.to_shira(bias, base, tmp_path / "shira")
    assert not (tmp_path / "shira").exists()
