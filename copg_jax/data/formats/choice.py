"""Which format the texts of a data set are in: the one that is named, or that of its first row."""

from copg_jax.data.formats.chat import Chat
from copg_jax.data.formats.texts import TextFormat, TextGroup, content
from copg_jax.data.formats.tldr import Tldr
from copg_jax.data.formats.verbatim import Verbatim
from copg_jax.data.rows import InvalidRow
from copg_jax.data.tokenizer import Encoder

# The first that recognises a row wins: the more particular ones come first.
FORMATS: dict[str, TextFormat] = {format.name: format for format in (Tldr(), Verbatim(), Chat())}


def own_format(group: TextGroup) -> TextFormat:
    """The format that the texts of a row, as they are given, say they are in."""
    return next(format for format in FORMATS.values() if format.recognises(group))


def text_format_hash(name: str, encoder: Encoder) -> str:
    """Hash of a format's conventions and, where it uses one, of the tokenizer's chat template."""
    if name not in FORMATS:
        return f"no format '{name}'"
    own = FORMATS[name].hash
    return f"{own}-{encoder.template and encoder.template.hash}" if name == Chat.name else own


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
            or_text = ", or set data.format=text, which takes every prompt as it is"
            detail = (
                f"the text is in the format '{own.name}', but the row at {self._first}, which was "
                f"first, in '{chosen.name}': a data set has one. Let data.path name the files of "
                f"one{or_text * (Chat.name not in (own.name, chosen.name))}."
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
    # A model may end at once, and then says so by its ids.
    has_ids = group.engine is not None and group.engine.completion_ids is not None
    for index, text in enumerate(group.completions):
        if not has_ids and not content(text).strip():
            what = "an empty assistant turn" if isinstance(text, list) else "empty"
            detail = f"completion {index} is {what}: wanted text."
            raise InvalidRow(where, "empty completion", detail)
    # What an engine wrote twice, its model may write twice.
    others = group.completions[1:] if group.engine is None else ()
    if others and all(other == group.completions[0] for other in others):
        raise InvalidRow(
            where,
            "identical completions",
            f"all {len(group.completions)} completions are the same text, so nothing tells them "
            "apart.",
        )
