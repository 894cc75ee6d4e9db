"""Every bad setting, row, folder and argument is refused by an error that names its file, line or
field.
"""

import pytest

from tests.bad_inputs.ground import Case
from tests.bad_inputs.table import SECTIONS, params, refusal


@pytest.mark.parametrize("case", params("settings", "rows", "scored", "folders", "programs"))
def test_a_bad_setting_row_or_folder_is_named(case: Case, ground, tmp_path):
    text, missing = refusal(case, ground, tmp_path)
    assert missing == [], text
    assert "Traceback" not in text


def test_no_two_cases_have_the_same_name_and_there_are_enough():
    names = [param.id for param in params(*SECTIONS)]
    assert len(set(names)) == len(names) >= 500
