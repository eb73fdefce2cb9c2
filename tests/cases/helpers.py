"""Tiny models as users have them, and what is asked of each: right, or told what to do?"""

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers as T
from torch import nn

import selective_lite as sl

PACKAGE = Path(sl.__file__).parent
DECODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 53,
    "max_position_embeddings": 32,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"} | {"num_labels": 3}
SEQ2SEQ = {
    "vocab_size": 53,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 20,
    "num_labels": 3,
}
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 11,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "classifier_proj_size": 8,
    "num_labels": 3,
}
IMAGE = {"image_size": 32, "patch_size": 16, "num_labels": 3}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4} | IMAGE
VIT["intermediate_size"] = 20


def hf(name, seed=0, **options):
    """The class of transformers of that name with this tiny configuration, in evaluation mode."""
    cls = getattr(T, name)
    torch.manual_seed(seed)
    return cls(cls.config_class(**options)).eval()


def bert(seed=0, **options):
    """A classifier of three classes, without dropout."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf("BertForSequenceClassification", seed, **ENCODER, **still, **options)


def llama(seed=0, **options):
    return hf("LlamaForCausalLM", seed, **DECODER, **options)


def tokens(labels="tokens", size=4, length=7, start=3, stop=53):
    """A batch of token ids; its labels are the tokens, or one of three classes a sample."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(start, stop, (size, length), generator=generator)
    found = ids.clone() if labels == "tokens" else torch.arange(size) % 3
    return {"input_ids": ids, "labels": found}


def images(size=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "labels": torch.arange(size) % 3,
    }


def vectors(size=8, features=6):
    """A batch for a plain `nn.Module`, see `cross_entropy`."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(size, features, generator=generator),
        "labels": torch.arange(size) % 2,
    }


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def chosen(model, **positions):
    """A selection by hand: positions of tensors, with ``__`` for the dots of their names."""
    named = {name.replace("__", "."): torch.as_tensor(p) for name, p in positions.items()}
    return sl.Selection(named, {n: tuple(p.shape) for n, p in model.named_parameters()})


def some_of_each(model, count=3, head=(), only="", seed=2):
    """A selection of a few random positions in every candidate tensor whose name holds `only`."""
    generator = torch.Generator().manual_seed(seed)
    indices, shapes = {}, {}
    for name, p in sl.weights(model, head).items():
        shapes[name] = tuple(p.shape)
        if only in name:
            drawn = torch.randperm(p.numel(), generator=generator)[: min(count, p.numel())]
            indices[name] = drawn.sort().values
    return sl.Selection(indices, shapes)


def own_loss(model, batch):
    return model(**batch).loss


def assert_gradients_agree(model, selection, batch, loss=own_loss, *, backwards=1, **options):
    """Every selected weight has the gradient that it has without the library, in float64."""
    reference = copy.deepcopy(model)
    for _ in range(backwards):
        loss(reference, batch).backward()
    named = dict(reference.named_parameters())
    with sl.masked(model, selection, head=(), **options) as tuning:
        for _ in range(backwards):
            loss(model, batch).backward()
        for (name, index), values in zip(
            selection.indices.items(), tuning.parameters(), strict=True
        ):
            true = named[name].grad
            true = true.to_dense() if true.is_sparse else true
            assert values.grad is not None, f"{name} has no gradient"
            found = values.grad.to_dense() if values.grad.is_sparse else values.grad
            true = true.reshape(-1)[index]
            scale = max(true.abs().max().item(), 1e-6)
            assert (found.reshape(-1) - true).abs().max() <= 1e-8 * scale, name


def assert_only_these_moved(before, model, selection, head=()):
    """Selected weights moved; all others, the task head aside, are bit for bit what they were."""
    masks, moved = selection.masks(), 0
    for name, p in model.named_parameters():
        if name in head:
            continue
        mask = masks.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.equal(p.detach()[~mask], before[name][~mask]), name
        moved += int((p.detach()[mask] != before[name][mask]).sum())
    assert moved > 0


@contextmanager
def refused(*words, kinds=(ValueError, TypeError, RuntimeError)):
    """The library (not torch behind it) raises an error that says one of these words."""
    with pytest.raises(kinds) as info:
        yield
    assert_clear(info.value, words)


@contextmanager
def right_or_refused(*words):
    """Nothing is raised, or an error of the library that says one of these words."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        assert_clear(error, words)


def assert_clear(error, words):
    """The error is the library's own, and says one of these words."""
    raised = error.__traceback__
    while raised.tb_next is not None:
        raised = raised.tb_next
    where = Path(raised.tb_frame.f_code.co_filename)
    assert PACKAGE in where.parents, f"raised in {where}, not by the library: {error!r}"
    text = str(error).lower()
    assert any(word.lower() in text for word in words), f"says none of {words}: {error}"


def train(model, parameters, batch, loss=own_loss, steps=3, lr=1e-2, kind=torch.optim.AdamW):
    """A user's own loop."""
    optimizer = kind(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return optimizer
