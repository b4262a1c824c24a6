"""What only a CUDA device can show; skipped where there is none."""

import numpy as np
import pytest
import torch

from rerankq_worker import engine
from rerankq_worker.engine import Batcher
from rerankq_worker.engine.models.attention import AttentionSpan, UnpaddedBatch, attend, runs_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

QUERY = "which drug reduces fever in adults?"
CHUNKS = [f"Chunk {number} says that aspirin reduces fever. " + "And so on. " * (number % 23) for number in range(60)]
PAIRS = [(QUERY, chunk) for chunk in CHUNKS]


@pytest.fixture(scope="module")
def exact():
    return engine.load("bundled", device="cpu", dtype="float32").score(PAIRS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kept", [4, 2])
def test_the_kernel_for_unpadded_pairs_agrees_with_attention_run_by_run(causal, window, kept):
    torch.manual_seed(1)
    lengths = [40, 40, 7, 64, 1]
    states = [torch.randn(1, heads, sum(lengths), 32) for heads in (4, kept, kept)]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    span = AttentionSpan(None, causal=causal, window=window)

    def attended(device, dtype):
        unpadded = UnpaddedBatch(
            cu_seqlens[:-1].long().to(device), cu_seqlens.to(device), max(lengths), runs_of(lengths)
        )
        return attend(*(part.to(device, dtype) for part in states), unpadded, span).float().cpu()

    torch.testing.assert_close(attended("cuda", torch.bfloat16), attended("cpu", torch.float32), rtol=0, atol=0.05)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02), ("float32", 1e-3)])
@pytest.mark.parametrize("padded", [True, None])
def test_logits_stay_near_those_of_the_cpu(exact, dtype, tolerance, padded):
    on_cuda = engine.load("bundled", device="cuda", dtype=dtype, padded=padded)
    assert on_cuda.padded is (padded is True or dtype == "float32")
    np.testing.assert_allclose(on_cuda.score(PAIRS), exact, rtol=0, atol=tolerance)


def test_overlapping_batches_give_every_pair_its_own_logit(exact):
    on_cuda = engine.load("bundled", device="cuda", dtype="float16", max_batch_tokens=512)
    with Batcher(on_cuda) as batcher:
        tickets = [batcher.submit(on_cuda.tokenise(QUERY, CHUNKS)) for _ in range(8)]
        for ticket in tickets:
            np.testing.assert_allclose(ticket.result(60), exact, rtol=0, atol=0.02)
