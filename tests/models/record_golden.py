"""Record what the Hugging Face torch models give: `python -m tests.models.record_golden`.

1. The tiny checkpoints of tests/models/tiny.py are written to a temporary folder.
2. torch runs them on fixed ids; the results go to tests/models/golden/<kind>.npz.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.models import tiny

FOLDER = Path(__file__).with_name("golden")


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


def record(kind: str, folder: Path) -> dict[str, np.ndarray]:
    """Logits [3, 14, V] and rewards [3] of one kind, by torch."""
    import torch
    import transformers

    tokens, lengths = inputs()
    lm_folder = tiny.write_checkpoint(folder / "lm", kind)
    rm_folder = tiny.write_checkpoint(folder / "score", kind, "score")
    lm = transformers.LlamaForCausalLM.from_pretrained(lm_folder, attn_implementation="eager")
    rm = transformers.LlamaForSequenceClassification.from_pretrained(rm_folder)
    with torch.no_grad():
        logits = lm(torch.tensor(tokens, dtype=torch.long)).logits
        rows = torch.tensor(padded(tokens, lengths), dtype=torch.long)
        mask = torch.arange(rows.shape[1])[None] < torch.tensor(lengths)[:, None]
        rewards = rm(rows, attention_mask=mask.long()).logits[:, 0]
    return {"logits": logits.numpy(), "rewards": rewards.numpy()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for kind in tiny.KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            np.savez_compressed(FOLDER / f"{kind}.npz", **record(kind, Path(temporary)))
