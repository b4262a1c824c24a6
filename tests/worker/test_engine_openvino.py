"""OpenVINO gives torch's logits, in every precision as near as torch does, and reports to nobody."""

import contextlib
import gzip
import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_checkpoints
from forked_processes import ForkedProcess

from rerankq_worker import engine
from rerankq_worker.engine import ModelUnusable
from rerankq_worker.engine.models import openvino_pass, pass_selection
from rerankq_worker.engine.models.cores import multiplies_bfloat16
from rerankq_worker.engine.models.openvino_pass import OpenVinoPass, quantise_weights

pytestmark = pytest.mark.slow

SCIFACT = Path(__file__).resolve().parents[3] / "shared" / "data" / "scifact"
QUERY = "which drug reduces fever in adults?"
TEXTS = [
    "Aspirin inhibits the production of prostaglandins, and so reduces fever, pain and inflammation in adults.",
    "The capital of France is Paris; its population was 2,102,650 in 2023.",
    "Paracetamol lowers the temperature of children. " * 9,
    "深度学习模型在检索任务中表现出色。",
    "short",
    "",
]


def pairs():
    if not SCIFACT.is_dir():
        return [(query, text) for query in (QUERY, "Paris") for text in TEXTS]

    def rows(name, count):
        with gzip.open(SCIFACT / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]

    queries, corpus = rows("queries.jsonl.gz", 2), rows("corpus.jsonl.gz", 4)
    return [(query["text"], chunk["text"]) for query in queries for chunk in corpus]


@pytest.fixture(scope="module")
def torch_engine():
    return engine.load("bundled", "cpu", "float32", runtime="torch", threads=1)


@pytest.fixture(scope="module")
def expected(torch_engine):
    return torch_engine.score(pairs())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a model that loads in a fraction of a second, for what does not depend on the model."""
    return str(tiny_checkpoints.write("bert", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def engines():
    dtypes = ("float32", "bfloat16", "int8")
    return {dtype: engine.load("bundled", "cpu", dtype, runtime="openvino", threads=1) for dtype in dtypes}


# Measured on 24 pairs of SciFact, whose logits spread by 3: at most 4e-6, 0.04 and 0.2.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1), ("int8", 0.4)])
def test_logits_are_those_of_torch(engines, expected, dtype, tolerance):
    logits = engines[dtype].score(pairs())
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    # A last layer in fewer bits would make many of them equal.
    assert len(set(logits.tolist())) == len(set(expected.tolist()))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.1)])
def test_a_score_does_not_depend_on_its_batch_mates(engines, dtype, tolerance):
    batch = engines[dtype].tokenise(QUERY, TEXTS)
    together = engines[dtype].forward(batch)
    alone = [engines[dtype].forward([pair]).item() for pair in batch]
    np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance)


def test_an_empty_list_of_pairs_has_no_logits(engines):
    assert engines["float32"].forward([]).shape == (0,)


def test_scores_of_float32_are_shared_between_runtimes_and_of_less_are_not(engines, torch_engine):
    assert engines["float32"].fingerprint == torch_engine.fingerprint
    # Of short pairs alone, which changes no fingerprint: without its instructions a CPU takes long to probe bfloat16.
    short = engine.load("bundled", "cpu", "bfloat16", runtime="torch", threads=1, max_length=32)
    reduced = [short, engines["int8"]]
    # A CPU that does not multiply bfloat16 gets float32 from OpenVINO, and what is computed in it is shared as such.
    other = engines["bfloat16"] if multiplies_bfloat16() else engines["float32"]
    assert engines["bfloat16"].fingerprint == other.fingerprint
    assert len({one.fingerprint for one in (*reduced, torch_engine)}) == 3
    assert engines["bfloat16"].fingerprint != reduced[0].fingerprint


def test_the_engine_reports_its_runtime_and_precision(engines):
    said = {asked: (one.runtime, one.dtype, one.device, one.padded) for asked, one in engines.items()}
    computed = {**{dtype: dtype for dtype in engines}, **({} if multiplies_bfloat16() else {"bfloat16": "float32"})}
    assert said == {asked: ("openvino", dtype, "cpu", True) for asked, dtype in computed.items()}


def no_architecture(model, yes_or_no=None):
    return None


HONEST = OpenVinoPass.__call__


def beside_the_point(self, batch):
    return HONEST(self, batch) + 0.01 * len(batch)


@pytest.mark.parametrize(
    ("where", "what", "instead"),
    [(pass_selection, "architecture_of", no_architecture), (OpenVinoPass, "__call__", beside_the_point)],
)
def test_a_model_that_openvino_cannot_run_runs_on_torch_unless_openvino_was_asked_for(
    tiny, monkeypatch, caplog, where, what, instead
):
    monkeypatch.setattr(where, what, instead)
    fallen = engine.load(tiny, "cpu", "float32", threads=1)
    assert fallen.runtime == "torch"
    assert "runs on torch" in caplog.text
    with pytest.raises(ModelUnusable, match="does not run on openvino"):
        engine.load(tiny, "cpu", "float32", runtime="openvino", threads=1)


@pytest.mark.parametrize("padded", [True, False])
def test_the_option_padded_selects_torch(tiny, padded):
    asked = engine.load(tiny, "cpu", "float32", padded=padded, threads=1)
    assert (asked.runtime, asked.padded) == ("torch", padded)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="what threads run on is read as Linux tells it")
def test_threads_are_not_pinned_to_cores(engines):
    batch = engines["float32"].tokenise(QUERY, TEXTS) * 3
    computing = threading.Thread(target=engines["float32"].forward, args=(batch,))
    computing.start()
    cores = set()
    while computing.is_alive():
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                cores.add(frozenset(os.sched_getaffinity(int(thread.name))))
    assert cores == {frozenset(os.sched_getaffinity(0))}


@pytest.mark.parametrize("transposed", [True, False])
def test_weights_in_int8_have_a_scale_for_each_output(transposed):
    openvino, ops = openvino_pass._openvino(), importlib.import_module("openvino.opset13")
    dice = np.random.default_rng(0)
    # Outputs of very different size, and one of zeros.
    weights = (dice.normal(size=(4, 64)) * [[1e-3], [1.0], [1e3], [0.0]]).astype(np.float32)
    states = dice.normal(size=(2, 64)).astype(np.float32)
    given = ops.parameter([2, 64], np.float32)
    constant = ops.constant(weights if transposed else np.ascontiguousarray(weights.T))
    graph = openvino.Model([ops.matmul(given, constant, False, transposed)], [given])
    quantise_weights(graph)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    logits = openvino.Core().compile_model(graph, "CPU", exact)([states])[0]
    expected = states @ weights.T
    np.testing.assert_allclose(logits / [1e-3, 1, 1e3, 1], expected / [1e-3, 1, 1e3, 1], rtol=0, atol=0.3)
    assert not logits[:, 3].any()


@pytest.mark.parametrize(
    ("asked", "given", "computed"),
    [("bfloat16", "f32", "float32"), ("bfloat16", "bf16", "bfloat16"), ("int8", "f32", "int8")],
)
def test_the_reported_precision_is_the_one_that_the_cpu_computes_in(asked, given, computed):
    compiled = SimpleNamespace(get_property=lambda _: SimpleNamespace(to_string=lambda: given))
    assert openvino_pass._precision_of(compiled, asked) == computed


def test_stale_output_of_openvino_is_a_memory_error(monkeypatch):
    states = np.ones((2, 3), np.float32)
    request = SimpleNamespace(infer=lambda *_, **__: [states])
    run = OpenVinoPass.__new__(OpenVinoPass)
    run._request, run._inputs = request, None
    run._padded_pass = SimpleNamespace(head=lambda given: given.sum(1))
    monkeypatch.setattr(openvino_pass, "pad_batch", lambda *_: {})
    assert run([None] * 2).tolist() == [3, 3]
    with pytest.raises(MemoryError):
        run([None] * 2)  # nothing was written since
    states[:] = 1
    with pytest.raises(MemoryError):
        run([None] * 3)
    states[0] = 1
    with pytest.raises(MemoryError):
        run([None] * 2)  # one row of two


# What may have been done or cannot be undone in the process of the tests: whether the makers' package for reports is
# imported, and a limit on memory, which Linux knows alone.
ALONE = """
import json, resource, sys
from pathlib import Path
from rerankq_worker import engine
from rerankq_worker.engine.errors import is_out_of_memory

# A forked process comes with OpenVINO: all of it that is Python is imported anew.
for name, module in list(sys.modules.items()):
    # Without looking a module up that is loaded on its first use.
    file = object.__getattribute__(module, "__dict__").get("__file__") if module else ""
    if name.startswith("openvino") and "_pyopenvino" not in name and not str(file).endswith(".so"):
        del sys.modules[name]
loaded = engine.load("bundled", "cpu", "float32", runtime="openvino", threads=1)
reports = [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module]
found = {"modules that report": reports}
if sys.platform == "linux":
    [short], [long] = loaded.tokenise("q", ["word"]), loaded.tokenise("q", ["word " * 600])
    before = loaded.forward([short] * 100)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**26, resource.RLIM_INFINITY))
    try:
        loaded.forward([long] * 100)
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        found["out of memory"] = is_out_of_memory(error)
        found["difference"] = float(abs(loaded.forward([short] * 50) - before[:50]).max())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone():
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with ForkedProcess(["-c", ALONE], os.environ, text=True, **pipes) as process:
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(said)


def test_openvino_sends_no_usage_statistics(alone):
    assert alone["modules that report"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
def test_a_batch_without_memory_does_not_get_the_logits_of_the_one_before(alone):
    assert alone["out of memory"] is True
    assert alone["difference"] < 1e-5
