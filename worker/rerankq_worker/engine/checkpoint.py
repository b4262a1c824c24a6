"""Where a model's files are, and a name for their content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from .errors import ModelUnusable

_BUNDLED = Path(__file__).parents[3] / "models" / "minilm-l6-rerank"

#: What the model and its tokeniser are made of. Pickled weights and exports to other runtimes stay away.
_PARTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_EXPORTS = ("onnx/*", "openvino/*")
_HASHED = {Path(part).suffix for part in _PARTS}
_BLOCK = 1 << 20
#: Bytes of a safetensors header that readers accept.
_LARGEST_HEADER = 100_000_000


def find_checkpoint(model: str) -> Path:
    """Find the folder of a model: ``bundled``, a local folder, or a name on the Hugging Face hub, fetched if need be.

    Raises ModelUnusable, saying what was tried.
    """
    if model == "bundled":
        return _bundled()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _complete(folder)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelUnusable(f"model {model!r}: there is no such folder")
    return _complete(_fetch(model))


def fingerprint(folder: Path, *, precision: str, template: str) -> str:
    """Hash everything of a checkpoint that changes a logit, 128 bits in hexadecimal.

    That is the content of every file the model is loaded from, the class of precision it runs in, and how pairs are
    put together; not its name, place or age. Reads all of it: about a second per gigabyte.
    """
    whole = blake2b(digest_size=16)
    for said in ("rerankq cross-encoder 1, raw logits", precision, template):
        whole.update(_framed(said.encode()))
    for path in _parts(folder):
        whole.update(_framed(path.relative_to(folder).as_posix().encode()))
        whole.update(_content(path))
    return whole.hexdigest()


def weight_names(folder: Path) -> set[str]:
    """List the names of all stored weights; raises ModelUnusable where the files cannot be read."""
    names: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        try:
            with path.open("rb") as file:
                # The format: eight bytes of length, then that much JSON, then the numbers.
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, _LARGEST_HEADER)))
        except (OSError, ValueError) as error:
            raise ModelUnusable(f"{path} is not a readable safetensors file: {error}") from error
        names.update(header)
    return names


def _bundled() -> Path:
    if not (_BUNDLED / "config.json").is_file():
        raise ModelUnusable(
            "the bundled model is part of the source repository (models/minilm-l6-rerank), not of the installed "
            "package: clone the repository and give that folder as the model, or name one of the hub, "
            "such as cross-encoder/ms-marco-MiniLM-L6-v2"
        )
    return _BUNDLED


def _complete(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelUnusable(f"{folder} holds no config.json: not a model folder")
    if not any(folder.rglob("*.safetensors")):
        raise ModelUnusable(
            f"{folder} holds no weights in safetensors; pickled weights are not loaded, convert them first"
        )
    return folder


def _fetch(model: str) -> Path:
    # Slow to import, and needed for hub names alone.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, allow_patterns=list(_PARTS), ignore_patterns=list(_EXPORTS)))
    except LocalEntryNotFoundError as error:
        raise ModelUnusable(
            f"model {model!r}: no such folder here, not in the local hub cache, and the hub cannot be reached ({error})"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ModelUnusable(f"model {model!r}: no such folder here, and the hub refuses it ({error})") from error


def _parts(folder: Path) -> Iterator[Path]:
    exports = {pattern.partition("/")[0] for pattern in _EXPORTS}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _HASHED and path.is_file() and path.relative_to(folder).parts[0] not in exports:
            yield path


def _content(path: Path) -> bytes:
    content = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            content.update(block)
    return content.digest()


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part
