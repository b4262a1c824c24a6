"""Pairs rendered as one text: the fixed texts around query and chunk, derived from a chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ModelUnusable

#: Takes a query and a chunk, returns the whole text that the model reads.
Render = Callable[[str, str], str]

#: Placeholders that no template contains by chance.
QUERY, CHUNK = "rerankq-stands-here-for-the-query", "rerankq-stands-here-for-the-chunk"
#: Texts whose first or last tokens may merge with the text beside them.
PROBES = (
    "word", "Two words", " space", "  spaces ", "\nline\n", "\n\nlines\n\n", "\t", "", " ", "\n", "7 sins", "'s", ".",
    "?!", "ends.", "ends:", "ends\r\n", "é", "\u0301mark", "你好", "👩‍👩‍👧", "<", ">", "|", "#", "_",
    "\u3000", "\u200b",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rendering:
    """The fixed texts before the query, between query and chunk, and after the chunk.

    ``trims`` says that white space at the ends of query and chunk is removed. Its ``repr`` is part of the score
    fingerprint: renaming a field loses all cached scores.
    """

    before: str
    between: str
    after: str
    trims: bool = False

    def __call__(self, query: str, chunk: str) -> str:
        """Render a pair.

        >>> Rendering("Q: ", " D: ", "!", trims=True)(" what? ", "that")
        'Q: what? D: that!'
        """
        return self.before + self.rendered(query) + self.between + self.rendered(chunk) + self.after

    def rendered(self, text: str) -> str:
        """Return a query or a chunk as it appears in the whole text."""
        return text.strip() if self.trims else text


def qwen3(instruction: str | None = None) -> Rendering:
    """Return the format that Qwen3-Reranker was trained with."""
    task = instruction or "Given a web search query, retrieve relevant passages that answer the query"
    return Rendering(
        before="<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        f"<|im_start|>user\n<Instruct>: {task}\n<Query>: ",
        between="\n<Document>: ",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    )


def renders_both_texts(render: Render) -> bool:
    """Tell whether both texts are in the result; False if it raises, as chat templates do at unknown roles."""
    try:
        whole = render(QUERY, CHUNK)
    except Exception:  # noqa: BLE001 - a checkpoint's template may raise any error
        return False
    return QUERY in whole and CHUNK in whole


def find_rendering(render: Render) -> Rendering:
    """Derive the fixed texts around query and chunk; raises ModelUnusable for a template that does more.

    >>> find_rendering(lambda query, chunk: f"[{query}] is answered by [{chunk}]?")
    Rendering(before='[', between='] is answered by [', after=']?', trims=False)
    """
    if isinstance(render, Rendering):
        return render
    whole = render(QUERY, CHUNK)
    before, query, rest = whole.partition(QUERY)
    between, chunk, after = rest.partition(CHUNK)
    pairs = list(zip(PROBES, reversed(PROBES), strict=True))
    for trims in (False, True):
        found = Rendering(before, between, after, trims)
        if query and chunk and all(render(*pair) == found(*pair) for pair in pairs):
            return found
    raise ModelUnusable("the chat template does more than put fixed texts around query and chunk")
