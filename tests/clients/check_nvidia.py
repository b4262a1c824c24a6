"""LangChain's NVIDIA compressor against the gateway."""

from checking import DOCUMENTS, KEY, QUERY, URL, check, ranked_texts
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank

for base in ("/v1", "/nvidia/v1"):

    @check("langchain NVIDIARerank", f"compress_documents at {base}")
    def compress(base=base):
        ranker = NVIDIARerank(
            base_url=URL + base, api_key=KEY, model="nvidia/llama-3.2-nv-rerankqa-1b-v2", top_n=3, truncate="END"
        )
        found = ranker.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
        ranked_texts([one.page_content for one in found], top_n=3)
        # Logits.
        assert found[0].metadata["relevance_score"] > found[-1].metadata["relevance_score"]
