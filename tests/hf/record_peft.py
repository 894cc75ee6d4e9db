"""Record what `peft` makes of PEFT folders: `python -m tests.hf.record_peft`.

torch runs the tiny checkpoints of tests/models/tiny.py with the random adapters of
tests/peft_folders.py; the results go to tests/hf/golden_peft.npz.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from copg_jax.hf import weights
from tests import peft_folders
from tests.models import record_golden, tiny

FILE = Path(__file__).with_name("golden_peft.npz")
KINDS = ("llama3", "mistral", "qwen2", "qwen3", "smollm3")  # of each family one
RANK, ALPHA = 3, 4.0
PROMPT = record_golden.PROMPT


def write(folder: Path, kind: str, head: str) -> tuple[Path, Path]:
    """Writes a language model and an adapter of it, with a score head for "score"."""
    base = tiny.write_checkpoint(folder / "base", kind)
    arch = weights.read_architecture(base)
    more = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    fields = peft_folders.config(RANK, ALPHA, **(more if head == "score" else {}))
    values = peft_folders.tensors(arch, RANK, score=head == "score")
    return base, peft_folders.write_folder(folder / f"adapter_{head}", fields, values)


def load(base: Path, head: str) -> Any:
    """The torch model of a folder."""
    import transformers

    if head == "lm":
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_pretrained(base, attn_implementation="eager")
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(base, num_labels=1, pad_token_id=tiny.PAD)


def logits(model: Any) -> np.ndarray:
    """Of a language model [3, 14, V]."""
    import torch

    ids = torch.tensor(record_golden.inputs()[0], dtype=torch.long)
    with torch.no_grad():
        return model.eval()(ids).logits.numpy()


def rewards(model: Any) -> np.ndarray:
    """Of a sequence classifier [3]."""
    import torch

    tokens, lengths = record_golden.inputs()
    rows = torch.tensor(record_golden.padded(tokens, lengths), dtype=torch.long)
    mask = torch.arange(rows.shape[1])[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        return model.eval()(rows, attention_mask=mask.long()).logits[:, 0].numpy()


def record(kind: str, folder: Path) -> dict[str, np.ndarray]:
    """What peft gives for one kind: logits [3, 14, V] and rewards [3], by name."""
    from peft import PeftModel

    found = {}
    for head, measure in (("lm", logits), ("score", rewards)):
        base, adapter = write(folder, kind, head)
        found[f"{kind}/{head}"] = measure(PeftModel.from_pretrained(load(base, head), adapter))
    return found


if __name__ == "__main__":
    arrays = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            arrays |= record(kind, Path(temporary))
    np.savez_compressed(FILE, **arrays)
