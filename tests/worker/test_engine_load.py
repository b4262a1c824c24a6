"""Where models come from, and what is said when they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rerankq.local import worker_command
from rerankq_worker import engine
from rerankq_worker.engine import ModelUnusable
from rerankq_worker.engine.errors import in_one_line, is_out_of_memory
from rerankq_worker.engine.models import checkpoint, cores

FIND = "import sys; from rerankq_worker.engine import find_checkpoint; print(find_checkpoint(sys.argv[1]))"


def find_offline(model, hub):
    """Look a model up in a process of its own, with an empty or prepared hub cache and no network."""
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-c", FIND, model], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def write_checkpoint(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    header = json.dumps({"classifier.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_hub_name_is_found_in_the_local_cache_without_a_network(tmp_path):
    place = tmp_path / "hub" / "models--acme--tiny"
    write_checkpoint(place / "snapshots" / "abc123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc123")
    found = find_offline("acme/tiny", tmp_path)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == place / "snapshots" / "abc123"


def test_a_hub_name_that_cannot_be_fetched_says_what_was_tried(tmp_path):
    said = find_offline("acme/absent", tmp_path).stderr.splitlines()
    assert any("ModelUnusable: model 'acme/absent': no such folder here" in line for line in said)


@pytest.mark.parametrize(
    "model",
    [
        "/no/such/folder",
        "./nothing",
        "~/nothing-of-that-name",
        "~nobody/x",
        "a/b/c",
        "",
        "/" + "x" * 300,
        "a\0b",
        __file__,
    ],
)
def test_a_missing_folder_is_one_clear_error(model, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnusable, match=r"no such folder|no config\.json|cannot be looked up|is a file") as said:
        engine.load(model)
    assert "\n" not in str(said.value)


def test_a_folder_without_config_or_weights_is_rejected(tmp_path):
    with pytest.raises(ModelUnusable, match=r"no config\.json"):
        engine.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnusable, match="safetensors"):
        engine.load(str(tmp_path))


def test_a_missing_bundled_model_is_an_error_that_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_BUNDLED", tmp_path / "models" / "minilm-l6-rerank")
    with pytest.raises(ModelUnusable, match="clone the repository"):
        engine.load("bundled")


def fingerprint(folder, weights=b"w", precision="float32", template="t"):
    return checkpoint.fingerprint(checkpoint.files_of(folder), weights, precision=precision, template=template)


def test_the_fingerprint_changes_with_every_file_that_is_read(tmp_path):
    first = fingerprint(write_checkpoint(tmp_path / "a", tokenizer__json="{}"))
    assert fingerprint(write_checkpoint(tmp_path / "b", tokenizer__json="{}")) == first
    others = [
        fingerprint(write_checkpoint(tmp_path / "c", tokenizer__json="{ }")),
        fingerprint(write_checkpoint(tmp_path / "d", vocab__json="{}")),
        fingerprint(tmp_path / "a", b"v"),
        fingerprint(tmp_path / "a", precision="bfloat16 torch cpu"),
        fingerprint(tmp_path / "a", template="u"),
        fingerprint(tmp_path / "a", precision="float3", template="2t"),
    ]
    assert len({first, *others}) == 7
    assert all(len(name) == 32 for name in others)


def test_the_fingerprint_ignores_files_that_are_not_read(tmp_path):
    folder = write_checkpoint(tmp_path)
    first = fingerprint(folder)
    (folder / "README.md").write_text("words")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    assert fingerprint(folder) == first


def test_the_fingerprint_changes_with_a_files_name_and_a_chat_template(tmp_path):
    written = [write_checkpoint(tmp_path / name, **{f"{name}__json": "{}"}) for name in ("added", "vocab")]
    templated = write_checkpoint(tmp_path / "t", added__json="{}", chat_template__jinja="{{ messages }}")
    assert len({fingerprint(folder) for folder in (*written, templated)}) == 3


def test_a_file_overwritten_in_place_changes_the_marks(tmp_path):
    folder = write_checkpoint(tmp_path)
    before, weights = checkpoint.files_of(folder), folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    os.utime(weights, ns=(1, 1))
    assert checkpoint.files_of(folder) != before


def test_pickled_weights_beside_those_in_safetensors_do_not_matter(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert checkpoint.find_checkpoint(str(folder)) == folder


def test_a_download_from_the_hub_leaves_out_exports_and_pickled_weights(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name) or tmp_path
    )
    write_checkpoint(tmp_path)
    assert checkpoint.find_checkpoint("acme/tiny") == tmp_path
    assert asked["name"] == "acme/tiny"
    assert {"onnx/*", "openvino/*"} <= set(asked["ignore_patterns"])
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith(("bin", "pt", "pkl", "*"))]


def test_a_replaced_file_changes_the_marks(tmp_path):
    folder = write_checkpoint(tmp_path, tokenizer__json="{}")
    before = checkpoint.files_of(folder)
    assert checkpoint.files_of(folder) == before
    for name in ("model.safetensors", "tokenizer.json"):
        other = folder / "other"
        other.write_bytes((folder / name).read_bytes())
        other.replace(folder / name)
        assert checkpoint.files_of(folder) != before
        before = checkpoint.files_of(folder)


@pytest.mark.parametrize("asked", [0, -5, "0", "fast"])
def test_an_invalid_batch_budget_is_rejected(asked):
    with pytest.raises(ValueError, match="max_batch_tokens"):
        engine.load("stub", max_batch_tokens=asked)


def test_a_batch_budget_may_be_text():
    assert engine.load("stub", max_batch_tokens="99").max_batch_tokens == 99
    assert engine.load("stub", max_batch_tokens="default").max_batch_tokens > 99


def test_a_maximum_length_below_one_is_rejected():
    with pytest.raises(ValueError, match="max_length"):
        engine.load("stub", max_length=0)
    assert engine.load("stub", max_length=1).max_length == 1


def test_a_thread_count_below_one_is_rejected():
    with pytest.raises(ValueError, match="threads"):
        engine.load("stub", threads=0)


def test_available_cores_are_at_least_one():
    assert 1 <= engine.available_cores() <= os.cpu_count()


def test_available_cores_are_the_fewer_of_affinity_and_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    found = {}
    for quota in ("200000 100000", "6400000 100000", "max 100000"):
        monkeypatch.setattr(cores, "_read", lambda _, quota=quota: quota)
        found[quota] = cores.available_cores()
    assert found == {"200000 100000": 2, "6400000 100000": 6, "max 100000": 6}


@pytest.mark.parametrize("flag", ["amx_bf16", "amx_fp16", "amx_int8", "avx512_bf16", "avx512_fp16", "avx_vnni"])
def test_instructions_for_short_numbers_are_named(flag):
    assert cores.short_number_instructions(f"model name: x\nflags: fpu {flag} avx2") == flag


@pytest.mark.parametrize(
    ("quota", "cores_found"), [("", 8), ("max 100000", 8), ("50000 100000", 1), ("0 0", 8), ("junk", 8)]
)
def test_an_unreadable_quota_limits_nothing(quota, cores_found):
    assert cores.quota_cores(quota, otherwise=8) == cores_found


def test_the_allocator_environment_holds_numbers_as_text():
    for name, value in engine.allocator_environment().items():
        assert name.startswith("MALLOC_")
        assert int(value) > (2**20 if "THRESHOLD" in name else 0)


def test_the_worker_command_sets_the_allocator_environment_unless_it_is_set():
    assert engine.allocator_environment().items() <= worker_command.tuned({}).items()
    assert worker_command.tuned({"MALLOC_TRIM_THRESHOLD_": "1"})["MALLOC_TRIM_THRESHOLD_"] == "1"


def test_torchs_memory_error_is_recognised_without_importing_torch():
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    assert is_out_of_memory(kind("anything"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA Out Of Memory. Tried to allocate 2 GiB",
        "Cannot allocate memory",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
        "Failed to allocate 4096 bytes",
    ],
)
def test_out_of_memory_is_recognised_in_the_message_of_every_library(words):
    assert is_out_of_memory(RuntimeError(words))


def test_a_foreign_error_is_quoted_in_one_line_of_limited_length():
    said = in_one_line(ValueError("line one\n" + "x" * 10_000))
    assert said.startswith("line one xxx")
    assert said.endswith("…")
    assert len(said) <= 301
    assert in_one_line(ValueError("y" * 300)) == "y" * 300


def test_all_errors_are_engine_errors():
    for name in ("EngineClosed", "EngineDied", "ModelUnusable", "PairFailed", "TicketCancelled"):
        assert issubclass(getattr(engine, name), engine.EngineError)
    assert issubclass(ModelUnusable, ValueError)
