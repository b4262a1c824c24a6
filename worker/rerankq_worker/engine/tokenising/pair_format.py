"""Which format a checkpoint's pairs have: special tokens round two texts, or one text out of a chat template."""

from __future__ import annotations

import logging
from typing import Any

from tokenizers import Tokenizer

from ..errors import ModelUnusable
from .chat_pairs import ChatPairs
from .pair_tokeniser import PairTokeniser, Tokeniser
from .rendering import Render, carries_pairs, find_rendering, qwen3
from .text_reading import KNOWN_BYTES
from .whole_pairs import WholeChats, WholePairs

logger = logging.getLogger(__name__)

_SLOW = "pairs are encoded whole, and no chunk's token ids are remembered: %s"

FORMATS = ("auto", "pair", "qwen3")

#: Tokens that Qwen3's own format is made of.
_QWEN3_MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
#: What a saved configuration may ask of the renderer that is about the tokens made of its text.
_NOT_FOR_RENDERING = {
    "max_length", "padding", "restore_suffix", "return_dict", "return_tensors", "tokenize", "truncation",
}  # fmt: skip


def pair_tokeniser_for(
    model: Any,
    *,
    max_length: int,
    pair_format: str = "auto",
    instruction: str | None = None,
    known_bytes: int = KNOWN_BYTES,
) -> Tokeniser:
    """Make the tokeniser of pairs for a loaded sentence-transformers ``CrossEncoder``.

    ``auto`` does what sentence-transformers does: it renders the checkpoint's chat template where that has a place for
    a query and a document, else encodes the two texts as a pair. Where it would refuse, a model that knows the tokens
    of Qwen3's format gets that one. ``pair`` and ``qwen3`` take these without looking. ``instruction`` replaces
    the prompt that the checkpoint was saved with; before pairs of texts it is put in front of the query.

    Raises ModelUnusable where no format is known, and ValueError for an unknown name.
    """
    if pair_format not in FORMATS:
        raise ValueError(f"pair_format {pair_format!r} is none of {', '.join(FORMATS)}")
    if not getattr(model.tokenizer, "is_fast", False):
        raise ModelUnusable("this model has no tokenizer.json: only fast tokenisers are supported")
    tokenizer = model.tokenizer.backend_tokenizer
    prompt = instruction or model.prompts.get(model.default_prompt_name) or ""
    render = _render_of(model, prompt) if pair_format == "auto" else None
    if pair_format == "qwen3" or (render and not carries_pairs(render)):
        render = _qwen3_of(tokenizer, instruction)
    if render:
        return rendered_pairs(tokenizer, render, max_length=max_length, known_bytes=known_bytes)
    return special_token_pairs(tokenizer, max_length=max_length, query_prompt=prompt, known_bytes=known_bytes)


def special_token_pairs(
    tokenizer: Tokenizer, *, max_length: int, query_prompt: str = "", known_bytes: int = KNOWN_BYTES
) -> Tokeniser:
    """Take the fast way to pairs if it is right for this tokeniser, else the slow one, and say so.

    ``query_prompt`` is put before every query.
    """
    try:
        return PairTokeniser(tokenizer, max_length=max_length, query_prompt=query_prompt, known_bytes=known_bytes)
    except ModelUnusable as reason:
        logger.warning(_SLOW, reason)
        return WholePairs(tokenizer, max_length=max_length, query_prompt=query_prompt)


def rendered_pairs(
    tokenizer: Tokenizer, render: Render, *, max_length: int, known_bytes: int = KNOWN_BYTES
) -> Tokeniser:
    """Take the fast way to rendered pairs if it is right for this tokeniser, else the slow one, and say so."""
    try:
        return ChatPairs(tokenizer, find_rendering(render), max_length=max_length, known_bytes=known_bytes)
    except ModelUnusable as reason:
        logger.warning(_SLOW, reason)
        return WholeChats(tokenizer, render, max_length=max_length)


def _render_of(model: Any, prompt: str) -> Render | None:
    """Take the checkpoint's chat template, or None where pairs are two texts."""
    reader = model[0]
    reads = getattr(reader, "modality_config", {})
    if "message" not in reads:
        return None
    structured = reads["message"].get("format") == "structured"
    asked = reader.processing_kwargs.get("chat_template", {})
    options = {name: value for name, value in asked.items() if name not in _NOT_FOR_RENDERING}

    def render(query: str, chunk: str) -> str:
        texts = {"system": prompt, "query": query, "document": chunk}
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if structured else text}
            for role, text in texts.items()
            if text or role != "system"
        ]
        return str(reader.processor.apply_chat_template(messages, tokenize=False, **options))

    return render


def _qwen3_of(tokenizer: Tokenizer, instruction: str | None) -> Render:
    lacking = [mark for mark in _QWEN3_MARKS if tokenizer.token_to_id(mark) is None]
    if lacking:
        raise ModelUnusable(
            "this model's chat template has no place for the roles 'query' and 'document', and its tokeniser does not "
            f"know {' '.join(lacking)}, which Qwen3's format is made of"
        )
    logger.info("pairs are put together in the format of Qwen3-Reranker")
    return qwen3(instruction)
