"""Steps: half-precision values against the base's, to the bit, in a file that needs the base."""

import json
import math
import tracemalloc

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

import selective_lite as sl
from selective_lite.ship.file import bits, digest
from selective_lite.ship.positions import squeeze
from selective_lite.ship.steps import pack_steps, stepped, steps_between, unpack_steps
from tests.bits import same, state

HALVES = [torch.bfloat16, torch.float16]


def every(dtype):
    """All numbers of a half-precision dtype."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def drawn(count, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (count,), generator=generator).to(torch.int16).view(dtype)


# Steps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_step_up_is_the_next_larger_number(dtype):
    up = torch.arange(2**15).to(torch.int16).view(dtype)
    up = up[up.isfinite()]  # from 0.0 on
    assert (up.double().diff() > 0).all()
    assert (steps_between(up[:-1], up[1:]) == 1).all()
    assert (steps_between(-up[1:], -up[:-1]) == 1).all()
    assert steps_between(-up[:1], up[:1]).item() == 1  # the zeros of both signs


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_values_come_back_from_any_base_to_the_bit(dtype):
    numbers = every(dtype)
    for seed in range(3):
        base = drawn(len(numbers), dtype, seed)
        assert torch.equal(bits(stepped(base, steps_between(base, numbers))), bits(numbers))


def test_lengths_stand_in_the_order_of_the_base_s_magnitudes():
    base = torch.tensor([8.0, -0.5, 2.0, -2.0, 0.25]).bfloat16()
    up = (bits(base) + torch.tensor([1, -2, 3, -4, 5], dtype=torch.int16)).view(torch.bfloat16)
    assert steps_between(base, up).tolist() == [5, 2, 3, 4, 1]


@pytest.mark.parametrize(
    "steps",
    [
        [1],
        [-1, 1] * 4,
        [-(2**15), 2**15 - 1, 0, -1],
        [1] * 9,
        drawn(1000).view(torch.int16).tolist(),
    ],
    ids=["one", "a byte", "far", "nine", "any"],
)
def test_steps_come_back(steps):
    down, lengths = pack_steps(torch.tensor(steps, dtype=torch.int16))
    assert len(down) == math.ceil(len(steps) / 8)
    assert unpack_steps(down, lengths, len(steps)).tolist() == steps


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda down, lengths: (down[:-1], lengths), "directions are not of 50 steps"),
        (lambda down, lengths: (torch.cat([down, down[:1]]), lengths), "directions are not of 50"),
        (lambda down, lengths: (down, lengths[:-1]), "the stream of lengths"),
        (lambda down, lengths: (down, lengths[:0]), "the stream of lengths"),
        (
            lambda down, lengths: (down, pack_steps(torch.ones(51).short())[1]),
            "not hold 50 lengths",
        ),
        (
            lambda down, lengths: (down, pack_steps(torch.ones(49).short())[1]),
            "not hold 50 lengths",
        ),
    ],
)
def test_streams_that_do_not_hold_what_was_declared_raise(damage, message):
    streams = pack_steps(torch.ones(50, dtype=torch.int16))
    with pytest.raises(ValueError, match=message):
        unpack_steps(*damage(*streams), 50)


# In a file


class Mixed(nn.Module):
    """Two half-precision layers of two dtypes, a float32 one, a norm with buffers and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 30).bfloat16(), nn.Linear(30, 20).half()
        self.third, self.norm = nn.Linear(20, 10), nn.BatchNorm1d(10).bfloat16()
        self.classifier = nn.Linear(10, 2).bfloat16()


def mixed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed().eval()


def moved(model, seed, share=0.1):
    """The model with a share of its weights some steps up or down, its head and buffers shifted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (model.first.weight, model.second.weight, model.second.bias):
            where = torch.rand(p.shape, generator=generator) < share
            step = torch.randint(1, 4, p.shape, generator=generator)
            step *= 2 * torch.randint(0, 2, p.shape, generator=generator) - 1
            bits(p).add_((step * where).short())
        model.third.weight.view(-1)[seed : seed + 9] += 0.1
        model.norm.weight += 1
        model.norm.running_mean += 1
        model.classifier.bias += 1
    return model


@pytest.fixture
def shipped(tmp_path):
    """A base, the tuned model, the delta, and the paths of its two files."""
    base, tuned = mixed(), moved(mixed(), 0)
    delta = sl.diff(base, tuned, method="by hand")
    paths = {encoding: tmp_path / encoding for encoding in ("flat", "gap-lzma")}
    for encoding, path in paths.items():
        delta.save(path, encoding)
    return base, tuned, delta, paths


CODED = {"first.weight", "second.weight", "second.bias"}


def test_apply_and_revert_give_every_bit(shipped, device):
    base, tuned, _, paths = shipped
    base, before = base.to(device), state(base)
    tensors = load_bytes(paths["gap-lzma"].read_bytes())
    assert {name for name in tensors if name.startswith("values/")} == {"values/third.weight"}
    applied = sl.load(paths["gap-lzma"]).apply(base)
    assert same(state(base), state(tuned))
    assert set(applied.delta.values) == {*CODED, "third.weight"}
    applied.revert()
    assert same(state(base), before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_of_every_kind_travel(tmp_path, dtype):
    base, tuned = nn.Linear(2**8, 2**8 + 1), nn.Linear(2**8, 2**8 + 1)
    for seed, model in enumerate((base.to(dtype), tuned.to(dtype))):
        model.weight.data.view(-1)[: 2**16] = drawn(2**16, dtype, seed)
    tuned.load_state_dict({**tuned.state_dict(), "bias": base.bias})
    sl.diff(base, tuned, head=()).save(tmp_path / "delta", "gap-lzma")
    with sl.load(tmp_path / "delta").apply(base):
        assert torch.equal(bits(base.weight), bits(tuned.weight))


def test_values_that_need_the_base_are_refused_until_it_is_there(shipped, tmp_path):
    base, _, delta, paths = shipped
    loaded = sl.load(paths["gap-lzma"])
    refused = [
        lambda: loaded.values["first.weight"],
        lambda: next(iter(loaded.values)),
        lambda: len(loaded.values),
        lambda: loaded.values.get("third.weight"),
        lambda: {**loaded.values},
        loaded.replaced,
        lambda: loaded.save(tmp_path / "new"),
    ]
    for look in refused:
        with pytest.raises(sl.DeltaError, match=r"coded against its base's: delta.resolve\(base\)"):
            look()
    assert not (tmp_path / "new").exists()
    before = state(base)
    resolved = loaded.resolve(base)
    assert same(state(base), before)
    assert set(resolved.values) == set(delta.values)
    for name, values in delta.values.items():
        assert torch.equal(bits(resolved.values[name]), bits(values))


def test_what_is_known_without_the_base_is_as_of_the_flat_file(shipped):
    base, _, delta, paths = shipped
    flat, coded = sl.load(paths["flat"]), sl.load(paths["gap-lzma"])
    assert (coded.count, coded.nbytes) == (flat.count, flat.nbytes) == (delta.count, delta.nbytes)
    assert coded.base_dtypes() == flat.base_dtypes()
    assert coded.base_dtypes()["second.bias"] == "torch.float16"
    for model in (None, base):
        one, other = coded.selection(model), flat.selection(model)
        assert one.shapes == other.shapes
        assert all(torch.equal(one.indices[name], other.indices[name]) for name in other.indices)
    pages = [sl.describe(path).splitlines() for path in paths.values()]
    differ = [(one, other) for one, other in zip(*pages, strict=True) if one != other]
    assert [line.split()[0] for line, _ in differ] == ["in", "encoding"]
    half = sum(len(delta.positions[name]) for name in CODED)
    assert f"values 36, dense 20, head 44, buffers 20, steps {2 * half} bytes" in differ[0][1]


def test_a_delta_is_saved_again_in_either_encoding(shipped, tmp_path):
    base, _, _, paths = shipped
    flat, coded = (sl.load(paths[encoding]) for encoding in ("flat", "gap-lzma"))
    for delta in (flat.resolve(base), coded.resolve(base)):
        for encoding, path in paths.items():
            delta.save(tmp_path / "again", encoding)
            assert (tmp_path / "again").read_bytes() == path.read_bytes()
    coded.save(tmp_path / "again", "gap-lzma")
    assert (tmp_path / "again").read_bytes() == paths["gap-lzma"].read_bytes()
    with pytest.raises(ValueError, match=r"those of 'first.weight' are not known: delta.resolve"):
        flat.save(tmp_path / "new", "gap-lzma")
    assert not (tmp_path / "new").exists()


def test_what_is_saved_is_what_the_delta_holds_now(shipped, tmp_path):
    base, _, delta, _ = shipped
    delta.values["first.weight"][3] = 17.0
    delta.save(tmp_path / "new", "gap-lzma")
    assert sl.load(tmp_path / "new").resolve(base).values["first.weight"][3] == 17


def test_another_base_is_refused_and_is_as_it_was(shipped):
    _, tuned, delta, paths = shipped
    other = mixed()
    with torch.no_grad():
        other.second.weight.view(-1)[delta.positions["second.weight"][1]] += 1
    for model in (other, tuned):
        before = state(model)
        for use in ("apply", "resolve"):
            with pytest.raises(sl.DeltaError, match="not the base that this delta was made from"):
                getattr(sl.load(paths["gap-lzma"]), use)(model)
        assert same(state(model), before)


def test_float32_values_for_half_precision_weights_travel_as_they_are(
    build, batches, pick, tmp_path
):
    base, model = build("bert").bfloat16(), build("bert").bfloat16()
    with sl.masked(model, pick(model)) as tuning:
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
        for batch in batches("bert", 2):
            model(**batch).loss.backward()
            optimizer.step()
        precise = tuning.delta(precise=True)
    precise.save(tmp_path / "delta", "gap-lzma")
    loaded = sl.load(tmp_path / "delta")
    assert loaded.values.keys() == precise.values.keys()
    assert all(torch.equal(loaded.values[name], v) for name, v in precise.values.items())
    with loaded.apply(base):
        assert same(state(base), state(model))


# What else takes a delta


def test_a_compressed_file_is_summed_switched_to_and_resumed(build, batches, pick, tmp_path):
    base, model = build("toy").bfloat16(), build("toy").bfloat16()
    selection, data = pick(model), batches("toy", 4)
    with sl.masked(model, selection) as tuning:
        optimizer = torch.optim.SGD(tuning.parameters(), lr=1.0)
        for batch in data:
            model(**batch).loss.backward()
            optimizer.step()
        delta = tuning.delta()
    delta.save(tmp_path / "delta", "gap-lzma")
    coded = sl.load(tmp_path / "delta")
    assert coded.parts["steps"]

    sums = [sl.combine(base, [d], [0.5]) for d in (coded, delta)]
    assert digest("", sums[0].values) == digest("", sums[1].values)
    with delta.apply(base) as applied:
        tuned = state(base)
        with applied.switch(coded):
            assert same(state(base), tuned)

    resumed = []
    for one in (delta, coded):
        fresh = build("toy").bfloat16()
        with sl.masked(fresh, one.selection(fresh)) as tuning:
            tuning.resume(one)
            resumed.append(tuning.values())
    assert digest("", resumed[0]) == digest("", resumed[1])


def test_shira_of_a_compressed_file(build, tmp_path):
    base, tuned = build("llama").bfloat16(), build("llama").bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        tuned.get_parameter(name).view(-1)[5:40] += 0.25
    delta = sl.diff(base, tuned)
    delta.save(tmp_path / "delta", "gap-lzma")
    for d, folder in ((delta, "one"), (sl.load(tmp_path / "delta"), "two")):
        sl.to_shira(d, base, tmp_path / folder)
    found = [
        (tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("one", "two")
    ]
    assert found[0] == found[1]


def test_a_compressed_file_loads_its_base(build, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    base = type(build("bert")).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    tuned = type(base).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    with torch.no_grad():
        tuned.bert.pooler.dense.weight.view(-1)[5:40] += 0.25
    sl.diff(base, tuned).save(tmp_path / "delta", "gap-lzma")
    model, delta = sl.hf.from_delta(tmp_path / "delta")
    assert same(state(model), state(tuned))
    assert set(delta.values) == {"bert.pooler.dense.weight"}


# Bytes


def test_a_step_of_training_takes_little_more_than_where_and_in_which_direction(tmp_path):
    generator = torch.Generator().manual_seed(0)
    size, rate = 1_000_000, 3e-6
    theta = 0.05 * torch.randn(size, generator=generator)
    base, tuned = nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False)
    direction = torch.randn(size, generator=generator).sign()
    base.weight.data = theta.bfloat16().view(1000, 1000)
    tuned.weight.data = (theta + rate * direction).bfloat16().view(1000, 1000)
    delta = sl.diff(base, tuned, head=())
    share = delta.count / size
    assert 0.01 < share < 0.05
    entropy = size * (-share * math.log2(share) - (1 - share) * math.log2(1 - share)) / 8
    delta.save(tmp_path / "delta", "gap-lzma")
    header = int.from_bytes((tmp_path / "delta").read_bytes()[:8], "little")
    assert (tmp_path / "delta").stat().st_size - header < 1.07 * (entropy + delta.count / 8)


# Forged


def forged(path, tensors, metadata):
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    old = json.loads(json.loads(content[8:end])["__metadata__"]["selective_lite"])
    text, new = json.dumps({**old, **metadata}), {**load_bytes(content), **tensors}
    new = {name: tensor for name, tensor in new.items() if tensor is not None}
    path.with_name("forged").write_bytes(
        save_bytes(new, {"selective_lite": text, "sha256": digest(text, new)})
    )
    return path.with_name("forged")


def said(path):
    return sl.load(path).metadata["steps"]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: None,
        lambda s: [],
        lambda s: {},
        lambda s: {"torch.bfloat16": s["torch.bfloat16"]},
        lambda s: {**s, "torch.float32": {}},
        lambda s: {**s, "torch.float16": [3]},
        lambda s: {**s, "torch.bfloat16": {}},
        *(
            lambda s, n=n: {**s, "torch.bfloat16": {"first.weight": n}}
            for n in (0, -8, 1, 10**9, 10**40, True, 3.0, "3", None)
        ),
        lambda s: {**s, "torch.bfloat16": {**s["torch.bfloat16"], "third.weight": 9}},
        lambda s: {**s, "torch.bfloat16": {**s["torch.bfloat16"], "gone": 9}},
        lambda s: {**s, "torch.bfloat16": {**s["torch.bfloat16"], **s["torch.float16"]}},
        lambda s: {**s, "torch.bfloat16": {"classifier.bias": s["torch.bfloat16"]["first.weight"]}},
    ],
)
def test_hostile_numbers_of_steps_are_refused(shipped, change):
    path = shipped[3]["gap-lzma"]
    with pytest.raises(sl.DeltaError):
        sl.load(forged(path, {}, {"steps": change(said(path))}))


@pytest.mark.parametrize(
    "tensors",
    [
        {"directions": None},
        {"lengths": None},
        {"gaps": None},
        {"directions": None, "lengths": None},
        {"directions": torch.zeros(3, dtype=torch.uint8)},
        {"lengths": torch.zeros(3, dtype=torch.int16)},
        {"lengths": torch.zeros(3, 2, dtype=torch.uint8)},
        {"steps": torch.zeros(3, dtype=torch.uint8)},
        {"values/first.weight": torch.zeros(3).bfloat16()},
        {"dense/first.weight": torch.zeros(30, 40).bfloat16()},
        {"positions/first.weight": torch.zeros(3, dtype=torch.int32)},
    ],
    ids=lambda tensors: " ".join(tensors),
)
def test_hostile_streams_are_refused(shipped, tensors):
    with pytest.raises(sl.DeltaError):
        sl.load(forged(shipped[3]["gap-lzma"], tensors, {}))


def test_values_without_positions_are_refused(shipped):
    path, metadata = shipped[3]["flat"], shipped[2].metadata
    body = sorted({*shipped[2].positions, *shipped[2].dense, *shipped[2].buffers})
    named = zip(body, metadata["fingerprints"], strict=True)
    kept = [text for name, text in named if name != "third.weight"]
    changes = {"fingerprints": kept, "k": metadata["k"] - 9}
    with pytest.raises(sl.DeltaError, match="do not name the same parameters"):
        sl.load(forged(path, {"positions/third.weight": None}, changes))


def test_streams_of_no_steps_are_refused(tmp_path):
    base, tuned = nn.Linear(3, 3), nn.Linear(3, 3)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.weight[0, 0] += 1
    sl.diff(base, tuned, head=()).save(tmp_path / "delta", "gap-lzma")
    for name in ("directions", "lengths"):
        with pytest.raises(sl.DeltaError, match="delta's streams must be bytes, and"):
            sl.load(forged(tmp_path / "delta", {name: torch.zeros(3, dtype=torch.uint8)}, {}))


def test_the_dtype_that_a_file_says_must_be_the_model_s(shipped):
    base, _, _, paths = shipped
    steps = said(paths["gap-lzma"])
    swapped = {
        "torch.bfloat16": steps["torch.float16"],
        "torch.float16": steps["torch.bfloat16"],
    }
    delta, before = sl.load(forged(paths["gap-lzma"], {}, {"steps": swapped})), state(base)
    with pytest.raises(sl.DeltaError, match=r"'first.weight' is torch.bfloat16, .* torch.float16"):
        delta.apply(base)
    assert same(state(base), before)


def test_steps_said_of_a_flat_file_are_refused(shipped):
    path = shipped[3]["flat"]
    with pytest.raises(sl.DeltaError, match="do not name the same parameters"):
        sl.load(forged(path, {}, {"steps": {"torch.bfloat16": {"first.weight": 3}}}))


def test_float32_values_and_steps_of_one_tensor_are_refused(shipped):
    path = shipped[3]["gap-lzma"]
    with pytest.raises(sl.DeltaError, match="do not name the same parameters"):
        sl.load(forged(path, {}, {"rounds_to": {"first.weight": "torch.bfloat16"}}))


def test_streams_that_would_unpack_to_more_than_was_declared_are_never_unpacked(shipped):
    path = shipped[3]["gap-lzma"]
    bomb = squeeze(torch.zeros(2**22, dtype=torch.int64).numpy())  # 32 MiB
    counts = dict.fromkeys(said(path)["torch.bfloat16"], 2**27)
    more = {"steps": {**said(path), "torch.bfloat16": counts}}
    cases = [
        ({"lengths": bomb}, {}, "lengths"),
        ({"gaps": bomb}, {}, "gaps"),
        ({"lengths": bomb, "gaps": bomb.clone()}, more, "directions"),
    ]
    for tensors, metadata, what in cases:
        file = forged(path, tensors, metadata)
        tracemalloc.start()
        try:
            with pytest.raises(sl.DeltaError, match=f"streams do not fit .* {what}"):
                sl.load(file)
            assert tracemalloc.get_traced_memory()[1] < 20 * file.stat().st_size
        finally:
            tracemalloc.stop()
