"""Every bad model, tokenizer and reward function is refused by an error that names its file, line
or field.
"""

import pytest

from tests.bad_inputs.ground import Case
from tests.bad_inputs.table import params, refusal


@pytest.mark.parametrize("case", params("models", "adapters", "tokenizers", "rewards"))
def test_a_bad_model_or_function_is_named(case: Case, ground, tmp_path):
    text, missing = refusal(case, ground, tmp_path)
    assert missing == [], text
    assert "Traceback" not in text
