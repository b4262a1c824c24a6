"""The benchmarks can be found and run, and count what they say that they count; what they measure is not tested."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_processes import ForkedProcess
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# No question: what starts the others or reads what they found, and a rival that one of them starts.
NO_QUESTIONS = {"every.py", "numbers_to_reach.py", "usual_way.py"}
PURE = ["gear.checks", "gear.plot", "gear.report", "gear.work", "numbers_to_reach"]


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def questions() -> set[str]:
    return {path.name for path in BENCHMARKS.glob("*.py")} - NO_QUESTIONS


def test_every_benchmark_stands_in_the_readme():
    told = re.findall(r"^\| `([\w]+\.py)`", (BENCHMARKS / "README.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(questions())


def test_no_benchmark_hides_a_module_of_python():
    # The folder of a script comes first on its path.
    assert not {path.stem for path in BENCHMARKS.glob("*.py")} & set(sys.stdlib_module_names)


def test_whatever_is_asked_in_one_run_exists():
    asked = {question[0] for question in importlib.import_module("every").QUESTIONS}
    assert asked
    assert asked <= questions()


def test_every_number_to_reach_is_kept_by_the_benchmark_that_it_names():
    for row in importlib.import_module("numbers_to_reach").ROWS:
        source = (BENCHMARKS / row.command.split()[0]).read_text()
        assert f'"{row.result.partition(".")[0]}"' in source, row


@pytest.mark.parametrize("name", PURE)
def test_what_is_pure_keeps_its_examples(name):
    tested = doctest.testmod(importlib.import_module(name))
    assert tested.attempted
    assert not tested.failed


@pytest.mark.parametrize(
    "model",
    [
        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=50,
                       attn_implementation="eager"),
            add_pooling_layer=False,
        ),
        ModernBertModel(
            ModernBertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                             vocab_size=50, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1,
                             eos_token_id=2, attn_implementation="eager")
        ),
    ],
    ids=["bert", "modernbert"],
)  # fmt: skip
def test_operations_are_those_that_torch_counts(model):
    work = importlib.import_module("gear.work")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.full((5, 24), 7))
    assert work.operations(work.shape_of(model.config), [24] * 5) == counter.get_total_flops()


def test_without_a_gpu_the_benchmark_for_one_says_what_it_needs():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(BENCHMARKS)}
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with ForkedProcess(["-m", "gpu_engine"], environment, text=True, **pipes) as ran:
        out, error = ran.communicate(timeout=120)
    assert (ran.returncode, error) == (0, "")
    assert out.startswith("skipped: no GPU: needs one")
