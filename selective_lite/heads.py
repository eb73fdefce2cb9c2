"""Heads: which parameters are the task head, the part that was added to a pretrained model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

CHILDREN = ("classifier", "score", "qa_outputs", "classification_head", "ctc_head")
# Endings of the classes whose output layer is pretrained, also where they do not give it out.
LANGUAGE = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
Names = str | Sequence[str]  # names of parameters, or dotted prefixes of them
Head = Names | None  # None finds it
TORCHVISION = ("fc", "classifier", "head", "heads")


class HeadWarning(UserWarning):
    """No task head was found in a model that is not a language model; say ``head=``."""


def class_of(module: nn.Module, besides: tuple[str, ...] = ()) -> type:
    """A module's class below the one that `fully_shard` put before it, and those of packages."""
    skipped = ("torch.distributed.", *besides)
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith(skipped))


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Names or prefixes of the task head's parameters; ``()`` where there is none.

    A model of `transformers` has its head outside ``base_model``, unless that part is a pretrained
    output layer (a language model). timm says in ``pretrained_cfg`` where its classifier is;
    torchvision's is the last layer of ``fc``, ``classifier``, ``head`` or ``heads``; elsewhere a
    child named ``classifier``, ``score``, ``qa_outputs`` or ``classification_head`` is the head.

    Warns
    -----
    HeadWarning
        If nothing is found in something that is not a language model.
    """
    base = getattr(model, "base_model", None) if hasattr(model, "base_model_prefix") else None
    if base is not None:
        pretrained = class_of(model).__name__.endswith(LANGUAGE)
        if pretrained or model.get_output_embeddings() is not None:  # type: ignore[operator]
            return ()
        inside = {id(p) for p in base.parameters()}
        outside = tuple(n for n, p in model.named_parameters() if id(p) not in inside)
        if outside or "For" not in class_of(model).__name__:  # BertModel is a base, and has no head
            return outside
    found, children = _by_name(model), [name for name, _ in model.named_children()]
    if not found and children:
        like = [name for name in children if name in (*TORCHVISION, "output", "proj")]
        guess = f"head=({like[-1]!r},)" if like else "head=('name of the head',)"
        text = f"no task head was found in {class_of(model).__name__}: all its weights are "
        text += f"candidates; pass {guess} if it has one, or head=() if it has none"
        warnings.warn(text, HeadWarning, stacklevel=3)
    return found


def _by_name(model: nn.Module) -> tuple[str, ...]:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    names: Any = CHILDREN
    if isinstance(config, dict) and "classifier" in config:  # timm
        names = config["classifier"] or ()
        names = (names,) if isinstance(names, str) else names
    elif class_of(model).__module__.startswith("torchvision."):
        children = dict(model.named_children())
        return tuple(_last_layer(n, children[n]) for n in TORCHVISION if n in children)[:1]
    own = [name for name, _ in model.named_parameters()]  # a tied one by its first name
    return tuple(n for n in names if any(p.startswith(f"{n}.") for p in own))


def _last_layer(name: str, module: nn.Module) -> str:
    """The last layer with parameters of a stack: the others of VGG's are pretrained."""
    layers = [n for n, m in module.named_children() if any(True for _ in m.parameters())]
    return f"{name}.{layers[-1]}" if isinstance(module, nn.Sequential) and layers else name
