"""The matrix: its sections by name."""

from tests.bad_inputs import (
    model_folders,
    programs,
    reward_functions,
    row_faults,
    run_folders,
    scored_folders,
    setting_faults,
    tokenizer_folders,
)

SECTIONS = {
    "settings": setting_faults.CASES,
    "rows": row_faults.CASES,
    "models": model_folders.CASES,
    "tokenizers": tokenizer_folders.CASES,
    "rewards": reward_functions.CASES,
    "scored": scored_folders.CASES,
    "folders": run_folders.CASES,
    "programs": programs.CASES,
}
