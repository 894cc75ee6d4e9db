"""The model card of an exported folder: what the model is, and how it was made.

A card is for people, who may correct it: no checksum of the folder is over it.
"""

from collections.abc import Mapping, Sequence

import yaml
from etils import epath

from copg_jax.files import write_text

CARD_NAME = "README.md"

_HEADS = {
    "lm": "A causal language model",
    "score": "A reward model: the score of its last token is the reward of a completion",
}


def model_card(
    head: str,
    *,
    is_adapter: bool = False,
    base: str | None = None,
    settings: str = "",
    data: Mapping[str, str] | None = None,
    metrics: Sequence[tuple[str, float]] = (),
) -> str:
    """README.md of a model, in the form of the Hugging Face hub.

    Args:
        head: "lm" or "score".
        is_adapter: a PEFT folder, in place of a whole model.
        base: the model that it was trained from.
        settings: resolved config of the run, as YAML.
        data: name of a data set → what it was.
        metrics: names and values, as last measured.
    """
    library = "peft" if is_adapter else "transformers"
    front: dict[str, object] = {"library_name": library, "tags": ["copg_jax"]}
    what = f"The LoRA adapter of {_HEADS[head][0].lower()}{_HEADS[head][1:]}"
    parts = [f"{what if is_adapter else _HEADS[head]}, exported by copg_jax in float32."]
    if base is not None:
        front["base_model"] = base
        parts[0] += f" It was trained from `{base}`."
    if metrics:
        rows = [f"| {name} | {value:.6g} |" for name, value in metrics]
        parts.append("\n".join(["## Metrics", "", "| metric | value |", "|---|---|", *rows]))
    if data:
        rows = [f"- {name}: {text}" for name, text in data.items()]
        parts.append("\n".join(["## Data", "", *rows]))
    if settings:
        parts.append(f"## Settings\n\n```yaml\n{settings.rstrip()}\n```")
    head_text = yaml.safe_dump(front, sort_keys=False)
    return f"---\n{head_text}---\n\n# Model card\n\n" + "\n\n".join(parts) + "\n"


def add_to_card(folder: epath.PathLike, title: str, text: str) -> None:
    """Puts a section at the end of the card of an exported folder, in place of an earlier one of
    this title.
    """
    path = epath.Path(folder) / CARD_NAME
    before, _, old = path.read_bytes().decode().partition(f"\n## {title}\n")
    _, is_more, after = old.partition("\n## ")
    kept = f"{before.rstrip()}\n\n## {after}" if is_more else before
    write_text(path, f"{kept.rstrip()}\n\n## {title}\n\n{text.strip()}\n")
