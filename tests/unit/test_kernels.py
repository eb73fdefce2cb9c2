"""Kernels: what the C source computes is what torch's operations compute, and it is not needed."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selective_lite.kernels import native, sampled

needs_compiler = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


def operands(tokens, height, width, count):
    generator = torch.Generator().manual_seed(tokens + height + width)
    left, right = (torch.randn(tokens, n, generator=generator) for n in (height, width))
    index = torch.randperm(height * width, generator=generator)[:count].sort().values.int()
    return left, right, index


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("tokens", "height", "width", "count"),
    [
        (1, 3, 5, 4),
        (63, 9, 21, 50),
        (64, 8, 8, 64),
        (200, 17, 40, 300),
        (130, 1100, 12, 900),  # more rows than a block
        (96, 40, 2100, 900),
        (70, 500, 400, 6),  # few rows and columns: both sides are gathered
        (70, 400, 6, 30),  # few rows
        (70, 6, 400, 30),  # few columns
        (0, 4, 4, 3),
    ],
)
def test_its_products_are_those_of_torch(tokens, height, width, count, threads):
    left, right, index = operands(tokens, height, width, count)
    rows, columns = sampled.footprint(index, height, width)
    sides = sampled.columns_as_rows(left, rows), sampled.columns_as_rows(right, columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native.product(native.library(), *sides, index, height, width, rows, columns)
    finally:
        torch.set_num_threads(before)
    expected = (left.double().t() @ right.double()).flatten()[index]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("height", [1, 3, 17, 600])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.9, 1])
def test_dense_selections_take_slices_of_the_product_and_never_all_of_it(height, share):
    left, right, _ = operands(30, height, 8, 1)
    generator = torch.Generator().manual_seed(0)
    index = (torch.rand(height * 8, generator=generator) < share).nonzero().squeeze(1).int()
    if not len(index):
        index = torch.tensor([3], dtype=torch.int32)
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.layout is torch.strided:
                made.append(out.numel())
            return out

    with Sizes():
        found = sampled.sampled_product(left, right, index, height, 8, None, None)
    expected = (left.double().t() @ right.double()).flatten()[index]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if height > 3:
        sides = {left.numel(), right.numel()}
        assert height * 8 not in [size for size in made if size not in sides]


@needs_compiler
def test_operands_need_not_be_contiguous():
    left, right, index = operands(50, 12, 10, 40)
    expected = native.product(native.library(), left, right, index, 12, 10, None, None)
    strided = left.t().contiguous().t(), torch.stack([right, right], 2)[:, :, 0]
    assert not any(side.is_contiguous() for side in strided)
    found = native.product(native.library(), *strided, index, 12, 10, None, None)
    assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("tokens", [0, 1, 64, 65, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_gathers_features(monkeypatch, tokens, threads):
    operand, features = torch.randn(tokens, 30), torch.tensor([0, 7, 8, 29], dtype=torch.int32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(sampled.columns_as_rows(operand, features), operand.t()[features])
    strided = operand.t().contiguous().t()
    assert torch.equal(sampled.columns_as_rows(strided, features), operand.t()[features])


@needs_compiler
@pytest.mark.parametrize("strided", [False, True])
def test_it_writes_entries_and_nothing_else(strided):
    dense, index = torch.arange(30.0).view(5, 6), torch.tensor([0, 7, 29], dtype=torch.int32)
    values = torch.tensor([[-1.0, 9], [-2, 9], [-3, 9]])[:, 0]
    assert native.fits(dense, values, index)
    sampled.write(dense, values if strided else values.clone(), index)
    expected = torch.arange(30.0)
    expected[[0, 7, 29]] = torch.tensor([-1.0, -2, -3])
    assert torch.equal(dense.flatten(), expected)


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.zeros(3, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(3), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3, device="meta"), torch.zeros(1, dtype=torch.int32, device="meta")),
    ],
    ids=["float64", "bfloat16", "int64", "meta"],
)
def test_it_takes_float32_and_int32_in_memory_only(tensors):
    assert native.fits(*tensors) is None


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As in a new process, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SELECTIVE_LITE_NATIVE", raising=False)
    return native.library.__wrapped__


def test_without_a_compiler_torch_computes_and_that_is_said(fresh, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(native.NativeWarning, match="no C compiler.*slower"):
        assert fresh() is None


def test_it_can_be_switched_off_without_a_word(fresh, monkeypatch):
    monkeypatch.setenv("SELECTIVE_LITE_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh() is None


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a += d[i] * v[i];", "a += d[i] * v[i] * 2;", "products are wrong"),
        ("#define TILE 64", "#define TILE sixty", "failed"),
    ],
)
def test_a_library_that_is_wrong_or_does_not_compile_is_not_used(
    fresh, tmp_path, monkeypatch, old, new, message
):
    text = native.SOURCE.read_text()
    assert old in text
    (tmp_path / "products.c").write_text(text.replace(old, new))
    monkeypatch.setattr(native, "SOURCE", tmp_path / "products.c")
    with pytest.warns(native.NativeWarning, match=message):
        assert fresh() is None


@needs_compiler
def test_it_is_compiled_once_for_a_source_and_kept(fresh, tmp_path, monkeypatch):
    assert fresh() is not None
    (kept,) = (tmp_path / "selective_lite" / "native").iterdir()
    compiled, run = [], native.subprocess.run
    monkeypatch.setattr(
        native.subprocess,
        "run",
        lambda command, **rest: compiled.append(command) or run(command, **rest),
    )
    assert fresh() is not None
    assert [command[1:] for command in compiled] == [["--version"]]
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O1"))
    assert fresh() is not None
    assert len(list(kept.parent.iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_error(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(native.NativeWarning):
        assert fresh() is None
