"""Xinference's rerank: truth values may be texts, and further options come as a JSON text in ``kwargs``."""

from __future__ import annotations

from pydantic import Field

from .dialect import Dialect
from .fields import Flag, Tokens
from .results import ResultsReply, ResultsRequest, call_of, response_of


class XinferenceRequest(ResultsRequest):
    """Body of a request."""

    return_len: Flag = Field(False, description="No effect: tokens are told in `usage` and `meta`.")
    max_chunks_per_doc: Tokens | None = Field(
        None, description="No effect: a document is read in one piece, as far as the model reads."
    )


XINFERENCE = Dialect("xinference", XinferenceRequest, ResultsReply, call_of, response_of)
