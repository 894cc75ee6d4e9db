"""The README and docs/*.md: their blocks of code, commands, and names in the text."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Command(NamedTuple):
    """A line of a bash block, its comment left out."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"

    def after(self, module: str) -> list[str] | None:
        """The arguments of `experiments.NAME`, whatever launches it; None for another command."""
        words = list(self.words)
        return words[words.index(module) + 1 :] if module in words else None


def read(page: Path) -> str:
    """The text of a page."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [text for name, text in _BLOCK.findall(read(page)) if name == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", read(page))


def inline_code(page: Path) -> list[str]:
    """What stands in single backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def headings(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    texts = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def commands() -> list[Command]:
    """Every command that a reader is told to type."""
    found = []
    for page in PAGES:
        lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        for line in lines:
            if words := shlex.split(line, comments=True):
                found.append(Command(page.name, tuple(words)))
    return found


def write_files(page: Path, folder: Path) -> None:
    """Writes the blocks that begin with `# NAME.py` or `# NAME.yaml`."""
    for text in blocks(page, "yaml") + blocks(page, "python"):
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            (folder / name[1]).write_text(text, encoding="utf-8")


def examples(page: Path) -> list[str]:
    """The Python blocks that are no file: neither the reader's nor the package's."""
    return [text for text in blocks(page, "python") if not re.match(r"# [\w/]+\.py\b", text)]
