"""Which format a checkpoint's pairs have: special tokens around two texts, or one text from a chat template.

A new tokeniser is a class with ``Tokeniser``'s methods, selected here.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from ..errors import ModelUnusable, PairFailed
from .chat_pairs import ChatPairs
from .pair_tokeniser import PairTokeniser, Tokeniser
from .rendering import CHUNK, QUERY, Render, find_rendering, qwen3, renders_both_texts
from .text_reading import CACHE_BYTES
from .whole_pairs import WholeChats, WholePairs

logger = logging.getLogger(__name__)

_SLOW = "pairs are encoded whole, without a cache of token ids: %s"

FORMATS = ("auto", "pair", "qwen3")
#: Instructions whose tokenisers are kept; together they cache as many token ids as that of the model's own.
KEPT_INSTRUCTIONS = 8

#: Special tokens of Qwen3's format.
_QWEN3_MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
#: Saved options of the chat template that concern its tokens, not its text.
_NOT_FOR_RENDERING = {
    "max_length", "padding", "restore_suffix", "return_dict", "return_tensors", "tokenize", "truncation",
}  # fmt: skip


def pair_tokeniser_for(
    model: Any,
    *,
    max_length: int,
    pair_format: str = "auto",
    instruction: str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Tokeniser:
    """Make the tokeniser of pairs for a loaded sentence-transformers ``CrossEncoder``.

    ``auto`` does what sentence-transformers does: it renders the checkpoint's chat template if that has the roles query
    and document, else encodes the two texts as a pair. Where sentence-transformers would refuse, a model whose
    vocabulary has the special tokens of Qwen3's format uses that format. ``pair`` and ``qwen3`` select a format
    unconditionally. ``instruction`` replaces the prompt that the checkpoint was saved with; in pairs of texts it is put
    before the query.

    Raises ModelUnusable where no format is known, and ValueError for an unknown name.
    """
    if pair_format not in FORMATS:
        raise ValueError(f"pair_format must be one of {', '.join(FORMATS)}, not {pair_format!r}")
    tokenizer, renders = _tokenizer_of(model), _renders_of(model, pair_format)
    if renders is not None:
        return rendered_pairs(tokenizer, renders(instruction), max_length=max_length, cache_bytes=cache_bytes)
    prompt = instruction or model.prompts.get(model.default_prompt_name) or ""
    return special_token_pairs(tokenizer, max_length=max_length, query_prompt=prompt, cache_bytes=cache_bytes)


class InstructedTokenisers:
    """Tokenisers of a model's pairs for instructions in place of its own. Safe to share between threads.

    Nothing of the model is kept but what it renders and encodes texts with. ``takes_instruction`` says whether its
    pairs have a place for one: a chat template in which it appears.
    """

    def __init__(self, model: Any, *, max_length: int) -> None:
        self._tokenizer, self._renders = _tokenizer_of(model), _renders_of(model)
        self._max_length = max_length
        self._kept: OrderedDict[str, Tokeniser] = OrderedDict()
        self._lock = threading.Lock()
        self.takes_instruction = self._renders is not None and _INSTRUCTION in self._renders(_INSTRUCTION)(QUERY, CHUNK)

    def of(self, instruction: str) -> Tokeniser:
        """Return the tokeniser for an instruction; raises PairFailed where the model takes none."""
        if self._renders is None or not self.takes_instruction:
            raise PairFailed("this model takes no instruction")
        with self._lock:
            found = self._kept.pop(instruction, None) or rendered_pairs(
                self._tokenizer,
                self._renders(instruction),
                max_length=self._max_length,
                cache_bytes=CACHE_BYTES // KEPT_INSTRUCTIONS,
            )
            self._kept[instruction] = found
            if len(self._kept) > KEPT_INSTRUCTIONS:
                self._kept.popitem(last=False)
        return found


def special_token_pairs(
    tokenizer: Tokenizer, *, max_length: int, query_prompt: str = "", cache_bytes: int = CACHE_BYTES
) -> Tokeniser:
    """Return the tokeniser that joins cached chunks if it is exact here, else the one that encodes whole pairs.

    ``query_prompt`` is put before every query.
    """
    try:
        return PairTokeniser(tokenizer, max_length=max_length, query_prompt=query_prompt, cache_bytes=cache_bytes)
    except ModelUnusable as reason:
        logger.warning(_SLOW, reason)
        return WholePairs(tokenizer, max_length=max_length, query_prompt=query_prompt)


def rendered_pairs(
    tokenizer: Tokenizer, render: Render, *, max_length: int, cache_bytes: int = CACHE_BYTES
) -> Tokeniser:
    """Return the tokeniser that joins cached chunks if it is exact here, else the one that encodes whole texts."""
    try:
        return ChatPairs(tokenizer, find_rendering(render), max_length=max_length, cache_bytes=cache_bytes)
    except ModelUnusable as reason:
        logger.warning(_SLOW, reason)
        return WholeChats(tokenizer, render, max_length=max_length)


# No template contains it by chance.
_INSTRUCTION = "rerankq-stands-here-for-the-instruction"
# Takes an instruction; None stands for that of the checkpoint.
_Renders = Callable[[str | None], Render]


def _tokenizer_of(model: Any) -> Tokenizer:
    if not getattr(model.tokenizer, "is_fast", False):
        raise ModelUnusable("this model has no tokenizer.json: only fast tokenisers are supported")
    tokenizer: Tokenizer = model.tokenizer.backend_tokenizer
    return tokenizer


def _renders_of(model: Any, pair_format: str = "auto") -> _Renders | None:
    """Return what makes the renderer for an instruction, or None where pairs are two texts."""
    renders = _template_of(model) if pair_format == "auto" else None
    if pair_format == "qwen3" or (renders is not None and not renders_both_texts(renders(None))):
        _check_qwen3(_tokenizer_of(model))
        return qwen3
    return renders


def _template_of(model: Any) -> _Renders | None:
    """Return what renders the checkpoint's chat template, or None where pairs are two texts."""
    reader = model[0]
    reads = getattr(reader, "modality_config", {})
    if "message" not in reads:
        return None
    structured = reads["message"].get("format") == "structured"
    asked = reader.processing_kwargs.get("chat_template", {})
    options = {name: value for name, value in asked.items() if name not in _NOT_FOR_RENDERING}
    # Neither refers to the model, whose weights may be dropped.
    processor, own = reader.processor, model.prompts.get(model.default_prompt_name) or ""

    def renders(instruction: str | None) -> Render:
        def render(query: str, chunk: str) -> str:
            texts = {"system": instruction or own, "query": query, "document": chunk}
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}] if structured else text}
                for role, text in texts.items()
                if text or role != "system"
            ]
            return str(processor.apply_chat_template(messages, tokenize=False, **options))

        return render

    return renders


def _check_qwen3(tokenizer: Tokenizer) -> None:
    lacking = [mark for mark in _QWEN3_MARKS if tokenizer.token_to_id(mark) is None]
    if lacking:
        raise ModelUnusable(
            "this model's chat template does not use the roles 'query' and 'document', and its tokeniser lacks "
            f"{' '.join(lacking)}, which Qwen3's format needs"
        )
    logger.info("pairs are rendered in the format of Qwen3-Reranker")
