"""What can go wrong between a pair and its score, as types.

EngineError
├── ModelUnusable     the model cannot be loaded, or is not a cross-encoder with one label
├── Unconvertible     a runtime cannot run this model, or gives other logits than torch
├── PairFailed        this pair fails even alone; the others are fine
│   └── LimitTooSmall its maximum length leaves no token for query and chunk
├── EngineDied        the device or its thread is gone; the same pairs may succeed elsewhere
├── EngineClosed      the batcher was closed
└── TicketCancelled   the submitter cancelled these pairs
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of the engine's errors."""


class ModelUnusable(EngineError, ValueError):
    """Raised when a model cannot be found or loaded, or does not give one score per pair."""


class Unconvertible(EngineError):
    """Raised when a runtime cannot run a model that torch runs, or gives other logits than torch."""


class PairFailed(EngineError):
    """Raised when a pair cannot be scored although it was tried alone and the device works."""


class LimitTooSmall(PairFailed, ValueError):
    """Raised when what is read beside query and chunk leaves no token for them within the maximum length."""


class EngineDied(EngineError):
    """Raised when the device no longer answers; the fault may not be in the pairs that waited."""


class EngineClosed(EngineError):
    """Raised when pairs are submitted to, or still wait in, a batcher that was closed."""


class TicketCancelled(EngineError):
    """Raised when a ticket's result is asked for after it was cancelled."""


#: Characters of a foreign error's message that are quoted.
_QUOTED = 300


def in_one_line(error: BaseException) -> str:
    r"""Quote a foreign error's message in one line of limited length; its ``repr`` where it has none.

    >>> in_one_line(ValueError("no\n\n  weights")), in_one_line(KeyError())
    ('no weights', 'KeyError()')
    """
    words = " ".join(str(error).split()) or repr(error)
    return words if len(words) <= _QUOTED else words[:_QUOTED] + "…"


#: torch's CPU allocator, OpenVINO and some CUDA libraries raise a plain RuntimeError with one of these messages.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a smaller batch could succeed where this error was raised, without importing torch.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate..."))
    (True, True)
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in _OUT_OF_MEMORY)
