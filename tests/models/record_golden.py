"""Record what the Hugging Face torch models give: `python -m tests.models.record_golden`.

1. The tiny checkpoints of tests/models/tiny.py are written to a temporary folder.
2. torch runs them on fixed ids; the results go to tests/models/golden/<kind>.npz.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import tiny

FOLDER = Path(__file__).with_name("golden")
PROMPT = 5  # ids of a prompt; what follows is the completion
NEW_TOKENS = 6
BETWEEN_PROCESSORS = 5e-5  # as far as torch itself was seen from what it gave on another one, 3e-5


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Ids [3, 14] without special ones, and the lengths [3] that the reward model sees."""
    tokens = np.random.RandomState(7).randint(3, tiny.VOCAB, (3, 14)).astype(np.int32)
    return tokens, np.array([14, 9, 6], np.int32)


def padded(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Right-padded ids whose last valid one is EOS (1)."""
    rows = tokens.copy()
    for row, length in zip(rows, lengths, strict=True):
        row[length - 1], row[length:] = 1, tiny.PAD
    return rows


def sketch(gradients: Mapping[str, np.ndarray]) -> np.ndarray:
    """Four random projections of each tensor of a gradient, in the order of their names: [n, 4]."""
    return np.stack(
        [
            np.random.RandomState(3).standard_normal((4, value.size)) @ value.ravel()
            for _, value in sorted(gradients.items())
        ]
    )


def record(kind: str, folder: Path) -> dict[str, np.ndarray]:
    """What torch gives for one kind.

    Returns:
        logits: [3, 14, V].
        logp: ln π of each completion, [3]; lengths are those of `inputs`.
        gradients: `sketch` of the gradient of SFT, the mean of −ln π over completion tokens.
        greedy: the ids that follow the first `lengths` ids of each row, [3, NEW_TOKENS].
        rewards: [3].
    """
    import torch
    import transformers

    tokens, lengths = inputs()
    lm_folder = tiny.write_checkpoint(folder / "lm", kind)
    rm_folder = tiny.write_checkpoint(folder / "score", kind, "score")
    auto: Any = transformers.AutoModelForCausalLM
    lm = auto.from_pretrained(lm_folder, attn_implementation="eager")
    rm = transformers.AutoModelForSequenceClassification.from_pretrained(rm_folder)
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = lm(ids).logits
    logp = torch.log_softmax(logits[:, PROMPT - 1 : -1], -1)
    logp = torch.gather(logp, -1, ids[:, PROMPT:, None])[..., 0]
    in_completion = (
        torch.arange(ids.shape[1] - PROMPT)[None] < torch.tensor(lengths)[:, None] - PROMPT
    )
    logp = torch.where(in_completion, logp, 0.0).sum(-1)
    (-logp.sum() / in_completion.sum()).backward()
    gradients = {name: value.grad.numpy() for name, value in lm.named_parameters()}
    with torch.no_grad():
        rows = torch.tensor(padded(tokens, lengths), dtype=torch.long)
        mask = torch.arange(rows.shape[1])[None] < torch.tensor(lengths)[:, None]
        rewards = rm(rows, attention_mask=mask.long()).logits[:, 0]
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
        greedy = [
            lm.generate(row[None, :length], **options)[0, length:]
            for row, length in zip(ids, lengths.tolist(), strict=True)
        ]
    return {
        "logits": logits.detach().numpy(),
        "logp": logp.detach().numpy(),
        "gradients": sketch(gradients),
        "greedy": torch.stack(greedy).numpy(),
        "rewards": rewards.numpy(),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for kind in tiny.KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            np.savez_compressed(FOLDER / f"{kind}.npz", **record(kind, Path(temporary)))
