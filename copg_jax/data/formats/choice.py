"""Which format the texts of a data set are in: the one that is named, or that of its first row."""

from copg_jax.data.formats.texts import TextFormat, TextGroup
from copg_jax.data.formats.tldr import Tldr
from copg_jax.data.formats.verbatim import Verbatim
from copg_jax.data.rows import InvalidRow

# The first that recognises a row wins: the more particular ones come first.
FORMATS: dict[str, TextFormat] = {format.name: format for format in (Tldr(), Verbatim())}


def own_format(group: TextGroup) -> TextFormat:
    """The format that the texts of a row, as they are given, say they are in."""
    return next(format for format in FORMATS.values() if format.recognises(group))


class FormatChoice:
    """Gives the rows of a data set one format.

    Args:
        name: of the format; "auto" for that of the first row that can be used.
    """

    def __init__(self, name: str) -> None:
        self.chosen = FORMATS.get(name)
        self._first = ""  # where the row stands that has decided

    def render(self, group: TextGroup) -> TextGroup | str:
        """The group in the format of the data set, or the reason why its row is left out.

        Raises:
            InvalidRow: its texts are in another format, empty or the same.
        """
        own = own_format(group)
        format = self.chosen or own
        self._check(group, own)
        rendered = format.render(group)
        if isinstance(rendered, TextGroup):
            _check_texts(rendered)
        if self.chosen is None:
            self.chosen, self._first = format, group.where
        return rendered

    def _check(self, group: TextGroup, own: TextFormat) -> None:
        """Raises InvalidRow where a row is not in the format that is named, or was first."""
        chosen = self.chosen
        if chosen is None or chosen is own:
            return
        if self._first:
            detail = (
                f"the text is in the format '{own.name}', but the row at {self._first}, which was "
                f"first, in '{chosen.name}': a data set has one. Let data.path name the files of "
                "one, or set data.format=text, which takes every prompt as it is."
            )
        elif not chosen.recognises(group):
            detail = (
                f"the text is not in the format '{chosen.name}' (data.format). Set "
                f"data.format={own.name}."
            )
        else:
            return
        raise InvalidRow(group.where, f"not in the format '{chosen.name}'", detail)


def _check_texts(group: TextGroup) -> None:
    where = group.where
    for index, text in enumerate(group.completions):
        if not text.strip():
            raise InvalidRow(
                where, "empty completion", f"completion {index} is empty: wanted text."
            )
    if len(group.completions) > 1 and len(set(group.completions)) == 1:
        raise InvalidRow(
            where,
            "identical completions",
            f"all {len(group.completions)} completions are the same text, so nothing tells them "
            "apart.",
        )
