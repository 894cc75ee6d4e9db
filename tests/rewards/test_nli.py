"""Entailment: its numbers are the model's, on a tiny checkpoint that is made here."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from copg_jax.errors import InputError
from copg_jax.rewards import Missing, entailment
from copg_jax.rewards.protocol import score_texts
from tests.toys import names_all

LABELS = {0: "contradiction", 1: "Entailment", 2: "neutral"}
WORDS = "the cat sat on a mat dog ran ."
LIMIT = 16


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"library torch.*pip install 'copg_jax\[nli\]'"):
        entailment("no/such/folder", "post")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random BERT with three labels."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("nli")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()]
    plain = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=plain, **{f"{name}_token": text for name, text in special.items()}
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LIMIT,
        initializer_range=0.4,
        id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


PREMISES = ["the cat sat on a mat .", "a dog ran .", "the cat ran .", None]
TEXTS = ["a cat sat .", "the dog sat on the mat .", "", "a cat"]


def expected(checkpoint: Path, premise: str, text: str) -> float:
    """By the library alone, a pair at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    pair = AutoTokenizer.from_pretrained(checkpoint)(premise, text, return_tensors="pt")
    with torch.no_grad():
        return model(**pair).logits.softmax(-1)[0, 1].item()


@pytest.mark.oracle("torch")
@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_reward_is_the_probability_of_entailment_of_the_completion_by_the_premise(
    checkpoint, batch_size
):
    function = entailment(str(checkpoint), "post", batch_size=batch_size)
    got = function(["p"] * 4, TEXTS, post=PREMISES, other=[0] * 4)
    wanted = [expected(checkpoint, a, b) for a, b in zip(PREMISES[:3], TEXTS, strict=False)]
    assert got[:3] == pytest.approx(wanted, abs=1e-6)
    assert got[3] == Missing("no_premise")
    assert max(wanted) - min(wanted) > 0.01
    swapped = expected(checkpoint, TEXTS[0], PREMISES[0])
    assert abs(swapped - wanted[0]) > 1e-3  # premise and hypothesis are not the same


@pytest.mark.oracle("torch")
def test_the_prompt_may_be_the_premise_and_both_may_be_messages(checkpoint):
    said = lambda text, role: [{"role": role, "content": text}]
    prompts = [PREMISES[0], said(PREMISES[0], "user")]
    texts = [TEXTS[0], said(TEXTS[0], "assistant")]
    got = entailment(str(checkpoint), "prompt")(prompts, texts)
    assert got == pytest.approx([expected(checkpoint, PREMISES[0], TEXTS[0])] * 2, abs=1e-6)


@pytest.mark.oracle("torch")
def test_a_long_premise_is_cut_at_its_end_and_counted_and_a_long_completion_has_no_reward(
    checkpoint, caplog
):
    function = entailment(str(checkpoint), "post")
    long, text = "the cat sat on a mat " * 4, "a dog ran ."
    with caplog.at_level(logging.WARNING):
        got = function(["p"] * 3, [text, text, long], post=[long, long, "a dog"])
    kept = " ".join(long.split()[: LIMIT - 3 - len(text.split())])
    assert got[:2] == pytest.approx([expected(checkpoint, kept, text)] * 2, abs=1e-6)
    assert got[2] == Missing("too_long")
    names_all(caplog.text, ["1 of 1 premises so far cut", "2 of 2", f"to {LIMIT} tokens"])


@pytest.mark.oracle("torch")
@pytest.mark.parametrize(
    "labels", [{0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, {0: "x", 1: "not_entailment", 2: "y"}]
)
def test_a_checkpoint_without_entailment_is_refused_with_its_labels(checkpoint, tmp_path, labels):
    shutil.copytree(checkpoint, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        entailment(str(tmp_path / "m"), "post")
    names_all(str(caught.value), [str(tmp_path / "m"), "'entailment'", labels[1], "Fix"])


@pytest.mark.oracle("torch")
def test_a_checkpoint_or_a_column_that_is_not_there_is_named(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"no/such.*wanted a checkpoint"):
        entailment(str(tmp_path / "no/such"), "post")
    with pytest.raises(InputError, match=r"wanted the column 'post', got .*\['text'\]"):
        score_texts(entailment(str(checkpoint), "post"), ["p"], ["c"], {"text": ["a"]}, name="e")
    with pytest.raises(InputError, match="batch_size: wanted a whole number"):
        entailment(str(checkpoint), "post", batch_size=0)


@pytest.mark.oracle("torch")
def test_its_fingerprint_is_that_of_the_weights_and_not_of_the_folder(checkpoint, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    def fingerprint(folder: Path, **arguments: Any) -> str:
        return vars(entailment(str(folder), "post", **arguments))["fingerprint"]

    moved = shutil.copytree(checkpoint, tmp_path / "m")
    first = fingerprint(checkpoint)
    assert first == fingerprint(moved)
    assert first != fingerprint(moved, max_tokens=9)
    tensors = load_file(moved / "model.safetensors")
    save_file(tensors | {"classifier.bias": torch.ones(3)}, moved / "model.safetensors")
    assert first != fingerprint(moved)
