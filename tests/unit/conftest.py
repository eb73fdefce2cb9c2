"""What the unit tests stand on: tiny models drawn from a seed, batches, and a selection."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.kernels import native

torch.set_num_threads(1)  # the tensors are tiny: a second thread would cost more than it gives


@pytest.fixture(params=["C", "torch"])
def kernels(request, monkeypatch):
    """Sampled products by the C source, and by torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("there is no C compiler")
    return request.param


class Toy(nn.Module):
    """An embedding, two linear layers and a classifier; called as BERT is.

    Between the linear layers are a norm and dropout.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(7, 5, bias=False)
        self.classifier = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(7))

    def forward(self, input_ids, labels=None):
        hidden = torch.tanh(self.norm(self.first(self.embedding(input_ids).mean(1))) * self.scale)
        logits = self.classifier(torch.tanh(self.second(self.dropout(hidden))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def _bert(task):
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    config = BertConfig(
        vocab_size=53,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
        num_labels=3,
    )
    return {"bert": BertForSequenceClassification, "bert_tied": BertForMaskedLM}[task](config)


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=53,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=53, n_embd=12, n_layer=2, n_head=2, n_positions=16)
    )


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return ViTForImageClassification(config)


BUILDERS = {
    "toy": Toy,
    "bert": lambda: _bert("bert"),
    "bert_tied": lambda: _bert("bert_tied"),
    "llama": _llama,  # input and output embeddings are tied, two query heads share a key head
    "gpt2": _gpt2,  # Conv1D, tied
    # Its embeddings are a convolution and bare parameters, of which no part can be masked.
    "vit": _vit,
}
CLASSIFIERS = ("toy", "bert")


@pytest.fixture(scope="session")
def build():
    """build(kind, seed=0) -> a fresh tiny model in evaluation mode.

    The same seed gives the same weights.
    """

    def make(kind, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return BUILDERS[kind]().eval()

    return make


@pytest.fixture(scope="session")
def batches():
    """batches(kind, count, size=3, device="cpu") -> batches: inputs, and labels.

    The inputs are token ids without padding, or images.
    """

    def make(kind, count, size=3, device="cpu"):
        return [
            {key: value.to(device) for key, value in batch.items()}
            for batch in drawn(kind, count, size)
        ]

    def drawn(kind, count, size):
        generator = torch.Generator().manual_seed(1)
        if kind == "vit":
            images = [torch.randn(size, 1, 8, 8, generator=generator) for _ in range(count)]
            return [
                {"pixel_values": i, "labels": torch.randint(0, 3, (size,), generator=generator)}
                for i in images
            ]
        ids = [torch.randint(1, 11, (size, 7), generator=generator) for _ in range(count)]
        if kind in CLASSIFIERS:
            return [
                {"input_ids": i, "labels": torch.randint(0, 3, (size,), generator=generator)}
                for i in ids
            ]
        return [{"input_ids": i, "labels": i.clone()} for i in ids]

    return make


@pytest.fixture(scope="session")
def pick():
    """pick(model, per_tensor=3, seed=0) -> a selection.

    It has some random weights of every candidate tensor.
    """

    def make(model, per_tensor=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        indices, shapes = {}, {}
        for name, p in sl.weights(model).items():
            count = min(per_tensor, p.numel())
            indices[name] = torch.randperm(p.numel(), generator=generator)[:count].sort().values
            shapes[name] = tuple(p.shape)
        return sl.Selection(indices, shapes)

    return make


@pytest.fixture
def meta_default():
    """Make `meta` the default device.

    A tensor that a function forgets to place then holds no numbers.
    """
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
