"""On a GPU: how fast is the engine's forward pass, unpadded against padded, and how near to what the device can do?

    python benchmarks/gpu_engine.py [--shapes minilm-l6 bge-base bge-m3 gte-modernbert] [--pairs 4000] [--minutes 7]
    python benchmarks/gpu_engine.py --device cpu --tiny      # tries the code where there is no GPU

Needs torch 2.11 or newer, transformers and numpy, and this checkout; nothing is installed or fetched. Models have the
shapes of well-known rerankers and random weights, pairs have random token ids and lengths as real text has them: the
work is the same (``gear/random_models.py``). Everything runs in bfloat16.

First the ceiling: the fastest of a few bf16 matrix products. Then it is checked that ``varlen_attn`` exists and agrees
with ordinary attention in float32. Then, for each shape: the engine's unpadded pass and its padded pass over batches
that the engine's own planner forms (the best of a few budgets), and batches as ``CrossEncoder.predict`` forms them
(sorted by length, 32 at a time, the whole model, padded; its tokenising is left out). Last, pairs of exactly 512
tokens, for the share of the ceiling. ``gear/work.py`` says how operations are counted: what a way computes, padding
included.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "worker"))

SHAPES = ("minilm-l6", "bge-base", "bge-m3", "gte-modernbert")
BUDGETS = (16_384, 32_768, 65_536, 131_072)
LONGEST = 512
EVEN = "unpadded, all of them as long as they can be"


def missing(device: str) -> str | None:
    """Say what is missing here; None where all is there."""
    try:
        torch, *_ = (importlib.import_module(name) for name in ("torch", "transformers", "numpy"))
    except ImportError as error:
        return f"needs torch 2.11 or newer, transformers and numpy: {error}"
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no GPU: needs one that computes bfloat16 (NVIDIA, Ampere or newer); --device cpu --tiny tries the code"
    try:
        importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen: 2.11 or newer is needed"
    return None


def measure_shape(name: str, args: argparse.Namespace, ceiling: float, ends: float) -> dict[str, Any]:
    """Measure all ways on one shape, in the time that is left to it."""
    from gear.engine_passes import PADDED, PREDICT, UNPADDED, Passes, best_budget, timed  # noqa: PLC0415 - see main
    from gear.random_models import model_of, pairs_of, real_lengths  # noqa: PLC0415

    passes = Passes(model_of(name, args.device, tiny=args.tiny), args.device)
    vocabulary = passes.model.config.vocab_size
    real = pairs_of(real_lengths(args.pairs, args.longest), vocabulary, with_types=passes.token_types)
    even = pairs_of([args.longest] * (args.pairs // 2), vocabulary, with_types=passes.token_types)
    # Two ways over each budget, predict, and the even pairs; each scores its pairs once before it is timed.
    each = max(0.2, min(args.seconds, (ends - time.monotonic()) / (2 * len(args.budgets) + 2) / 2))
    answers = {way: best_budget(passes, way, real, args.budgets, seconds=each) for way in (UNPADDED, PADDED)}
    answers[PREDICT] = timed(passes, PREDICT, real, 0, seconds=each)
    answers[EVEN] = timed(passes, UNPADDED, even, answers[UNPADDED]["budget"], seconds=each)
    logits = {way: answer.pop("logits") for way, answer in answers.items()}
    for answer in answers.values():
        rate = answer.pop("operations_per_second")
        answer |= {"tflops": round(rate / 1e12, 4), "share_of_ceiling": round(rate / ceiling, 3)}
    unpadded = answers[UNPADDED]["pairs_per_second"]
    known = logits[PREDICT]
    return {
        "parameters_millions": round(sum(one.numel() for one in passes.model.parameters()) / 1e6, 1),
        "ways": answers,
        "ratios": {
            f"unpadded ÷ {way}": round(unpadded / answers[way]["pairs_per_second"], 3) for way in (PADDED, PREDICT)
        },
        "logits_from_least_to_greatest": round(max(known) - min(known), 3),
        "greatest_distance_of_logits_from_predict": {
            way: round(max(abs(one - other) for one, other in zip(logits[way], known, strict=True)), 4)
            for way in (UNPADDED, PADDED)
        },
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from gear.engine_passes import check_attention  # noqa: PLC0415
    from gear.work import matrix_ceiling  # noqa: PLC0415

    ends = time.monotonic() + 60 * args.minutes
    sizes = [256, 512] if args.tiny else [4096, 8192, 16_384]
    products = matrix_ceiling(args.device, "bfloat16", sizes, seconds=0.3 if args.tiny else 2.0)
    ceiling = max(products.values())
    print(f"bf16 matrix products: {ceiling / 1e12:.4g} TFLOP/s at best", flush=True)
    attention = check_attention(args.device)
    print(f"attention: {attention}", flush=True)
    found: dict[str, Any] = {}
    for number, name in enumerate(args.shapes):
        left = ends - time.monotonic()
        if left < 20 and not args.tiny:
            print(f"{name}: left out, too little is left of {args.minutes} minutes")
            continue
        found[name] = measure_shape(name, args, ceiling, time.monotonic() + left / (len(args.shapes) - number))
        print(f"{name}: {found[name]}", flush=True)
    return {
        "ceiling_tflops": {size: round(one / 1e12, 4) for size, one in products.items()},
        "attention": attention,
        "shapes": found,
    }


def about(device: str) -> dict[str, Any]:
    from gear.report import machine  # noqa: PLC0415

    torch = importlib.import_module("torch")
    if device == "cpu":
        return machine()
    gpu = torch.cuda.get_device_properties(0)
    return machine() | {
        "gpu": gpu.name,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="tokens of a batch, to try")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each way and budget, at most")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of it")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--tiny", action="store_true", help="small models and few pairs: tries the code; the figures mean nothing"
    )
    parser.add_argument("--quick", action="store_true", help="on a CPU, tiny")
    args = parser.parse_args()
    if args.quick:
        args.device, args.tiny = "cpu", True
    args.longest = LONGEST
    if args.tiny:
        args.pairs, args.budgets, args.seconds, args.longest = 60, [1024, 4096], 0.2, 128
    # Before anything is imported that would fail with a traceback in place of a sentence.
    lacking = missing(args.device)
    if lacking:
        print(f"skipped: {lacking}")
        return 0
    from gear.plot import bars  # noqa: PLC0415
    from gear.report import keep  # noqa: PLC0415

    answer, here = measure(args), about(args.device)
    drawn = {
        f"{name}, {way}": figure["pairs_per_second"]
        for name, found in answer["shapes"].items()
        for way, figure in found["ways"].items()
        if way != EVEN
    }
    plot = bars("Pairs per second in bf16, text of real lengths", drawn, unit="pairs/s")
    keep("gpu_engine", answer, here, quick=args.tiny or args.device == "cpu", plot=plot)
    if not answer["attention"]["agrees"]:
        print("WRONG: attention without padding does not agree with ordinary attention")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
