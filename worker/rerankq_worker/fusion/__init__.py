"""Fusion: pure functions from a job's signals to one score per chunk, and to an order."""

from . import ragflow
from .analyser import Analyser, analyse, warm
from .blending import DEFAULT_RULES, Blend, FusionSpec, blend, contributions, fuse, signals_needed
from .coverage import idf_weights, token_similarity
from .features import rank_feature_scores
from .normalise import normalise_identity, normalise_minmax, normalise_percent, normalise_ragflow, normalise_sigmoid
from .ranks import rank, reciprocal_rank_fusion
from .token_signal import TextFields, token_signal

__all__ = [
    "DEFAULT_RULES",
    "Analyser",
    "Blend",
    "FusionSpec",
    "TextFields",
    "analyse",
    "blend",
    "contributions",
    "fuse",
    "idf_weights",
    "normalise_identity",
    "normalise_minmax",
    "normalise_percent",
    "normalise_ragflow",
    "normalise_sigmoid",
    "ragflow",
    "rank",
    "rank_feature_scores",
    "reciprocal_rank_fusion",
    "signals_needed",
    "token_signal",
    "token_similarity",
    "warm",
]
