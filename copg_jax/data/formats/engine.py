"""What an inference engine such as vLLM says of a row beside its texts: ids, and how each ended.

| field | meaning |
|---|---|
| `prompt_token_ids` | the prompt, as the engine was given it |
| `completion_token_ids` | what it wrote, one list a completion; used as it is |
| `finish_reason` | one a completion: `stop` (it ended) or `length` (it was cut: no end token) |

1. `read_engine` reads them, where a row has any of the last two.
2. `encode_engine` gives the ids of such a row: those that are there; else its texts are tokenised.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from copg_jax.data.rows import InvalidRow, Row
from copg_jax.data.tokenizer import Encoder

ENGINE_FIELDS = ("prompt_token_ids", "completion_token_ids", "finish_reason")
TOKENISED = "completion of an engine without its ids: tokenised from its text"
END_ADDED = "completion that ended without its end token: EOS is added"
_ENDED = {"stop": True, "eos": True, "length": False}


class EngineOutput(NamedTuple):
    """What a row of an engine has beside its texts; None where it does not say."""

    prompt_ids: list[int] | None
    completion_ids: list[list[int]] | None
    has_ended: list[bool] | None


def read_engine(where: str, row: Row, num_completions: int) -> EngineOutput | None:
    """Reads the fields of an engine; None for a row of something else.

    Raises:
        InvalidRow: a field of another shape, an empty completion, or one that neither ended nor was
            cut by the limit.
    """
    if row.get("completion_token_ids") is None and row.get("finish_reason") is None:
        return None
    prompt, completions, reasons = (row.get(name) for name in ENGINE_FIELDS)
    for name in ENGINE_FIELDS[1:]:
        value = row.get(name)
        if value is not None and (not isinstance(value, list) or len(value) != num_completions):
            raise InvalidRow(
                where,
                "engine's field",
                f"field '{name}': wanted a list with one entry for each of {num_completions} "
                f"completions, got {value!r:.60}.",
            )
    if prompt is not None:
        _check_ids(where, "prompt_token_ids", prompt)
    for index, ids in enumerate(completions or []):
        _check_ids(where, f"completion_token_ids[{index}]", ids)
    for index, reason in enumerate(reasons or []):
        if reason not in _ENDED:
            raise InvalidRow(
                where,
                "engine's field",
                f"field 'finish_reason[{index}]': wanted one of {', '.join(_ENDED)}, got "
                f"{reason!r:.60}: the completion was not written to its end.",
            )
    ended = None if reasons is None else [_ENDED[reason] for reason in reasons]
    return EngineOutput(prompt, completions, ended)


def encode_engine(
    engine: EngineOutput,
    encoded: Sequence[Sequence[int]],
    encoder: Encoder,
    where: str,
    counts: Counter[str],
) -> tuple[list[list[int]], list[bool]]:
    """Ids of the completions of an engine, and whether each ended.

    Args:
        engine: of the row.
        encoded: the texts as `Encoder.encode_completions` encodes them, EOS last; asked for where
            the engine gives no ids.
        encoder: gives the end tokens.
        where: file and line of the row.
        counts: increased by what is added or tokenised.

    Raises:
        InvalidRow: an end token where the completion was cut by the limit, or before its end.
    """
    found, ends = [], []
    for index, own in enumerate(
        encoded if engine.completion_ids is None else engine.completion_ids
    ):
        ids = list(own)
        has_end = ids[-1] in encoder.end_ids
        ended = has_end if engine.has_ended is None else engine.has_ended[index]
        if engine.completion_ids is None:
            counts[TOKENISED] += 1
            ids = ids if ended else ids[:-1]
        elif ended and not has_end:
            counts[END_ADDED] += 1
            ids.append(encoder.eos_id)
        if any(end in ids[: len(ids) - ended] for end in encoder.end_ids):
            detail = "before its end" if ended else "though finish_reason is 'length'"
            raise InvalidRow(
                where,
                "end token inside a completion",
                f"field 'completion_token_ids[{index}]' has an end token {detail}: wanted one at "
                "the end of what ended, alone.",
            )
        if not ids:
            raise InvalidRow(where, "empty completion", f"completion {index} has no tokens.")
        found.append(ids)
        ends.append(ended)
    return found, ends


def _check_ids(where: str, name: str, ids: Any) -> None:
    """Raises InvalidRow unless these are one or more token ids."""
    if not isinstance(ids, list) or not ids:
        raise InvalidRow(
            where,
            "empty completion" if ids == [] else "engine's field",
            f"field '{name}': wanted token ids, got {ids!r:.60}.",
        )
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise InvalidRow(
                where, "engine's field", f"field '{name}': {token!r:.40} is no token id."
            )
