"""Every bad input of the matrix is refused by an error that names its file, line or field."""

import pytest

from copg_jax.errors import InputError
from tests.bad_inputs.ground import Case
from tests.bad_inputs.table import SECTIONS

CASES = [
    pytest.param(case, id=f"{section}: {case.name}")
    for section, cases in SECTIONS.items()
    for case in cases
]


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_named(case: Case, ground, tmp_path):
    with pytest.raises(InputError) as caught:
        case.act(ground, tmp_path)
    text = str(caught.value)
    missing = [word for word in case.words if word.replace("HERE", str(tmp_path)) not in text]
    assert missing == [], text
    assert "Traceback" not in text


def test_no_two_cases_have_the_same_name_and_there_are_enough():
    names = [param.id for param in CASES]
    assert len(set(names)) == len(names) >= 150
