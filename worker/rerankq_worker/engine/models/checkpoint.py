"""Where a model's files are, and a name for their content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from ..errors import ModelUnusable, in_one_line

_BUNDLED = Path(__file__).parents[4] / "models" / "minilm-l6-rerank"

#: What the model and its tokeniser are made of. Pickled weights and exports to other runtimes stay away.
_PARTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_EXPORTS = ("onnx/*", "openvino/*")
_READ = {Path(part).suffix for part in _PARTS}
_WEIGHTS = ".safetensors"


def find_checkpoint(model: str) -> Path:
    """Find the folder of a model: ``bundled``, a local folder, or a name on the Hugging Face hub, fetched if need be.

    Raises ModelUnusable, saying what was tried.
    """
    if model == "bundled":
        return _bundled()
    try:
        folder = Path(model).expanduser()
        is_file, is_folder = folder.is_file(), folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # not ours to read, no such home, no name of a file
        raise ModelUnusable(f"model {model!r} cannot be looked up: {in_one_line(error)}") from error
    if is_folder:
        return _complete(folder)
    if is_file:
        raise ModelUnusable(f"model {model!r} is a file; a model is a folder with config.json, tokeniser and weights")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelUnusable(f"model {model!r}: there is no such folder")
    return _complete(_fetch(model))


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a checkpoint at one moment: hashes of what the small ones hold, and marks of all that are read.

    Two that are equal show that nothing was written or replaced between them.
    """

    contents: Mapping[str, bytes]
    marks: Mapping[str, tuple[int, int, int]]


def files_of(folder: Path) -> Files:
    """Look at the files that a model is loaded from; raises ModelUnusable for one that cannot be read."""
    contents, marks = {}, {}
    try:
        for path in _parts(folder):
            name, now = path.relative_to(folder).as_posix(), path.stat()
            marks[name] = now.st_ino, now.st_size, now.st_mtime_ns
            if path.suffix != _WEIGHTS:
                contents[name] = blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise ModelUnusable(f"a file of the model cannot be read: {error}") from error
    return Files(contents, marks)


def fingerprint(files: Files, weights: bytes, *, precision: str, template: str) -> str:
    """Hash everything of a checkpoint that changes a logit, 128 bits in hexadecimal.

    That is what the small files hold, the hash of the weights as they are in memory, what computes them in which
    precision, and how pairs are put together; not the checkpoint's name, place or age.
    """
    whole = blake2b(digest_size=16)
    for said in ("rerankq cross-encoder 2, raw logits", precision, template):
        whole.update(_framed(said.encode()))
    for name, content in sorted(files.contents.items()):
        whole.update(_framed(name.encode()) + content)
    whole.update(_framed(weights))
    return whole.hexdigest()


def _bundled() -> Path:
    if not (_BUNDLED / "config.json").is_file():
        raise ModelUnusable(
            "the bundled model is part of the source repository (models/minilm-l6-rerank), not of the installed "
            "package: clone the repository and give that folder as the model, or name one of the hub, "
            "such as cross-encoder/ms-marco-MiniLM-L6-v2"
        )
    return _BUNDLED


def _complete(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        raise ModelUnusable(f"{folder} holds no config.json: not a model folder")
    try:
        weights = {path.parent for path in folder.rglob(f"*{_WEIGHTS}")}
        pickled = {path.parent for path in folder.rglob("pytorch_model*.bin")} - weights
    except OSError as error:
        raise ModelUnusable(f"{folder} cannot be read: {in_one_line(error)}") from error
    if not weights or pickled:
        raise ModelUnusable(
            f"{min(pickled, default=folder)} holds no weights in safetensors; pickled weights are not loaded, "
            "convert them first"
        )
    return folder


def _fetch(model: str) -> Path:
    # Slow to import, and needed for hub names alone.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, allow_patterns=list(_PARTS), ignore_patterns=list(_EXPORTS)))
    except LocalEntryNotFoundError as error:
        raise ModelUnusable(
            f"model {model!r}: no such folder here, not in the local hub cache, and the hub cannot be reached "
            f"({in_one_line(error)})"
        ) from error
    except Exception as error:  # whatever its client raises: of names, refusals, networks, disks
        raise ModelUnusable(
            f"model {model!r}: no such folder here, and the hub refuses it ({in_one_line(error)})"
        ) from error


def _parts(folder: Path) -> Iterator[Path]:
    exports = {pattern.partition("/")[0] for pattern in _EXPORTS}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _READ and path.is_file() and path.relative_to(folder).parts[0] not in exports:
            yield path


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part
