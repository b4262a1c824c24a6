"""LiteLLM's rerank through its providers against the gateway."""

import asyncio

import litellm
from checking import DOCUMENTS, KEY, ORDER, QUERY, UNSERVED, URL, check, check_keys, raises, ranked

litellm.suppress_debug_info = True
litellm.num_retries = 0

# Provider and model, its base, and whether the documents come back.
PROVIDERS = [
    ("cohere/rerank-v3.5", URL, True),
    ("jina_ai/jina-reranker-v2-base-multilingual", URL, True),
    ("infinity/default", f"{URL}/infinity", True),
    ("hosted_vllm/default", URL, True),
    ("hosted_vllm/default", f"{URL}/vllm", True),
    ("huggingface/default", f"{URL}/tei", True),
    ("huggingface/default", URL, True),
    ("voyage/rerank-2.5", f"{URL}/voyage", True),
    ("voyage/rerank-2.5", f"{URL}/v1", True),
    ("deepinfra/default", f"{URL}/v1", False),
    ("deepinfra/default", f"{URL}/deepinfra", False),
    ("together_ai/default", f"{URL}/v1", True),
    ("fireworks_ai/default", URL, True),
    ("dashscope/qwen3-rerank", f"{URL}/v1", True),
    ("nvidia_nim/nvidia/llama-3.2-nv-rerankqa-1b-v2", URL, False),
]


def pairs(response):
    return [(one["index"], one["relevance_score"]) for one in response.results]


for model, base, documents in PROVIDERS:
    provider = model.partition("/")[0]

    @check(f"litellm {provider}/", f"rerank at {base.removeprefix(URL) or '/'}")
    def rerank(model=model, base=base, documents=documents, provider=provider):
        named = {} if provider in ("deepinfra", "nvidia_nim") else {"return_documents": True}
        response = litellm.rerank(model=model, query=QUERY, documents=DOCUMENTS, api_base=base, api_key=KEY, **named)
        found = pairs(response)
        if provider == "deepinfra":
            # In the order of the documents, as DeepInfra answers.
            found.sort(key=lambda one: -one[1])
        if provider == "nvidia_nim":
            assert [index for index, _ in found] == ORDER, found
            return ""
        ranked(found)
        texts = [(one.get("document") or {}).get("text") for one in response.results]
        assert not any(texts) or texts == [DOCUMENTS[at] for at in ORDER], texts
        return "" if any(texts) or not documents else "LiteLLM gives no documents"


@check("litellm cohere/", "arerank, 20 at once, top_n")
def many():
    async def gather():
        calls = [
            litellm.arerank(
                model="cohere/rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=2, api_base=URL, api_key=KEY
            )
            for _ in range(20)
        ]
        return await asyncio.gather(*calls)

    for response in asyncio.run(gather()):
        ranked(pairs(response), top_n=2)


@check("litellm cohere/", "an unserved model is a NotFoundError")
def unknown():
    named = {"query": QUERY, "documents": DOCUMENTS, "api_base": URL, "api_key": KEY, "max_retries": 0}
    return raises("NotFoundError", litellm.rerank, model=f"cohere/{UNSERVED}", **named)


for model, base, _ in PROVIDERS:

    def with_key(url, key, model=model, base=base):
        named = {"model": model, "query": QUERY, "documents": DOCUMENTS, "max_retries": 0}
        return litellm.rerank(**named, api_base=base.replace(URL, url), api_key=key)

    provider = model.partition("/")[0]
    wrong = ["wrong", None] if provider in ("hosted_vllm", "huggingface") else ["wrong"]
    check_keys(f"litellm {provider}/", "AuthenticationError", with_key, wrong=wrong)
