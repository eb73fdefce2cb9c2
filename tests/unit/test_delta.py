"""Deltas: bit-exact both ways, and no damaged or foreign file ever reaches the model."""

import copy
import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

import selective_lite as sl
from selective_lite.ship.file import digest


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def all_bits(model):
    return {name: bits(p) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(build, batches, pick):
    """A base and the same model after masked training; head and whole tensors differ too."""
    base, model = build("bert"), build("bert")
    with torch.no_grad():
        for one in (base, model):  # zeros of both signs, a denormal, and the largest number
            one.bert.pooler.dense.weight.view(-1)[:4] = torch.tensor([0.0, -0.0, 1e-42, 3.4e38])
    sl.fit(
        model,
        sl.fixed_mask(model, pick(model, per_tensor=12), lr=0.01, epochs=2),
        batches("bert", 2),
    )
    with torch.no_grad():
        model.bert.pooler.dense.weight.view(-1)[:4] = torch.tensor([-0.0, 0.0, 2e-42, -3.4e38])
    return base, model


@pytest.fixture
def tuned(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def path(trained, tmp_path):
    path = tmp_path / "task.safetensors"
    sl.diff(*trained, method="fixed mask").save(path)
    return path


def test_save_load_apply_revert_give_back_every_bit(tuned, path):
    base, model = tuned
    before, after = all_bits(base), all_bits(model)
    assert before != after
    applied = sl.load(path).apply(base)
    assert all_bits(base) == after
    applied.revert()
    assert all_bits(base) == before
    applied.revert()
    assert all_bits(base) == before


def test_a_delta_holds_the_changed_weights_and_no_other(tuned):
    base, model = tuned
    delta = sl.diff(base, model)
    named = sl.weights(model)
    for name, p in sl.weights(base).items():
        differs = torch.tensor(
            [a != b for a, b in zip(*map(list_of_bits, (p, named[name])), strict=True)]
        )
        index = delta.positions.get(name)
        if name in delta.dense:
            assert differs.all()
        else:
            assert (differs.nonzero().squeeze(1).tolist() if differs.any() else None) == (
                None if index is None else index.tolist()
            )
    assert set(delta.head) == set(sl.head_weights(model))
    stored = sum(v.numel() for v in delta.values.values())
    rest = sum(t.numel() for t in (*delta.dense.values(), *delta.head.values()))
    assert delta.nbytes == 8 * stored + 4 * rest
    assert delta.count == stored + sum(t.numel() for t in delta.dense.values())


def list_of_bits(tensor):
    raw = bits(tensor)
    return [raw[i : i + 4] for i in range(0, len(raw), 4)]


def test_a_snapshot_serves_as_base(tuned):
    base, model = tuned
    one, other = sl.diff(base, model), sl.diff(sl.snapshot(base), model)
    assert one.metadata == other.metadata
    assert set(one.positions) == set(other.positions)


def test_the_delta_is_a_copy_of_the_model(tuned):
    base, model = tuned
    delta = sl.diff(base, model)
    kept = all_bits(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    with delta.apply(base):
        assert all_bits(base) == kept


def test_as_a_context_it_reverts_after_an_error_too(tuned):
    base, model = tuned
    before = all_bits(base)
    delta = sl.diff(base, model)

    def fails():
        with delta.apply(base):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert all_bits(base) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_travels(build, tmp_path, dtype):
    base, model = build("toy").to(dtype), build("toy").to(dtype)
    with torch.no_grad():
        model.first.weight[0, :3] += 1
        model.norm.weight += 1
    delta = sl.diff(base, model)
    delta.save(tmp_path / "delta")
    before = all_bits(base)
    with sl.load(tmp_path / "delta").apply(base):
        assert all_bits(base) == all_bits(model)
    assert all_bits(base) == before


def test_a_tied_weight_travels_once_and_stays_tied(build, batches, pick, tmp_path):
    base, model = build("llama"), build("llama")
    sl.fit(model, sl.fixed_mask(model, pick(model), lr=0.01, epochs=1), batches("llama", 2))
    delta = sl.diff(base, model)
    assert "lm_head.weight" not in {*delta.positions, *delta.dense, *delta.head}
    (batch,) = batches("llama", 1)
    with delta.apply(base):
        assert torch.equal(base(**batch).logits, model(**batch).logits)
        assert base.lm_head.weight is base.model.embed_tokens.weight


def shifted(build, amount, position):
    model = build("toy")
    with torch.no_grad():
        model.first.weight.view(-1)[position] += amount
    return model


def test_stacked_deltas_revert_in_order_and_only_in_order(build):
    base, first = build("toy"), shifted(build, 1.0, 0)
    second = shifted(build, 2.0, 0)
    start = all_bits(base)
    one = sl.diff(base, first).apply(base)
    between = all_bits(base)
    two = sl.diff(first, second).apply(base)
    assert all_bits(base) == all_bits(second)
    with pytest.raises(sl.DeltaError, match=r"'first.weight' no longer holds this delta's values"):
        one.revert()
    assert all_bits(base) == all_bits(second)
    two.revert()
    assert all_bits(base) == between
    one.revert()
    assert all_bits(base) == start


def test_a_delta_twice_or_on_another_base_raises_and_changes_nothing(tuned, build):
    base, model = tuned
    delta = sl.diff(base, model)
    for other in (model, build("bert", seed=1)):
        before = all_bits(other)
        with pytest.raises(sl.DeltaError, match="not the base that this delta was made from"):
            delta.apply(other)
        assert all_bits(other) == before


def test_a_base_that_differs_elsewhere_is_accepted(build):
    # The fingerprint covers the replaced positions only: what else a model carries is not this
    # delta's business.
    base = shifted(build, 5.0, 40)
    delta = sl.diff(build("toy"), shifted(build, 1.0, 3))
    with delta.apply(base):
        assert base.first.weight.view(-1)[3] == shifted(build, 1.0, 3).first.weight.view(-1)[3]


def _renamed(model):
    model.primary = model.first
    del model.first


def _reshaped(model):
    model.first = nn.Linear(6, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "model has no parameter 'first.weight'"),
        (_reshaped, r"'first.weight' has shape \[8, 6\], the delta's base has \[7, 6\]"),
        (
            lambda model: model.half(),
            r"'first.weight' is torch.float16, the delta's base is torch.float32",
        ),
    ],
)
def test_a_model_that_does_not_fit_raises_and_is_as_it_was(build, change, message):
    delta = sl.diff(build("toy"), shifted(build, 1.0, 3))
    model = build("toy")
    change(model)
    before = all_bits(model)
    with pytest.raises(sl.DeltaError, match=message):
        delta.apply(model)
    assert all_bits(model) == before


def test_no_difference_and_another_model_raise(build):
    with pytest.raises(ValueError, match="equal bit by bit"):
        sl.diff(model := nn.Linear(2, 2), model)
    with pytest.raises(ValueError, match=r"base has no 'weight' of shape \(3, 2\)"):
        sl.diff(nn.Linear(2, 2), nn.Linear(2, 3))


def test_saving_is_complete_or_not_at_all(tuned, path, monkeypatch):
    old = path.read_bytes()
    delta = sl.diff(tuned[0], tuned[1], method="another")

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            delta.save(path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    delta.save(path)
    assert sl.load(path).metadata["method"] == "another"
    assert list(path.parent.iterdir()) == [path]


def header_length(content):
    return struct.unpack("<Q", content[:8])[0]


def test_one_flipped_byte_anywhere_is_noticed(path):
    content = path.read_bytes()
    start = 8 + header_length(content)
    # behind it the header is padded with spaces, which carry nothing
    text = content[8:start].rstrip(b" ")
    assert len(content) > start + 1000
    places = [
        *range(8),
        *range(8, 8 + len(text), 13),
        *range(start, start + 64),
        *range(start, len(content), 41),
        len(content) - 1,
    ]
    damaged = path.with_name("damaged")
    for place in places:
        for flip in (0x01, 0x80):
            damaged.write_bytes(
                content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
            )
            with pytest.raises(sl.DeltaError, match="damaged"):
                sl.load(damaged)


def test_a_truncated_empty_or_foreign_file_is_noticed(path):
    content = path.read_bytes()
    damaged = path.with_name("damaged")
    cuts = [
        0,
        1,
        7,
        8,
        9,
        header_length(content),
        8 + header_length(content),
        len(content) // 2,
        len(content) - 1,
    ]
    foreign = [content[:cut] for cut in cuts] + [
        content + b"\0",
        save_bytes({"w": torch.ones(2)}),
        b"PK\x03\x04" * 9,
    ]
    for one in foreign:
        damaged.write_bytes(one)
        with pytest.raises(sl.DeltaError, match="no delta file, or a damaged one"):
            sl.load(damaged)


def forged(path, tensors=None, metadata=None, text=None, remove=()):
    """A delta file with other contents and a fitting checksum: what an attacker would write."""
    content = path.read_bytes()
    old = json.loads(content[8 : 8 + header_length(content)])["__metadata__"]
    new = {**load_bytes(content), **(tensors or {})}
    for name in remove:
        del new[name]
    if text is None:
        text = json.dumps({**json.loads(old["selective_lite"]), **(metadata or {})}, sort_keys=True)
    forgery = path.with_name("forged")
    forgery.write_bytes(save_bytes(new, {"selective_lite": text, "sha256": digest(text, new)}))
    return forgery


NAME = "bert.embeddings.word_embeddings.weight"
POSITIONS = {
    "negative": lambda p: torch.cat([torch.tensor([-1], dtype=p.dtype), p[1:]]),
    "too large": lambda p: torch.cat([p[:-1], torch.tensor([53 * 12], dtype=p.dtype)]),
    "far too large": lambda p: torch.cat([p[:-1].long(), torch.tensor([2**62])]),
    "not sorted": lambda p: p.flip(0),
    "twice the same": lambda p: torch.cat([p[:1], p[:1], p[2:]]),
    "one too few": lambda p: p[1:],
    "none": lambda p: p[:0],
    "not whole": lambda p: p.float(),
    "a matrix": lambda p: p.reshape(1, -1),
    "32 bits that overflow": lambda p: torch.cat([torch.tensor([-(2**31)], dtype=p.dtype), p[1:]]),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_hostile_positions_are_refused(path, kind):
    positions = load_bytes(path.read_bytes())["positions/" + NAME]
    with pytest.raises(sl.DeltaError, match=f"delta's positions in '{NAME}' must"):
        sl.load(forged(path, {"positions/" + NAME: POSITIONS[kind](positions).contiguous()}))


def metadata_of(path):
    content = path.read_bytes()
    return json.loads(
        json.loads(content[8 : 8 + header_length(content)])["__metadata__"]["selective_lite"]
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {"encoding": "gap-lzma"},
        {"encoding": None},
        {"encoding": ["flat"]},
        {"shapes": None},
        {"shapes": []},
        {"shapes": {}},
        {"shapes": {NAME: [53, 12]}},
        {"fingerprints": None},
        {"fingerprints": []},
        {"fingerprints": [3] * 100},
        {"ties": {"gone": []}},
        {"ties": {NAME: "classifier.weight"}},
        {"ties": {NAME: [3]}},
        {"ties": []},
        {"base": None},
        {"base": {"class": ["BertModel"]}},
        {"base": {"id2label": {"0": 3}}},
        {"base": {"id2label": {"zero": "good"}}},
        {"base": {"id2label": "good"}},
        {"rounds_to": []},
        {"modules": []},
        {"rounds_to": {NAME: "torch.int8"}},
        {"rounds_to": {"gone": "torch.bfloat16"}},
        {"rounds_to": 3},
        {"k": 1},
        {"total": "many"},
        {"library": None},
    ],
    ids=json.dumps,
)
def test_hostile_metadata_are_refused(path, metadata):
    with pytest.raises(sl.DeltaError):
        sl.load(forged(path, metadata=metadata))


def test_metadata_of_a_tensor_that_is_not_there_are_refused(path):
    shapes = {**metadata_of(path)["shapes"], "gone": [1]}
    with pytest.raises(sl.DeltaError, match="do not name the same parameters"):
        sl.load(forged(path, metadata={"shapes": shapes}))


def test_a_head_of_another_dtype_is_refused_by_the_model(path, tuned):
    base, _ = tuned
    before = all_bits(base)
    forgery = forged(path, {"head/classifier.bias": torch.zeros(3).double()})
    with pytest.raises(sl.DeltaError, match=r"classifier.bias' is torch.float32, .* torch.float64"):
        sl.load(forgery).apply(base)
    assert all_bits(base) == before


@pytest.mark.parametrize(
    "shape", ["53", [53, -12], [53.0, 12], [53, 12, 10**40], [2**40, 2**40], None, [[53], 12], {}]
)
def test_a_hostile_shape_is_refused_by_file_or_by_model(path, tuned, shape):
    base, _ = tuned
    before = all_bits(base)
    shapes = {**metadata_of(path)["shapes"], NAME: shape}
    with pytest.raises(sl.DeltaError):
        sl.load(forged(path, metadata={"shapes": shapes})).apply(base)
    assert all_bits(base) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remove": ["values/" + NAME]}, "do not name the same parameters"),
        ({"remove": ["positions/" + NAME]}, "do not name the same parameters"),
        ({"tensors": {"dense/" + NAME: torch.zeros(53, 12)}}, "do not name the same parameters"),
        ({"tensors": {"extra/" + NAME: torch.zeros(1)}}, "unknown tensor 'extra/"),
        (
            {"tensors": {"head/classifier.bias": torch.zeros(4)}},
            r"'classifier.bias' has shape \[4\]",
        ),
        (
            {"tensors": {"head/classifier.bias": torch.zeros(3).int()}},
            "'classifier.bias' is torch.int32",
        ),
        ({"text": "[" * 100_000}, "no delta file, or a damaged one"),
        ({"text": "[]"}, "no delta file, or a damaged one"),
        ({"text": "1e999"}, "no delta file, or a damaged one"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_hostile_tensors_and_texts_are_refused(path, change, message):
    with pytest.raises(sl.DeltaError, match=message):
        sl.load(forged(path, **change))


def test_a_forged_file_that_fits_loads(path):
    # The forgeries above fail for what they forge, not for how they are made.
    assert sl.load(forged(path, metadata={"method": "forged"})).metadata["method"] == "forged"


def test_a_file_that_is_not_there_is_the_system_s_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sl.load(tmp_path / "missing")


def test_the_checksum_covers_metadata_and_tensors(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + header_length(content)])["__metadata__"]
    tensors = load_bytes(content)
    expected = hashlib.sha256(header["selective_lite"].encode())
    for name in sorted(tensors):
        expected.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        expected.update(bits(tensors[name]))
    assert header["sha256"] == expected.hexdigest()


# Small modules


class Two(nn.Module):
    """A square and an oblong linear layer, no head."""

    def __init__(self):
        super().__init__()
        self.square, self.oblong, self.table = nn.Linear(4, 4), nn.Linear(4, 6), nn.Embedding(6, 4)

    def forward(self, x):
        return self.oblong(torch.tanh(self.square(x)))


def two(seed=0):
    torch.manual_seed(seed)
    return Two()


def with_modules(**ranks):
    """`two()` with trained small modules: a LoRA in the oblong layer, an Adapter in the other."""
    model = two()
    sl.add_adapters(model, "square.weight", kind="adapter", rank=ranks.get("square", 2))
    sl.add_adapters(model, "oblong.weight", kind="lora", rank=ranks.get("oblong", 3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in sl.adapters(model).values():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def modules_path(tmp_path):
    path = tmp_path / "modules.safetensors"
    sl.diff(two(), with_modules(), method="spt").save(path)
    return path


def classes(model):
    return [type(module) for module in model.modules()]


def test_a_delta_of_modules_alone_comes_and_goes(modules_path):
    base, tuned, x = two(), with_modules(), torch.randn(3, 4)
    before, kinds = all_bits(base), classes(base)
    delta = sl.load(modules_path)
    assert (delta.positions, delta.values, delta.dense, delta.head) == ({}, {}, {}, {})
    assert delta.metadata["modules"] == {
        "square.weight": {"kind": "adapter", "rank": 2},
        "oblong.weight": {"kind": "lora", "rank": 3},
    }
    assert delta.count == (2 * 2 * 4 + 2 + 4) + 3 * (4 + 6)
    assert delta.nbytes == 4 * delta.count
    with delta.apply(base) as applied:
        assert all_bits(base) == all_bits(tuned)
        assert torch.equal(base(x), tuned(x))
    assert all_bits(base) == before
    assert classes(base) == kinds
    applied.revert()
    assert all_bits(base) == before


def test_the_modules_of_a_delta_are_copies():
    tuned = with_modules()
    delta, kept, base, fresh = sl.diff(two(), tuned), all_bits(tuned), two(), two()

    def train(model):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)

    train(tuned)
    delta.apply(base)
    assert all_bits(base) == kept
    train(base)
    with delta.apply(fresh):
        assert all_bits(fresh) == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_travel_in_the_dtype_of_their_weight(tmp_path, dtype):
    base, tuned = two().to(dtype), with_modules().to(dtype)
    sl.diff(base, tuned).save(tmp_path / "delta")
    with sl.load(tmp_path / "delta").apply(base):
        assert all_bits(base) == all_bits(tuned)


def test_deltas_with_modules_in_other_layers_are_stacked_and_revert_in_order():
    base = two()
    one, other = with_modules(), with_modules()
    sl.remove_adapters(one, "square.weight")
    sl.remove_adapters(other, "oblong.weight")
    with torch.no_grad():
        one.table.weight[0, 0] += 1
        other.table.weight[0, 0] += 1
        other.table.weight[1, 1] += 1
    before = all_bits(base)
    first = sl.diff(base, one).apply(base)
    shift = two()
    with torch.no_grad():
        shift.table.weight[0, 0] += 1
    second = sl.diff(shift, other).apply(base)
    assert set(sl.adapters(base)) == {"square.weight", "oblong.weight"}
    second.revert()
    assert set(sl.adapters(base)) == {"oblong.weight"}
    first.revert()
    assert all_bits(base) == before


def _trained(model):
    with torch.no_grad():
        sl.adapters(model)["oblong.weight"].B[1, 1] += 1


def _replaced(model):
    sl.remove_adapters(model, "oblong.weight")
    sl.add_adapters(model, "oblong.weight", rank=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_trained, "'oblong.weight/B' no longer holds this delta's values"),
        (_replaced, "'oblong.weight' no longer has this delta's small module"),
        (
            lambda model: sl.merge_adapters(model, "oblong.weight"),
            "'oblong.weight' no longer has this delta's small",
        ),
        (lambda model: sl.masked(model, _one_bias()), "model is in masked training; leave that"),
    ],
)
def test_modules_that_were_changed_are_not_reverted_and_neither_is_the_rest(change, message):
    tuned, base = with_modules(), two()
    with torch.no_grad():
        tuned.table.weight[0, 0] += 1
    applied = sl.diff(base, tuned).apply(base)
    change(base)
    before, kinds = all_bits(base), classes(base)
    with pytest.raises(ValueError, match=message):
        applied.revert()
    assert all_bits(base) == before
    assert classes(base) == kinds


def _one_bias():
    return sl.Selection({"oblong.bias": torch.tensor([1])}, {"oblong.bias": (6,)})


def _other_matrix(model):
    with torch.no_grad():
        model.oblong.weight.copy_(two(seed=1).oblong.weight)


def _gone(model):
    model.last = model.oblong
    del model.oblong


def _subclass(model):
    class Scaled(nn.Linear):
        pass

    model.oblong.__class__ = Scaled


def _conv1d_oblong(model):
    from transformers.pytorch_utils import Conv1D

    weight = model.oblong.weight
    model.oblong = Conv1D(4, 6)
    model.oblong.weight = weight


def _tied(model):
    model.table.weight = model.oblong.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_matrix, "not the base that this delta was made from"),
        (_gone, "model has no parameter 'oblong.weight'"),
        (
            lambda model: setattr(model, "oblong", nn.Linear(6, 4)),
            r"'oblong.weight' has shape \[4, 6\]",
        ),
        (lambda model: model.double(), "'oblong.weight' is torch.float64"),
        (_subclass, "cannot take this delta's small modules: 'oblong.weight' belongs to a Scaled"),
        (_tied, "model ties 'oblong.weight' to 'table.weight', the delta's base does not"),
        (
            _conv1d_oblong,
            "the small module of 'oblong.weight' is not for a layer from 6 to 4 features",
        ),
        (
            lambda model: sl.add_adapters(model, "oblong.weight", rank=1),
            "small modules: the layer of 'oblong.weight' has a small module already",
        ),
        (
            lambda model: sl.masked(model, _one_bias()),
            "model is in masked training; leave that first",
        ),
    ],
)
def test_a_model_that_cannot_take_the_modules_raises_and_is_as_it_was(
    modules_path, change, message
):
    model = two()
    change(model)
    before, kinds = all_bits(model), classes(model)
    with pytest.raises(sl.DeltaError, match=message):
        sl.load(modules_path).apply(model)
    assert all_bits(model) == before
    assert classes(model) == kinds


def test_the_same_delta_does_not_go_in_twice(modules_path):
    base, delta = two(), sl.load(modules_path)
    delta.apply(base)
    before = all_bits(base)
    with pytest.raises(sl.DeltaError, match="has a small module already"):
        delta.apply(base)
    assert all_bits(base) == before


def test_a_base_with_modules_or_modules_of_another_dtype_make_no_delta():
    tuned = with_modules()
    for base in (with_modules(), sl.snapshot(with_modules())):
        with pytest.raises(ValueError, match="base has small modules; merge or remove them"):
            sl.diff(base, tuned)
    with pytest.raises(ValueError, match="base has small modules"):
        sl.diff(with_modules(), shifted_two())
    sl.adapters(tuned)["square.weight"].double()
    with pytest.raises(ValueError, match=r"another dtype than 'square\.weight'; convert"):
        sl.diff(two(), tuned)


def shifted_two():
    model = two()
    with torch.no_grad():
        model.table.weight[0, 0] += 1
    return model


def specs(**changes):
    found = {
        "square.weight": {"kind": "adapter", "rank": 2},
        "oblong.weight": {"kind": "lora", "rank": 3},
    }
    return {
        "modules": {**found, **{name.replace("_", "."): spec for name, spec in changes.items()}}
    }


@pytest.mark.parametrize(
    "metadata",
    [
        {"encoding": "gap-lzma"},
        {"modules": None},
        {"modules": []},
        {"modules": {}},
        {"modules": 2},
        {"modules": ["square.weight", "oblong.weight"]},
        {"modules": {"square.weight": {"kind": "adapter", "rank": 2}}},
        specs(table_weight={"kind": "lora", "rank": 1}),
        specs(oblong_weight={"kind": "adapter", "rank": 3}),
        specs(oblong_weight={"kind": "dora", "rank": 3}),
        specs(oblong_weight={"kind": ["lora"], "rank": 3}),
        specs(oblong_weight={"kind": "lora"}),
        specs(oblong_weight={"rank": 3}),
        specs(oblong_weight=["lora", 3]),
        specs(oblong_weight=None),
        specs(square_weight={"kind": "adapter", "rank": 2.0}),
        *(
            specs(oblong_weight={"kind": "lora", "rank": r})
            for r in (0, -3, 2, 4, 5, 10**30, 3.0, "3", True, None, [3])
        ),
        {"shapes": {"square.weight": [4, 4], "oblong.weight": [6, 5]}},
        {"shapes": {"square.weight": [4, 4], "oblong.weight": [24]}},
        {"shapes": {"square.weight": [4, 4], "oblong.weight": [6, 4, 1]}},
        {"shapes": {"square.weight": [4, 4], "oblong.weight": [6, -4]}},
        {"shapes": {"square.weight": [4, 4], "oblong.weight": [6.0, 4.0]}},
        {"shapes": {"square.weight": [4, 4], "oblong.weight": None}},
        {"shapes": {"square.weight": [4, 4], "oblong.weight": {}}},
        {"shapes": {"square.weight": [4, 4]}},
        {"fingerprints": ["x"]},
        {"k": 12},
    ],
    ids=json.dumps,
)
def test_hostile_metadata_of_modules_are_refused(modules_path, metadata):
    with pytest.raises(sl.DeltaError):
        sl.load(forged(modules_path, metadata=metadata))


LORA = "modules/oblong.weight/"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remove": [LORA + "B"]}, "is no 'lora' of rank 3 for shape"),
        (
            {"remove": [LORA + "A", LORA + "B"]},
            "small modules and its metadata|do not name the same",
        ),
        ({"tensors": {LORA + "C": torch.zeros(1)}}, "is no 'lora' of rank 3"),
        ({"tensors": {LORA + "A": torch.zeros(4, 3)}}, "is no 'lora' of rank 3"),
        (
            {"tensors": {LORA + "A": torch.zeros(3, 6), LORA + "B": torch.zeros(6, 3)}},
            "is no 'lora' of rank 3",
        ),
        ({"tensors": {LORA + "A": torch.zeros(3, 4, 1)}}, "is no 'lora' of rank 3"),
        (
            {"tensors": {LORA + "A": torch.zeros(3, 4).double()}},
            "'oblong.weight' has several dtypes",
        ),
        ({"tensors": {LORA + "A": torch.zeros(3, 4).int()}}, "'oblong.weight' is torch.int32"),
        ({"tensors": {"modules/A": torch.zeros(1)}}, "do not name the same"),
        ({"tensors": {"modules/oblong.weight/x/A": torch.zeros(1)}}, "do not name the same"),
        ({"tensors": {"modules/table.weight/A": torch.zeros(1, 4)}}, "do not name the same"),
    ],
    ids=lambda value: (
        None if isinstance(value, str) else " ".join(key for part in value.values() for key in part)
    ),
)
def test_hostile_modules_are_refused(modules_path, change, message):
    with pytest.raises(sl.DeltaError, match=message):
        sl.load(forged(modules_path, **change))


def test_modules_named_in_a_file_that_has_none_are_refused(path):
    with pytest.raises(sl.DeltaError, match="do not name the same"):
        sl.load(forged(path, metadata={"modules": {NAME: {"kind": "lora", "rank": 1}}}))


def test_a_forged_file_of_modules_that_fits_loads_and_applies(modules_path):
    # The forgeries above fail for what they forge. A transposed layer's module fits by file and
    # fails by model.
    assert (
        sl.load(forged(modules_path, metadata={"method": "forged"})).metadata["method"] == "forged"
    )
    turned = {LORA + "A": torch.zeros(3, 6), LORA + "B": torch.zeros(4, 3)}
    delta = sl.load(forged(modules_path, tensors=turned))
    base = two()
    before, kinds = all_bits(base), classes(base)
    with pytest.raises(sl.DeltaError, match="not for a layer from 4 to 6 features"):
        delta.apply(base)
    assert all_bits(base) == before
    assert classes(base) == kinds


def test_one_flipped_byte_of_a_module_is_noticed(modules_path):
    content = modules_path.read_bytes()
    for place in range(8 + header_length(content), len(content), 7):
        modules_path.write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        with pytest.raises(sl.DeltaError, match="damaged"):
            sl.load(modules_path)
