"""The matrix: its sections by name, and what is claimed of each case."""

from pathlib import Path
from typing import Any

import pytest

from copg_jax.errors import InputError
from tests.bad_inputs import (
    adapter_folders,
    model_folders,
    programs,
    reward_functions,
    row_faults,
    run_folders,
    scored_folders,
    setting_faults,
    tokenizer_folders,
)
from tests.bad_inputs.ground import Case, Ground

SECTIONS = {
    "settings": setting_faults.CASES,
    "rows": row_faults.CASES,
    "models": model_folders.CASES,
    "adapters": adapter_folders.CASES,
    "tokenizers": tokenizer_folders.CASES,
    "rewards": reward_functions.CASES,
    "scored": scored_folders.CASES,
    "folders": run_folders.CASES,
    "programs": programs.CASES,
}


def params(*sections: str) -> list[Any]:
    """The cases of sections as parameters of a test."""
    return [
        pytest.param(case, id=f"{section}: {case.name}")
        for section in sections
        for case in SECTIONS[section]
    ]


def refusal(case: Case, ground: Ground, here: Path) -> tuple[str, list[str]]:
    """The text of the error that a case ends in, and those of its words that the text lacks."""
    with pytest.raises(InputError) as caught:
        case.act(ground, here)
    text = str(caught.value)
    return text, [word for word in case.words if word.replace("HERE", str(here)) not in text]
