"""Open WebUI's external reranker, from a checkout of its source, against the gateway."""

import importlib.util
import os
import sys
import types
from pathlib import Path

from checking import DOCUMENTS, KEY, LOCKED_URL, QUERY, SCORES, URL, check

SOURCE = Path(os.environ["OPEN_WEBUI_SOURCE"]) / "backend/open_webui/retrieval/models/external.py"


def reranker_class():
    """Load the one class; what it imports of the application is stood in for."""
    for name in ("open_webui", "open_webui.env", "open_webui.retrieval", "open_webui.retrieval.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["open_webui.env"].__dict__.update(
        ENABLE_FORWARD_USER_INFO_HEADERS=False,
        SRC_LOG_LEVELS={"RAG": "ERROR"},
        AIOHTTP_CLIENT_SESSION_SSL=True,
        REQUESTS_VERIFY=True,
    )
    base = types.ModuleType("open_webui.retrieval.models.base_reranker")
    base.BaseReranker = object
    sys.modules[base.__name__] = base
    spec = importlib.util.spec_from_file_location("external", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ExternalReranker


@check("Open WebUI ExternalReranker", "predict")
def predict():
    reranker = reranker_class()(api_key=KEY, url=f"{URL}/v1/rerank")
    found = reranker.predict([(QUERY, text) for text in DOCUMENTS])
    assert len(found) == len(DOCUMENTS)
    assert all(abs(score - expected) < 1e-4 for score, expected in zip(found, SCORES, strict=True))


@check("Open WebUI ExternalReranker", "a wrong key gives no ranking, the right one does")
def wrong_key():
    found = [
        reranker_class()(api_key=key, url=f"{LOCKED_URL}/v1/rerank").predict([(QUERY, text) for text in DOCUMENTS])
        for key in (KEY, "wrong")
    ]
    assert found[0] is not None
    assert found[1] is None
