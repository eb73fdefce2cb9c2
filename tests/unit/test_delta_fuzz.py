"""Fuzz: damaged and forged files, ten thousand of float32 values and as many of steps: refused.

Or they are the delta that was saved.
"""

import json
import random
import tracemalloc

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

import selective_lite as sl
from selective_lite.ship.file import digest, flat_names

# Encoding, dtype, damaged and forged files. Of half precision the compressed encoding has steps.
KINDS = {
    "flat": ("flat", torch.float32, 3500, 1500),
    "gaps": ("gap-lzma", torch.float32, 3500, 1500),
    "steps": ("gap-lzma", torch.bfloat16, 7000, 3000),
}
MEMORY = 64  # bytes of Python's and numpy's memory, a byte of the file
ODDS = [
    None,
    True,
    0,
    -1,
    3,
    2.0,
    2**31,
    2**63,
    10**40,
    "",
    "x",
    "torch.float16",
    "lora",
    "torch.bfloat16",
    [],
    [0],
    [6, 7],
    {},
    {"a": 1},
]


class Net(nn.Module):
    """A layer for single weights, one for a small module, norms that change whole, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 7), nn.Linear(7, 5), nn.LayerNorm(5)
        self.classifier, self.batch_norm = nn.Linear(5, 3), nn.BatchNorm1d(4)


def net(dtype):
    torch.manual_seed(0)
    return Net().to(dtype)


def bits(model):
    return digest("", model.state_dict())


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """A file's content, its delta's identity, its base, how many are damaged, how many forged."""
    encoding, dtype, *counts = KINDS[request.param]
    base, model = net(dtype), net(dtype)
    with torch.no_grad():
        model.first.weight.view(-1)[[0, 5, 6, 30, 41]] += 1
        model.first.bias[2] += 1
        model.norm.weight += 1
        model.classifier.bias += 1
        model.batch_norm.num_batches_tracked += 1
        model.batch_norm.running_mean += 1
    sl.add_adapters(model, "second.weight", rank=2)
    sl.diff(base, model, method="by hand").save(tmp_path / "delta", encoding)
    saved = sl.load(tmp_path / "delta")
    assert bool(saved.parts["steps"]) == (request.param == "steps")
    return (tmp_path / "delta").read_bytes(), identity(saved), base, counts


def identity(delta):
    text = json.dumps({**delta.metadata, "encoding": ""}, sort_keys=True)
    steps = {f"steps/{name}": steps for name, steps in delta.parts["steps"].items()}
    return digest(text, {**flat_names(delta.parts), **steps})


def cut(content):
    """The file's parts: header length, header, data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:8], content[8:end], content[end:]


def damage(content, rng):
    """One to three wounds: bits flipped, bytes changed, lost or added, the end cut, blocks swapped.

    Half of them are in the header, whose length is a third of the wounds' places there.
    """
    header = 8 + len(cut(content)[1])
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        low, high = rng.choice(
            ((0, 8), (8, header), (header, len(content)), (header, len(content)))
        )
        at = min(rng.randrange(low, high), len(data) - 1)
        size = rng.choice((1, 2, 4, 8, 40))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + size] = rng.randbytes(len(data[at : at + size]))
            case 2:
                data[at : at + size] = rng.choice((b"\0", b"\xff")) * len(data[at : at + size])
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = rng.choice((rng.randbytes(size), bytes(data[at : at + size])))
            case 5:
                del data[at:]
            case 6:
                other = rng.randrange(len(data))
                block = bytes(data[at : at + size])
                data[at : at + size] = data[other : other + size]
                data[other : other + size] = block
        if not data:
            break
    return bytes(data)


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, part in inner for p in places(part, (*path, key)))]


def replaced(value, path, new):
    """A JSON value with one of its places replaced, or taken out where `new` is ..."""
    if not path:
        return None if new is ... else new
    copy = json.loads(json.dumps(value))
    spot = copy
    for key in path[:-1]:
        spot = spot[key]
    if new is ...:
        del spot[path[-1]]
    else:
        spot[path[-1]] = new
    return copy


def forged_tensor(tensor, rng):
    flat = tensor.reshape(-1)
    match rng.randrange(8):
        case 0:
            return flat[: rng.randrange(len(flat) + 1)].clone()
        case 1:
            return torch.cat([flat, flat[:1]])
        case 2:
            return tensor.to(
                rng.choice((torch.int64, torch.int32, torch.float16, torch.float64, torch.bool))
            )
        case 3:
            return flat.reshape(1, -1) if tensor.dim() == 1 else flat
        case 4:
            return flat.flip(0).reshape(tensor.shape).contiguous()
        case 5:
            new = flat.clone()
            new.view(torch.uint8)[rng.randrange(new.numel() * new.element_size())] ^= (
                1 << rng.randrange(8)
            )
            return new.reshape(tensor.shape)
        case 6:
            return torch.tensor(
                [rng.choice((0, -1, 2**31 - 1, 2**62, -(2**63), 2**63 - 1)) for _ in flat]
            )
        case _:
            return torch.empty(
                rng.choice(((0,), (0, 2**40), (2**40, 0), (0, 0))), dtype=tensor.dtype
            )


def forge(content, rng):
    """A file of other tensors, names or metadata, with a fitting checksum, as by an attacker."""
    header = json.loads(cut(content)[1])
    if rng.randrange(4) == 0:  # the container's own header
        name = rng.choice([key for key in header if key != "__metadata__"])
        path = rng.choice(places(header[name], (name,)))
        header = replaced(
            header, path, rng.choice([*ODDS, "F16", "F64", "U8", "C64", "F8_E4M3", "BOOL", ...])
        )
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + cut(content)[2]
        try:
            tensors = load_bytes(content)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AssertionError):
            return content
        header.setdefault("__metadata__", {"selective_lite": "{}"})
    else:
        tensors = load_bytes(content)
    metadata = json.loads(header["__metadata__"]["selective_lite"])
    for _ in range(rng.choice((0, 1, 1, 2))):
        metadata = replaced(metadata, rng.choice(places(metadata)), rng.choice([*ODDS, ...]))
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(sorted(tensors)) if tensors else "gaps"
        match rng.randrange(6):
            case 0:
                tensors.pop(name, None)
            case 1:
                new = rng.choice(
                    (
                        "gaps",
                        "gaps/x",
                        "lengths",
                        "directions",
                        "values/",
                        "head/x",
                        name + "/x",
                        name.replace("values", "dense"),
                    )
                )
                tensors[new] = tensors.pop(name, torch.ones(2))
            case 2:
                other = rng.choice(sorted(tensors)) if tensors else name
                tensors[name], tensors[other] = (
                    tensors.get(other, torch.ones(1)),
                    tensors.get(name, torch.ones(1)),
                )
            case _:
                if tensors.get(name, torch.ones(0)).numel():
                    tensors[name] = forged_tensor(tensors[name], rng)
    text = json.dumps(metadata)
    return save_bytes(
        {name: t.clone() for name, t in tensors.items()},
        {"selective_lite": text, "sha256": digest(text, tensors)},
    )


def refused(path, content, model, expected):
    """Whether a file raises DeltaError; else it is the `expected` delta, or leaves no trace."""
    path.write_bytes(content)
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    try:
        delta = sl.load(path)
    except sl.DeltaError:
        return True
    finally:
        assert tracemalloc.get_traced_memory()[1] - start < MEMORY * len(content) + 2**16
    if identity(delta) == expected:
        return False
    before = bits(model)
    try:
        sl.describe(delta).encode()
        with delta.apply(model):
            assert expected is None, "a damaged file was applied"
    except sl.DeltaError:
        return True
    finally:
        assert bits(model) == before
        assert sl.adapters(model) == {}
    return False


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_a_damaged_file_is_refused_or_is_the_delta_that_was_saved(kind, tmp_path, traced):
    content, saved, model, (count, _) = kind
    rng = random.Random(0)
    found = [refused(tmp_path / "file", damage(content, rng), model, saved) for _ in range(count)]
    assert sum(found) > 0.98 * count


def test_a_forged_file_is_refused_or_leaves_no_trace(kind, tmp_path, traced):
    content, _, model, (_, count) = kind
    rng = random.Random(1)
    found = [refused(tmp_path / "file", forge(content, rng), model, None) for _ in range(count)]
    # some forgeries are deltas: other values, or another method
    assert 0.7 * count < sum(found) < count
