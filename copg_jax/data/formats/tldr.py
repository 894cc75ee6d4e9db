"""The TL;DR prompt: its exact text, how it is parsed back, and how a long post is cut.

1. `format_prompt` writes `SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:`, with no trailing blank.
2. `parse_prompt` finds the post in a prompt that another tool wrote, so that it can be cut too.
3. `truncate_prompt` cuts the post, never the frame around it, until the prompt is short enough.
4. `Tldr` is the format with these conventions.
5. `post_fraction` places a post in [0, 1) by a hash: a split in which no post is on both sides.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from copg_jax.data.formats.texts import TextFormat, TextGroup, content
from copg_jax.data.rows import InvalidRow

VERSION = 2  # counted up with every change by which a row gets another text
NEWS = "CNN/DM article, not a TL;DR post (data.format=text would keep a prompt like this)"

_SUFFIX = "\n\nTL;DR:"
# The ends of both frames are taken off before, lest an expression try every place for them.
_OPENAI = re.compile(r"SUBREDDIT: r/([^\n]*)\n\nTITLE: (.*?)\n\nPOST: (.*)", re.DOTALL)
# CarperAI's copies: single newlines, a trailing blank or no "TL;DR:" at all.
_CARPER = re.compile(r"SUBREDDIT: r/([^\n]*)\nTITLE: (.*?)\nPOST: (.*)", re.DOTALL)
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
    text = prompt.rstrip()
    # The last "TL;DR:" is the frame's own, so that parsing undoes formatting exactly.
    if text.endswith(_SUFFIX) and (match := _OPENAI.fullmatch(text.removesuffix(_SUFFIX))):
        return Post(*match.groups())
    if match := _CARPER.fullmatch(prompt):
        subreddit, title, post = match.groups()
        return Post(subreddit, title, post.rstrip().removesuffix("\nTL;DR:"))
    return None


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
    parsed = parse_prompt(prompt)
    if parsed is None:
        return None
    post, head = parsed.post, len(_head(parsed))
    after_post = len(ends) - bisect_right(ends, head + len(post))
    few_enough = max_tokens + _SLACK_TOKENS - after_post
    if few_enough < 0:
        return None
    most = ends[few_enough] - head - 1 if few_enough < len(ends) else len(post)
    for cut in _cuts(post, most):
        shorter = format_prompt(parsed._replace(post=post[:cut]))
        if len(token_ends(shorter)) <= max_tokens:
            return shorter
    return None


def normalize_completion(text: str) -> str:
    """Gives a completion exactly one leading blank; idempotent."""
    return " " + text.lstrip(" ")


class Tldr(TextFormat):
    """Prompts in the frame of TL;DR, completions with one leading blank."""

    name = "tldr"

    @property
    def hash(self) -> str:
        """See `TextFormat`."""
        post = Post("subreddit", "title", "post")
        sample = VERSION, format_prompt(post), normalize_completion("end")
        return hashlib.sha256(repr(sample).encode()).hexdigest()[:16]

    def recognises(self, group: TextGroup) -> bool:
        """Posts, and the news articles that lie among them in TRL's copies."""
        prompt = group.prompt
        if not isinstance(prompt, str):
            return False
        return group.is_framed or parse_prompt(prompt) is not None or is_news_prompt(prompt)

    def render(self, group: TextGroup) -> TextGroup | str:
        """One frame however it was written; news articles are left out.

        Raises:
            InvalidRow: the post is empty.
        """
        prompt, columns = group.prompt, group.columns
        assert isinstance(prompt, str)
        if is_news_prompt(prompt):
            return NEWS
        texts = tuple(map(content, group.completions))
        post = parse_prompt(prompt)
        if post is not None:
            if not post.post.strip():
                detail = "the post is empty: wanted text to summarise."
                raise InvalidRow(group.where, "empty post", detail)
            if prompt != format_prompt(post):
                # CarperAI's texts begin with the frame's own "TL;DR:", which our prompt ends with.
                texts = tuple(text.removeprefix("TL;DR:") for text in texts)
            prompt = format_prompt(post)
            columns = {"subreddit": post.subreddit, "title": post.title} | columns
        return replace(
            group,
            prompt=prompt,
            completions=tuple(map(normalize_completion, texts)),
            columns=columns,
            format=self.name,
        )

    def cut(
        self, prompt: str, token_ends: Callable[[str], Sequence[int]], max_tokens: int
    ) -> str | None:
        """See `truncate_prompt`."""
        return truncate_prompt(prompt, token_ends, max_tokens)


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


def _cuts(text: str, most: int) -> Iterator[int]:
    """Lengths of the successive cuts of a text, from `most` down: at its last newline, or one
    character less where it has none, as long as more than blanks is left.
    """
    least = len(text) - len(text.lstrip()) + 1
    first_newline = text.find("\n", least)
    end = min(most + 1, len(text))
    while (newline := text.rfind("\n", least, end)) != -1:
        end = newline
        yield end
    if "\n" not in text[:least]:
        line_end = len(text) if first_newline == -1 else first_newline
        yield from range(min(line_end - 1, most), least - 1, -1)


def _collapse(text: str) -> str:
    return " ".join(text.split())
