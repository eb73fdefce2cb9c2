"""File: a delta as safetensors with a SHA-256 over all of it; written whole, checked before use.

Everything that a file says is checked here, since anyone may have written it: names, shapes,
dtypes, positions. What only a model can tell (whether it is the base) is checked in `base`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from ..kernels.checks import one_of
from ..kernels.sampled import index_dtype
from ..kernels.small import KINDS, part_shapes
from .positions import increasing, pack, unpack
from .steps import HALVES, pack_steps, steps_between, unpack_steps

Encoding = Literal["flat", "gap-lzma"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
PARTS = ("positions", "values", "dense", "head", "buffers")  # of `Delta`, {name: tensor} each
MODULES, STEPS = "modules", "steps"
STREAMS = ("gaps", "directions", "lengths")  # of the compressed encoding, beside its tensors
CODED = (
    "delta's values are coded against its base's: delta.resolve(base) knows them (apply resolves "
    "them itself)"
)
KEYS = {
    "method": str,
    "library": str,
    "k": int,
    "total": int,
    "base": dict,
    "shapes": dict,
    "ties": dict,
    "fingerprints": list,
}


class DeltaError(ValueError):
    """A delta file that is damaged, or does not fit the model; the model was not touched."""


def write(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write the file in place of what was there; `metadata` must be JSON-able."""
    path, text = Path(path), json.dumps(metadata, sort_keys=True)
    header = {"selective_lite": text, "sha256": digest(text, tensors)}
    content = _ordered(save_bytes(dict(tensors), header))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _ordered(content: bytes) -> bytes:
    """The same file with its metadata in order.

    safetensors writes them in any, so that equal deltas would not be equal files.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata that `write` was given, after the check of their SHA-256.

    Raises
    ------
    DeltaError
        If this is another kind of file, or a damaged one.
    """
    content = Path(path).read_bytes()
    try:
        tensors = load_bytes(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        text = header["selective_lite"]
        found, metadata = digest(text, tensors), json.loads(text)
        if not isinstance(metadata, dict):
            raise TypeError("metadata must be an object")
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DeltaError(f"{path} is no delta file, or a damaged one: {error}") from None
    if found != header.get("sha256"):
        raise DeltaError(f"{path} is damaged: its SHA-256 is not the one it was saved with")
    return tensors, metadata


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a text and named tensors (names, dtypes, shapes, bytes), in order of names."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(raw(tensor))
    return found.hexdigest()


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, so that zeros of both signs differ and NaNs compare."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major; of a tensor on the CPU without a copy."""
    return bits(tensor.cpu()).reshape(-1).numpy().data


def flat_names(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """A delta's tensors by the names they have in a flat file, such as ``"values/encoder.weight"``.

    Parameters
    ----------
    parts
        ``{part: {name: tensor}}`` for the `PARTS`, and ``modules``, ``{name: {part: tensor}}``.
    """
    named = {f"{part}/{name}": t for part in PARTS for name, t in parts[part].items()}
    for name, small in parts[MODULES].items():
        named |= {f"{MODULES}/{name}/{part}": t for part, t in small.items()}
    return {name: tensor.contiguous() for name, tensor in named.items()}


def encode(
    path: str | os.PathLike,
    parts: Mapping[str, Any],
    before: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    encoding: Encoding,
) -> None:
    """Write a delta's parts; `before` are its base's values; other arguments as `Delta.save`."""
    one_of("encoding", encoding, ENCODINGS)
    positions, values, steps = parts["positions"], dict(parts["values"]), dict(parts[STEPS])
    metadata = {**metadata, "encoding": encoding}
    if encoding == "flat" and steps:
        raise DeltaError(CODED)
    streams: dict[str, Tensor] = {}
    if encoding == "gap-lzma":
        counts = {dtype: dict(named) for dtype, named in metadata.pop(STEPS, {}).items()}
        for name in sorted(name for name in values if values[name].dtype in HALVES):
            if name not in before:
                raise ValueError(
                    f"encoding={encoding!r} codes half-precision values against the base's, and "
                    f"those of {name!r} are not known: delta.resolve(base).save(...)"
                )
            new = values.pop(name)
            steps[name] = steps_between(before[name], new)
            counts.setdefault(str(new.dtype), {})[name] = len(new)
        streams["gaps"] = pack([positions[name] for name in sorted(positions)])
        if steps:
            joined = torch.cat([steps[name] for name in sorted(steps)])
            streams["directions"], streams["lengths"] = pack_steps(joined)
            metadata[STEPS] = counts
        positions = {}
    tensors = flat_names({**parts, "positions": positions, "values": values})
    write(path, {**tensors, **streams}, metadata)


def decode(path: str | os.PathLike) -> dict[str, Any]:
    """The parts and ``metadata`` of a delta file, all of it checked; errors as `load`."""
    tensors, metadata = read(path)
    encoding = metadata.get("encoding")
    if encoding not in ENCODINGS:
        raise DeltaError(f"{path} has encoding {encoding!r}, this library reads {ENCODINGS}")
    compressed = encoding == "gap-lzma"
    known = PARTS[1:] if compressed else PARTS
    streams = {key: tensors.pop(key) for key in STREAMS if compressed and key in tensors}
    parts: dict[str, Any] = {part: {} for part in (*PARTS, MODULES, STEPS)}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if part == MODULES:
            name, _, piece = name.rpartition("/")
            parts[MODULES].setdefault(name, {})[piece] = tensor
        elif part in known and name:
            parts[part][name] = tensor
        else:
            raise DeltaError(f"{path} holds an unknown tensor {key!r}")
    try:
        _check_metadata(metadata)
        if compressed:
            _unpack(parts, metadata, streams)
        _check_names(parts, metadata)
        _check_tensors(parts, metadata)
        _check_modules(parts[MODULES], metadata)
        if metadata["k"] != count(parts):
            raise DeltaError(f"{path} says {metadata['k']} weights, it holds {count(parts)}")
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DeltaError(f"{path} has incomplete metadata: {error!r}") from None
    for name, index in parts["positions"].items():
        parts["positions"][name] = index.to(index_dtype(prod(metadata["shapes"][name])))
    return {**parts, "metadata": metadata}


def body_of(parts: Mapping[str, Any]) -> list[str]:
    """The sorted names of the base's tensors that a delta has a part of, its head left out."""
    return sorted({*parts["positions"], *parts["dense"], *parts["buffers"], *parts[MODULES]})


def step_dtypes(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The dtype of every tensor whose values a file holds as steps, by name."""
    return {name: dtype for dtype, named in metadata.get(STEPS, {}).items() for name in named}


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    optional = {key: dict for key in (MODULES, "rounds_to", STEPS) if key in metadata}
    for key, kind in {**KEYS, **optional}.items():
        if type(metadata[key]) is not kind:
            found = type(metadata[key]).__name__
            raise DeltaError(f"delta's {key} is a {found}, not a {kind.__name__}")
    for name, shape in metadata["shapes"].items():
        if type(shape) is not list or not all(
            type(size) is int and 0 <= size < 2**63 for size in shape
        ):
            raise DeltaError(f"delta's shape of {name!r} is {shape}")
    steps = metadata.get(STEPS, {})
    numbers = [number for named in steps.values() for number in named.values()]
    if (
        not set(steps) <= {*map(str, HALVES)}
        or len(step_dtypes(metadata)) != len(numbers)
        or not all(type(number) is int and number > 0 for number in numbers)
    ):
        raise DeltaError(f"delta's numbers of steps are {steps!r:.80}")
    for texts in (metadata["fingerprints"], *metadata["ties"].values()):
        if type(texts) is not list or not all(type(text) is str for text in texts):
            raise DeltaError("delta's ties and fingerprints must be lists of texts")
    labels = metadata["base"].get("id2label", {})
    if type(labels) is not dict or not all(number.isdecimal() for number in labels):
        raise DeltaError(f"delta's labels are {labels!r:.80}")
    said = {key: value for key, value in metadata["base"].items() if key != "id2label"}
    if not all(type(text) is str for text in labels.values()) or not all(
        type(value) in (str, int) for value in said.values()
    ):
        raise DeltaError("delta's metadata of the base must be texts and whole numbers")


def _check_names(parts: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    whole = [*parts["dense"], *parts["head"], *parts["buffers"]]
    stored, coded = [*parts["values"], *parts[STEPS], *whole], step_dtypes(metadata)
    known, rounds_to = {*stored, *parts[MODULES]}, metadata.get("rounds_to", {})
    if (
        len(set(stored)) != len(stored)
        or known != set(metadata["shapes"])
        or set(parts["positions"]) != {*parts["values"], *coded}
        or set(coded) != set(parts[STEPS])
        or not set(metadata["ties"]) <= known
        or not set(rounds_to) <= known - set(coded)
        or len(metadata["fingerprints"]) != len(body_of(parts))
    ):
        raise DeltaError("delta's tensors and its metadata do not name the same parameters")


def _unpack(
    parts: Mapping[str, Any], metadata: Mapping[str, Any], streams: Mapping[str, Tensor]
) -> None:
    """Put the positions and steps that streams hold into the parts; see `_check_tensors`."""
    coded = {name: n for named in metadata.get(STEPS, {}).values() for name, n in named.items()}
    counts = {**{name: len(values) for name, values in parts["values"].items()}, **coded}
    if tuple(streams) != STREAMS[: 3 if coded else 1] or any(
        stream.dtype != torch.uint8 for stream in streams.values()
    ):
        raise DeltaError(f"delta's streams must be bytes, and {STREAMS} where it has steps")
    try:
        # First: the directions are not compressed, so that their length bounds all that follows.
        if coded:
            steps = unpack_steps(streams["directions"], streams["lengths"], sum(coded.values()))
            split = steps.split([coded[name] for name in sorted(coded)])
            parts[STEPS].update(zip(sorted(coded), split, strict=True))
        positions = unpack(streams["gaps"], [counts[name] for name in sorted(counts)])
        parts["positions"].update(zip(sorted(counts), positions, strict=True))
    except ValueError as error:
        raise DeltaError(f"delta's streams do not fit what it declares: {error}") from None


def _check_tensors(parts: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    shapes, rounds_to = metadata["shapes"], metadata.get("rounds_to", {})
    for name, index in parts["positions"].items():
        values, size = parts["values"].get(name, parts[STEPS].get(name)), prod(shapes[name])
        if (
            index.dtype not in (torch.int32, torch.int64)
            or index.dim() != 1
            or index.shape != values.shape
        ):
            raise DeltaError(f"delta's positions in {name!r} must be integers, one for every value")
        if not increasing(index, size):
            raise DeltaError(
                f"delta's positions in {name!r} must increase strictly within [0, {size})"
            )
    for name, tensor in [item for part in PARTS[2:] for item in parts[part].items()]:
        if list(tensor.shape) != shapes[name]:
            raise DeltaError(
                f"delta's {name!r} has shape {list(tensor.shape)}, its metadata say {shapes[name]}"
            )
    floats = [item for part in ("values", "dense", "head") for item in parts[part].items()]
    small = [(name, t) for name, pieces in parts[MODULES].items() for t in pieces.values()]
    for name, tensor in floats + small:
        if not tensor.is_floating_point():
            raise DeltaError(f"delta's {name!r} is {tensor.dtype}; weights are floating point")
        if name in rounds_to and (
            rounds_to[name] not in map(str, HALVES) or tensor.dtype != torch.float32
        ):
            raise DeltaError(f"delta's {name!r} is {tensor.dtype} for {rounds_to[name]!r} weights")


def count(parts: Mapping[str, Any]) -> int:
    """Number of replaced weights outside the head, and of the small modules' weights."""
    tensors = [*parts["positions"].values(), *parts["dense"].values()]
    small = [tensor for pieces in parts[MODULES].values() for tensor in pieces.values()]
    return sum(tensor.numel() for tensor in (*tensors, *small))


def _check_modules(modules: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Small modules have the parts that kind and rank say, for a matrix or its transpose."""
    specs, shapes = metadata.get(MODULES, {}), metadata["shapes"]
    if set(specs) != set(modules):
        raise DeltaError("delta's small modules and its metadata do not name the same parameters")
    for name, spec in specs.items():
        kind, rank, shape = spec["kind"], spec["rank"], shapes[name]
        known = kind in KINDS and type(rank) is int and len(shape) == 2 and 1 <= rank <= min(shape)
        if not known or not any(
            fits(modules[name], spec, *sizes) for sizes in (shape, shape[::-1])
        ):
            raise DeltaError(
                f"delta's small module of {name!r} is no {kind!r} of rank {rank!r} for shape "
                f"{shape}"
            )
        if len({tensor.dtype for tensor in modules[name].values()}) > 1:
            raise DeltaError(f"delta's small module of {name!r} has several dtypes")


def fits(pieces: Mapping[str, Tensor], spec: Mapping[str, Any], d_in: int, d_out: int) -> bool:
    """Whether these are the tensors of a small module of this kind and rank for such a layer."""
    found = {piece: tuple(tensor.shape) for piece, tensor in pieces.items()}
    return found == part_shapes(spec["kind"], d_in, d_out, spec["rank"])
