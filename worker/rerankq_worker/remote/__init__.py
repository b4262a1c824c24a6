"""A model on another server: requests in that server's dialect, and a scorer over them.

Importing this needs httpx, and neither torch nor anything else that runs a model.
"""

from .remote_backend import RemoteBackend

__all__ = ["RemoteBackend"]
