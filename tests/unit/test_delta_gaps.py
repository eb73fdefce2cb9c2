"""Gaps: positions come back as they were, and no stream makes more than was declared."""

import lzma
import math
import tracemalloc

import pytest
import torch

import selective_lite as sl
from selective_lite.ship.file import digest, flat_names, read
from selective_lite.ship.positions import FILTERS, increasing, pack, unpack


def drawn(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values


@pytest.mark.parametrize(
    "positions",
    [
        [],
        [torch.tensor([0])],
        [torch.tensor([0, 1, 2]), torch.tensor([5], dtype=torch.int32), torch.arange(300)],
        [torch.tensor([7, 2**31, 2**40, 2**62])],
        [drawn(10_000, 500).int(), drawn(99, 99)],
    ],
    ids=["none", "one", "short", "far apart", "random"],
)
def test_positions_come_back(positions):
    found = unpack(pack(positions), [len(index) for index in positions])
    assert [index.tolist() for index in found] == [index.tolist() for index in positions]


def test_random_positions_take_at_most_a_twentieth_more_than_their_entropy():
    size, count = 10_000_000, 50_000
    entropy = (
        (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1))
        / math.log(2)
        / 8
    )
    assert len(pack([drawn(size, count)])) <= 1.05 * entropy


def stream(content):
    packed = lzma.compress(content, lzma.FORMAT_RAW, filters=FILTERS)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: whole[:-1],
        lambda whole: torch.cat([whole, whole[-1:]]),
        lambda whole: whole[:0],
        lambda whole: whole.flip(0),
        lambda whole: stream(bytes(8 * 49)),
        lambda whole: stream(bytes(8 * 51)),
        lambda whole: stream(bytes(8 * 50 - 1)),
    ],
    ids=["cut", "longer", "empty", "other bytes", "too few", "too many", "half a gap"],
)
def test_a_stream_that_does_not_hold_what_was_declared_raises(damaged):
    with pytest.raises(ValueError, match="the stream of gaps"):
        unpack(damaged(pack([drawn(1000, 50)])), [50])


def test_a_stream_of_a_gigabyte_is_never_unpacked():
    bomb = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=FILTERS)
    content = b"".join([*(bomb.compress(bytes(2**20)) for _ in range(100)), bomb.flush()])
    packed = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    assert len(content) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="does not hold 1000 gaps"):
            unpack(packed, [1000])
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "index",
    [[], [-1, 3], [0, 10], [3, 3], [4, 2], [0, 2**63 - 1, -(2**63), -1, 5]],
    ids=[
        "none",
        "negative",
        "too large",
        "twice",
        "unsorted",
        "each difference overflows to a positive one",
    ],
)
def test_positions_that_are_not_increasing_within_the_size_are_seen(index):
    assert not increasing(torch.tensor(index, dtype=torch.int64), 10)
    assert increasing(torch.tensor([0, 9]), 10)


# In a file


@pytest.fixture
def deltas(build, tmp_path):
    """A delta with single weights, a whole tensor and a head, and the paths of both encodings."""
    base, model = build("toy"), build("toy")
    with torch.no_grad():
        for name, index in (("first.weight", [0, 3, 41]), ("embedding.weight", [7, 60, 65])):
            model.get_parameter(name).view(-1)[index] += 1
        model.norm.bias += 1
        model.classifier.bias += 1
    delta = sl.diff(base, model, method="by hand")
    paths = {encoding: tmp_path / encoding for encoding in ("flat", "gap-lzma")}
    for encoding, path in paths.items():
        delta.save(path, encoding)
    return delta, paths


def same(one, other):
    return digest("", flat_names(one.parts)) == digest("", flat_names(other.parts))


def contents(path):
    tensors, metadata = read(path)
    return digest("", tensors), metadata


def without_encoding(delta):
    return {key: value for key, value in delta.metadata.items() if key != "encoding"}


def test_both_encodings_load_to_the_same_delta_and_say_which_they_are(deltas):
    delta, paths = deltas
    for encoding, path in paths.items():
        loaded = sl.load(path)
        assert loaded.metadata["encoding"] == encoding
        assert without_encoding(loaded) == without_encoding(delta)
        assert same(loaded, delta)


def test_a_delta_is_saved_again_in_either_encoding(deltas):
    _, paths = deltas
    for source in paths.values():
        for encoding, path in paths.items():
            again = path.with_name("again")
            sl.load(source).save(again, encoding)
            assert contents(again) == contents(path)


def test_small_modules_travel_beside_gaps(build, tmp_path):
    base, model = build("toy"), build("toy")
    sl.add_adapters(model, "first.weight", rank=2)
    delta = sl.diff(base, model)
    delta.save(tmp_path / "delta", "gap-lzma")
    loaded = sl.load(tmp_path / "delta")
    assert without_encoding(loaded) == without_encoding(delta)
    assert same(loaded, delta)
    with loaded.apply(base):
        assert set(sl.adapters(base)) == {"first.weight"}


def test_an_unknown_encoding_raises_and_writes_nothing(deltas, tmp_path):
    with pytest.raises(ValueError, match="encoding='zip' is unknown; choose one of"):
        deltas[0].save(tmp_path / "new", "zip")
    assert not (tmp_path / "new").exists()


def test_an_overflow_in_forged_flat_positions_is_refused(deltas, tmp_path):
    delta, _ = deltas
    delta.positions["first.weight"] = torch.tensor([0, 2**63 - 1, -(2**63), -1, 5])
    delta.values["first.weight"] = torch.zeros(5)
    delta.metadata["k"] = delta.count
    delta.save(tmp_path / "forged")
    with pytest.raises(sl.DeltaError, match="must increase strictly"):
        sl.load(tmp_path / "forged")


def test_the_digest_is_of_the_stored_bytes(deltas):
    tensors, _ = read(deltas[1]["gap-lzma"])
    assert set(tensors) == {
        "gaps",
        *(key for key in flat_names(deltas[0].parts) if not key.startswith("positions/")),
    }
    changed = {**tensors, "gaps": tensors["gaps"] ^ 1}
    assert digest("", changed) != digest("", tensors)
