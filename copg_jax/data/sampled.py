"""The folder of samples: parts with the rows of `scored_rows`, and `sampled.json`.

1. `write_samples` writes groups with their ids, texts, ends, origins and ln µ, see `parts`.
2. `save_sampled` says beside them, in `sampled.json`, what drew them; `whole_samples` are finished.
3. `verify_sampled` refuses samples of another tokenizer or text format, and half-sampled folders.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from etils import epath

from copg_jax.checksums import read_record, write_record
from copg_jax.data import parts
from copg_jax.data.groups import TokenGroup
from copg_jax.data.scored_rows import FORMAT, make_sampled_row
from copg_jax.data.sources import SAMPLES
from copg_jax.errors import InputError
from copg_jax.files import bucket_errors


@dataclass(frozen=True)
class Sampled:
    """What decides samples; written as `sampled.json`."""

    tokenizer_hash: str
    text_format: str
    text_format_hash: str
    model_hash: str
    model_dtype: str
    sampling: dict[str, Any]  # numbers of the SamplingConfig
    limits: dict[str, Any]
    complete: bool
    counts: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)  # finished ones: name → checksum
    format: int = FORMAT

    @property
    def is_whole_model(self) -> bool:
        """Whether µ is the model itself: temperature 1, and nothing cut off."""
        return self.sampling["temperature"] == 1 and not (
            self.sampling["top_k"] or self.sampling["top_p"]
        )


def write_samples(
    folder: epath.Path, index: int, groups: Sequence[TokenGroup], key: str
) -> dict[str, str]:
    """Writes one part, at once or not at all, and returns its name with its checksum.

    Raises:
        InputError: ln µ that is not finite.
    """
    return parts.write_rows(folder, index, [make_sampled_row(group) for group in groups], key)


def whole_samples(folder: epath.Path, key: str) -> dict[str, str]:
    """`parts.find_whole` of a folder of samples, finished or not.

    Raises:
        InputError: the side-car or a part cannot be read.
    """
    named = read_sampled(folder).parts if is_sampled(str(folder)) else {}
    return parts.find_whole(folder, named, key)


def is_sampled(path: str) -> bool:
    """Whether `path` is a folder that the sample stage wrote."""
    with bucket_errors(path):
        return (epath.Path(path) / SAMPLES).exists()


def is_sampled_to_its_end(folder: epath.Path) -> bool:
    """Whether a folder is complete, and its parts are as they were written.

    Raises:
        InputError: a part that is not of it, that is damaged, or that cannot be read.
    """
    if not is_sampled(str(folder)):
        return False
    sampled = read_sampled(folder)
    if sampled.complete:  # else a part may have been written that the side-car does not name yet
        check_samples(folder, sampled)
    return sampled.complete


def save_sampled(folder: epath.Path, sampled: Sampled) -> None:
    """Writes the side-car, in place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    named = dict(sorted(sampled.parts.items()))
    write_record(folder / SAMPLES, asdict(sampled) | {"parts": named})


def read_sampled(folder: epath.Path) -> Sampled:
    """Reads the side-car of a folder of samples.

    Raises:
        InputError: none there, damaged, or not one of this format.
    """
    path = folder / SAMPLES
    names = [item.name for item in fields(Sampled)]
    fix = "Fix: correct the path; or delete this file and run the same sample command again."
    values = read_record(path, wanted=names, fix=fix)
    if values["format"] != FORMAT:
        raise InputError(
            f"{path}: wanted samples of format {FORMAT}, got format {values['format']}. Sample "
            "again."
        )
    return Sampled(**{name: values[name] for name in names})


def check_samples(folder: epath.Path, sampled: Sampled) -> None:
    """Raises InputError unless the parts are those that the side-car names, as they were
    written.
    """
    fix = "Fix: run the same sample command again, which does this part alone anew."
    parts.check_named(folder, sampled.parts, SAMPLES, fix=fix)


def verify_sampled(folder: epath.Path, *, tokenizer_hash: str, text_format_hash: str) -> None:
    """Raises InputError unless samples are complete, as they were written, and of this tokenizer
    and text format.
    """
    sampled, path = read_sampled(folder), folder / SAMPLES
    if not sampled.complete:
        raise InputError(
            f"{path}: sampling was interrupted after {len(sampled.parts)} parts. Run the same "
            "sample command again to finish it."
        )
    found = {"tokenizer_hash": tokenizer_hash, "text_format_hash": text_format_hash}
    for name, got in found.items():
        if (wanted := getattr(sampled, name)) != got:
            raise InputError(
                f"{path}: field '{name}': sampled with {wanted}, but this run has {got}: the token "
                "ids, or prompts, would mean something else. Take a model with the sampler's "
                "tokenizer, or sample again."
            )
    check_samples(folder, sampled)
