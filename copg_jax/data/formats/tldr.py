"""The TL;DR prompt: its exact text, how it is parsed back, and how a long post is cut.

1. `format_prompt` writes `SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:`, with no trailing blank.
2. `parse_prompt` finds the post in a prompt that another tool wrote, so that it can be cut too.
3. `truncate_prompt` cuts the post, never the frame around it, until the prompt is short enough.
4. `format_hash` tells data that was made by other conventions.
5. `post_fraction` places a post in [0, 1) by a hash: a split in which no post is on both sides.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

NAME = "tldr"
VERSION = 1  # counted up with every change by which a row gets another text

_SUFFIX = "\n\nTL;DR:"
# Greedy post: the last "TL;DR:" is the frame's own, so that parsing undoes formatting exactly.
_OPENAI = re.compile(r"SUBREDDIT: r/([^\n]*)\n\nTITLE: (.*?)\n\nPOST: (.*)\n\nTL;DR:\s*", re.DOTALL)
# CarperAI's copies: single newlines, a trailing blank or no "TL;DR:" at all.
_CARPER = re.compile(r"SUBREDDIT: r/([^\n]*)\nTITLE: (.*?)\nPOST: (.*?)(?:\nTL;DR:)?\s*", re.DOTALL)
_NEWS = re.compile(r"TITLE: .*\n\nTL;DR:\s*", re.DOTALL)

# Cutting text changes the tokens next to the cut, not those further away; 32 is far beyond any
# merge of the usual tokenizers, so counts need checking only within 32 tokens of the limit.
_SLACK_TOKENS = 32


class Post(NamedTuple):
    """Fields of a TL;DR prompt; `subreddit` without `r/`."""

    subreddit: str
    title: str
    post: str


def format_prompt(post: Post) -> str:
    """Writes the prompt of a post, as OpenAI's query text."""
    return _head(post) + post.post + _SUFFIX


def parse_prompt(prompt: str) -> Post | None:
    """Reads the fields of a TL;DR prompt (in OpenAI's or CarperAI's frame); None for other text."""
    match = _OPENAI.fullmatch(prompt) or _CARPER.fullmatch(prompt)
    return Post(*match.groups()) if match else None


def is_news_prompt(prompt: str) -> bool:
    """Whether this is a CNN/DM article in TRL's frame: title and text, no subreddit or post."""
    return _NEWS.fullmatch(prompt) is not None


def truncate_prompt(
    prompt: str, token_ends: Callable[[str], Sequence[int]], max_tokens: int
) -> str | None:
    """Cuts the post at its last newline (one character where it has none) until the prompt fits.

    Args:
        prompt: TL;DR prompt as `format_prompt` writes it.
        token_ends: maps text to the end offset (in characters) of each of its tokens.
        max_tokens: most tokens of the result.

    Returns:
        The longest cut that fits; None where no post would be left or the prompt has no post.

    Note:
        The result is that of cutting and counting tokens one cut at a time, but cuts that are more
        than 32 tokens over the limit by the whole prompt's own tokens are passed without counting.
    """
    ends = token_ends(prompt)
    if len(ends) <= max_tokens:
        return prompt
    post = parse_prompt(prompt)
    if post is None:
        return None
    head = len(_head(post))
    after_post = len(ends) - bisect_right(ends, head + len(post.post))
    for cut in _cuts(post.post):
        if not post.post[:cut].strip():
            return None
        if bisect_right(ends, head + cut) + after_post > max_tokens + _SLACK_TOKENS:
            continue
        shorter = format_prompt(post._replace(post=post.post[:cut]))
        if len(token_ends(shorter)) <= max_tokens:
            return shorter
    return None


def normalize_completion(text: str) -> str:
    """Gives a completion exactly one leading blank; idempotent."""
    return " " + text.lstrip(" ")


def format_hash() -> str:
    """Hash of the conventions: where a row gets another text, it is another."""
    sample = VERSION, format_prompt(Post("subreddit", "title", "post")), normalize_completion("end")
    return hashlib.sha256(repr(sample).encode()).hexdigest()[:16]


def post_fraction(prompt: str) -> float:
    """Returns a number in [0, 1) that depends on the post only, not on its schema or a cut end.

    Hashed are subreddit and title, blanks and newlines collapsed, because copies of a post differ
    in those and in where the post was cut. Other prompts: the whole.
    """
    post = parse_prompt(prompt)
    text = _collapse(prompt if post is None else f"{post.subreddit} {post.title}")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _head(post: Post) -> str:
    return f"SUBREDDIT: r/{post.subreddit}\n\nTITLE: {post.title}\n\nPOST: "


def _cuts(text: str) -> Iterator[int]:
    """Lengths of the successive cuts of a text: at its last newline, else one character less."""
    end = len(text)
    while (newline := text.rfind("\n", 0, end)) != -1:
        end = newline
        yield end
    yield from range(end - 1, 0, -1)


def _collapse(text: str) -> str:
    return " ".join(text.split())
