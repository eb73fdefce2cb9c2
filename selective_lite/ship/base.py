"""Base: which model a delta was made from, and where its tensors are in another one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..heads import class_of
from ..kernels.sharded import is_sharded, whole
from ..params import holds_codes, named_buffers, named_parameters, owners, ties, unwrap
from .file import DeltaError, digest

DIGITS = 12  # of a fingerprint: it tells models apart, it does not keep forgers out


def base_of(model: nn.Module) -> dict[str, Any]:
    """What a file says of its base: enough to load it again, read from the model's ``config``.

    Returns
    -------
    dict
        ``class`` and ``dtype`` of any model; for a model of `transformers` also ``name_or_path``,
        ``revision`` (a commit of the hub), ``part`` (its prefix of the names inside the base
        model), and for a classifier ``num_labels`` and ``id2label``. What is not known is left out.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    ours = __name__.partition(".")[0] + "."  # a layer in masked training has a class of ours
    floats = (p for p in named_parameters(model).values() if p.is_floating_point())
    found = {
        "class": class_of(model, (ours,)).__name__,
        "dtype": str(next(floats).dtype),
        "name_or_path": getattr(config, "_name_or_path", None),
        "revision": getattr(config, "_commit_hash", None),
        "part": getattr(model, "base_model_prefix", None),
    }
    labels = getattr(config, "id2label", None)
    if isinstance(labels, dict) and not _has_output_embeddings(model):
        found["num_labels"] = len(labels)
        found["id2label"] = {str(number): str(label) for number, label in labels.items()}
    return {key: value for key, value in found.items() if value and type(value) in (str, int, dict)}


def _has_output_embeddings(model: Any) -> bool:
    # A language model's config has labels too, which mean nothing.
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def library_version() -> str:
    """The version of this library."""
    return sys.modules[__name__.partition(".")[0]].__version__


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Unique parameters and persistent buffers, by their canonical names."""
    return {**named_parameters(model), **named_buffers(model)}


def at(tensor: Tensor, positions: Tensor | None = None) -> Tensor:
    """A copy on the CPU of a tensor's values at flat positions, or of all of them, flat."""
    flat = whole(tensor.detach()).reshape(-1)
    if positions is None:
        return flat.cpu().clone()
    return flat.index_select(0, positions.to(tensor.device)).cpu()


def fingerprint(replaced: Tensor | None, sampled: Tensor | None) -> str:
    """Of the base's values that one tensor's part replaces, and of some that tell its matrix."""
    parts = {"replaced": replaced, "sampled": sampled}
    return digest("", {key: t for key, t in parts.items() if t is not None})[:DIGITS]


@dataclass(frozen=True)
class Names:
    """Where a delta's tensors are in a model.

    Attributes
    ----------
    found
        ``{name in the delta: canonical name in the model}``.
    tensors
        The model's, by canonical name.
    tables
        Canonical names of the weights of embeddings.
    left_out
        Names of the delta's head, if the model has none of it.
    """

    found: dict[str, str]
    tensors: dict[str, Tensor]
    tables: set[str]
    left_out: tuple[str, ...] = ()


def find_names(
    body: Sequence[str], head: Sequence[str], metadata: Mapping[str, Any], model: nn.Module
) -> Names:
    """Where a delta's tensors are in a model, which may have its base under another prefix.

    Parameters
    ----------
    body, head
        The delta's names.
    metadata
        Its metadata, of which ``ties`` and the base's ``part`` are read.
    model
        The model; wrappers are seen through.

    Raises
    ------
    DeltaError
        If a tensor is missing, fits under several prefixes, or is tied to others than in the base.
    """
    tied, tensors, places = ties(model), tensors_of(model), owners(model)
    canonical = {name: name for name in tensors}
    canonical |= {other: name for name, others in tied.items() for other in others}
    old, new = _prefixes(body, canonical, metadata["base"].get("part"))

    def renamed(name: str) -> str:
        other = new + name.removeprefix(old) if name.startswith(old) else name
        return other if other in canonical else name

    missing = [name for name in head if renamed(name) not in canonical]
    if missing and (not body or len(missing) < len(head)):
        raise DeltaError(
            f"model has no parameter {missing[0]!r}, which is part of the delta's head; load the "
            "class that was tuned"
        )
    names = {name: canonical[renamed(name)] for name in (*body, *head) if name not in missing}
    for name, own in names.items():
        partners = [name, *metadata["ties"].get(name, ())]
        for partner in partners:
            if canonical.get(renamed(partner), own) != own:
                raise DeltaError(
                    f"the delta's base ties {name!r} to {partner!r}, the model does not; tie them "
                    "(tie_word_embeddings=True), or load the base that was tuned"
                )
        known = {renamed(partner) for partner in partners}
        # A module that is registered twice has a second name for its weight, which is no tie.
        for other in (own, *tied.get(own, ())) if len(places.get(own, ())) > 1 else ():
            if other not in known:
                raise DeltaError(
                    f"model ties {own!r} to {other!r}, the delta's base does not; load the base "
                    "that was tuned (tie_word_embeddings=False)"
                )
    tables = {n for n, at in places.items() if any(isinstance(m, nn.Embedding) for m, _ in at)}
    return Names(names, tensors, tables, tuple(missing))


def _prefixes(body: Sequence[str], known: Mapping[str, str], part: str | None) -> tuple[str, str]:
    """What the beginning of a delta's names is in a model: (old, new), both empty if the same."""
    missing = next((name for name in body if name not in known), None)
    if missing is None:
        return "", ""
    shared = _shared([name.split(".")[:-1] for name in body])
    starts = [".".join(shared[: i + 1]) + "." for i in range(len(shared))]
    tried = [(start, "") for start in starts]
    for start in ("", f"{part}."):
        if not start or start in starts:
            end = "." + body[0].removeprefix(start)
            tried += [(start, name[: 1 - len(end)]) for name in known if name.endswith(end)]
    # By what becomes of the first name, which tells what becomes of all. The head follows a change
    # of the whole name ("" to "net.") but not one of the base model's part: that one wins.
    fitting = {
        new + body[0].removeprefix(old): (old, new)
        for old, new in reversed(tried)
        if all(new + name.removeprefix(old) in known for name in body)
    }
    if not fitting:
        raise DeltaError(f"model has no parameter {missing!r}; this delta is for another base")
    if len(fitting) > 1:
        raise DeltaError(
            f"model has the delta's {body[0]!r} several times, as {' and as '.join(fitting)}; "
            "apply the delta to the part that is meant"
        )
    return next(iter(fitting.values()))


def _shared(paths: Sequence[list[str]]) -> list[str]:
    """The parts that all paths begin with."""
    first, last = min(paths), max(paths)  # in alphabetical order, all others lie between
    pairs = zip(first, last, strict=False)
    return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def check_tensor(name: str, tensor: Tensor, shape: list[int], dtype: str, table: bool) -> None:
    """Raise a `DeltaError` unless a model's tensor has the base's shape and dtype, and values.

    Parameters
    ----------
    name, tensor
        The model's.
    shape, dtype
        The base's.
    table
        Whether it belongs to an embedding, whose rows may have been resized.
    """
    found = list(tensor.shape)
    if is_sharded(tensor):
        raise DeltaError(f"model's {name!r} is sharded; apply the delta before fully_shard")
    if tensor.is_meta:
        raise DeltaError(
            f"model's {name!r} is on the meta device (offloaded, or not loaded), which holds no "
            "values; load the whole model (device_map=None)"
        )
    if holds_codes(tensor) or (dtype.startswith("torch.float") and not tensor.is_floating_point()):
        raise DeltaError(
            f"model's {name!r} is quantized ({type(tensor).__name__}, {tensor.dtype}), the delta's "
            f"base is {dtype}; load it without quantization"
        )
    if found != shape:
        resized = table and found[1:] == shape[1:]
        raise DeltaError(
            f"model's {name!r} has shape {found}, the delta's base has {shape}"
            + (f"; resize alike: model.resize_token_embeddings({shape[0]})" if resized else "")
        )
    if str(tensor.dtype) != dtype:
        raise DeltaError(
            f"model's {name!r} is {tensor.dtype}, the delta's base is {dtype}; convert it"
        )
