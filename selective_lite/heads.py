"""Heads: which parameters are the task head, the part that was added to a pretrained model."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

CHILDREN = ("classifier", "score", "qa_outputs", "classification_head", "ctc_head")
# Endings of the classes whose output layer is pretrained, also where they do not give it out.
LANGUAGE = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
TORCHVISION = ("fc", "classifier", "head", "heads")


class HeadWarning(UserWarning):
    """No task head was found in a model that is not a language model; say ``head=``."""


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
        pretrained = type(model).__name__.endswith(LANGUAGE)
        if pretrained or model.get_output_embeddings() is not None:  # type: ignore[operator]
            return ()
        if base is not model:
            inside = {id(p) for p in base.parameters()}
            outside = tuple(n for n, p in model.named_parameters() if id(p) not in inside)
            if outside or "For" not in type(model).__name__:
                return outside
        elif "For" not in type(model).__name__:  # a base model, such as BertModel
            return ()
    found = _by_name(model)
    if not found and any(True for _ in model.children()):
        _warn(model)
    return found


def _by_name(model: nn.Module) -> tuple[str, ...]:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and "classifier" in config:  # timm
        names = config["classifier"] or ()
        return _with_parameters(model, (names,) if isinstance(names, str) else tuple(names))
    children = dict(model.named_children())
    if type(model).__module__.startswith("torchvision."):
        return tuple(_last_layer(n, children[n]) for n in TORCHVISION if n in children)[:1]
    return _with_parameters(model, tuple(name for name in CHILDREN if name in children))


def _with_parameters(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    own = [name for name, _ in model.named_parameters()]  # a tied one by its first name
    return tuple(n for n in names if any(p.startswith(f"{n}.") for p in own))


def _last_layer(name: str, module: nn.Module) -> str:
    """The last layer with parameters of a stack: the others of VGG's are pretrained."""
    layers = [n for n, m in module.named_children() if any(True for _ in m.parameters())]
    return f"{name}.{layers[-1]}" if isinstance(module, nn.Sequential) and layers else name


def _warn(model: nn.Module) -> None:
    like = [n for n, _ in model.named_children() if n in (*TORCHVISION, "output", "proj")]
    guess = f"head=({like[-1]!r},)" if like else "head=('name of the head',)"
    warnings.warn(
        f"no task head was found in {type(model).__name__}, so that all of its weights are "
        f"candidates; pass {guess} if it has one, or head=() if it has none",
        HeadWarning,
        stacklevel=4,
    )
