"""Model cards: what they say of adapters and sources, and that people may correct them."""

from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from copg_jax import checksums
from copg_jax.config.policy_data import PolicyDataConfig, SourceSpec
from copg_jax.config.sections import ModelConfig
from copg_jax.config.stages import PolicyConfig, TrainConfig
from copg_jax.data.group_list import GroupList
from copg_jax.hf import adapters, weights
from copg_jax.hf.card import CARD_NAME, add_to_card, model_card
from copg_jax.models.params import init_params
from copg_jax.train.run_card import run_card
from copg_jax.train.stored import StoredFeed
from tests.models import tiny
from tests.toys import LLAMA


class Groups(GroupList):
    """Data of which a card says the size and the fingerprint."""

    def __init__(self, groups: list[Any]) -> None:
        super().__init__(groups, "0123456789abcdef", {})


def model_folder(folder: Path) -> None:
    params = init_params(LLAMA, jax.random.key(0))
    weights.save_pretrained(folder, LLAMA, params, head="lm", tokenizer=tiny.tokenizer())


def adapter_folder(folder: Path) -> None:
    adapters.save_adapter(folder, {}, {}, base_hash="x", card=model_card("lm", is_adapter=True))


@pytest.mark.parametrize("write", [model_folder, adapter_folder])
def test_every_export_has_a_card_that_may_be_corrected(tmp_path, write):
    folder = tmp_path / "it"
    write(folder)
    card = folder / CARD_NAME
    card.write_text(card.read_text() + "\nBy hand.\n")
    add_to_card(folder, "The study that it is of", "| table |")
    add_to_card(folder, "The study that it is of", "| newer |")
    assert card.read_text().endswith("By hand.\n\n## The study that it is of\n\n| newer |\n")
    add_to_card(folder, "Another group", "| other |")
    add_to_card(folder, "The study that it is of", "| newest |")
    assert card.read_text().endswith(
        "By hand.\n\n## Another group\n\n| other |\n\n## The study that it is of\n\n| newest |\n"
    )
    checksums.check(folder, fix="")
    write(folder)  # an older export is replaced, its card too
    assert "By hand." not in card.read_text()


def test_the_card_of_an_adapter_names_its_library_base_settings_and_data(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), model=ModelConfig("base"))
    data = StoredFeed(config, Groups([1, 2]), None).card
    text = run_card(config, "lm", data, 3, is_adapter=True)
    front = yaml.safe_load(text.split("---")[1])
    assert (front["library_name"], front["base_model"]) == ("peft", "base")
    assert "The LoRA adapter of a causal language model" in text
    assert "## Settings" in text and "| step | 3 |" in text and "2 groups" in text


def test_a_card_names_every_source_of_the_data(tmp_path):
    sources = [SourceSpec("a", 0.25), SourceSpec("b", 0.75)]
    config = PolicyConfig(
        output_dir=str(tmp_path),
        model=ModelConfig("base"),
        data=PolicyDataConfig(path=None, sources=sources),
    )
    text = run_card(config, "lm", StoredFeed(config, Groups([1]), None).card, 1)
    assert "- train: `a` (share 0.25) and `b` (share 0.75), 1 groups, fingerprint 0123" in text
    assert "`None`" not in text
