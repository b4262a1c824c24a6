"""Adapters to frameworks for retrieval: each module needs the extra of its name, and nothing here is imported for it.

``langchain``, ``llama_index`` and ``haystack`` turn a framework's documents into chunks, and a ranking into the
documents that the framework expects.
"""
