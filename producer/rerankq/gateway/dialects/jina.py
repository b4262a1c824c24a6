"""Jina's rerank: it returns the documents unless told not to."""

from __future__ import annotations

from .dialect import Dialect
from .fields import Flag
from .results import ResultsReply, ResultsRequest, call_of, response_of


class JinaRequest(ResultsRequest):
    """Body of a request."""

    return_documents: Flag = True


JINA = Dialect("jina", JinaRequest, ResultsReply, call_of, response_of)
