"""GPUStack's rerank: it returns the documents."""

from __future__ import annotations

from .dialect import Dialect
from .fields import Flag
from .results import ResultsReply, ResultsRequest, call_of, response_of


class GPUStackRequest(ResultsRequest):
    """Body of a request."""

    return_documents: Flag = True


GPUSTACK = Dialect("gpustack", GPUStackRequest, ResultsReply, call_of, response_of)
