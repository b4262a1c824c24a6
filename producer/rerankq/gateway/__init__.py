"""The gateway: rerank jobs over HTTP, in its own API and in the dialects of other servers.

Needs the extra ``[gateway]``.
"""
