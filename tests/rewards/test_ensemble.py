"""Several reward models as one: low where they disagree."""

from typing import Any

import pytest

from copg_jax.errors import InputError
from copg_jax.rewards import RewardEnsemble, ensemble

SCORES = {"a": [1.0, 2.0, None], "b": [3.0, 2.0, 5.0], "c": [5.0, 2.0, 6.0]}


class Judge:
    """A reward model that says what was written down."""

    def __init__(self, path: str, **options: Any) -> None:
        self.path, self.options = path, options
        self.fingerprint = f"hash of {path}"

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return SCORES[self.path]


@pytest.fixture(autouse=True)
def judges(monkeypatch):
    monkeypatch.setattr(ensemble, "RewardModel", Judge)


def test_it_is_the_mean_less_c_standard_deviations_and_nothing_where_one_has_nothing():
    found = RewardEnsemble(["a", "b", "c"], penalty=0.5)([""] * 3, [""] * 3)
    # 1, 3, 5: mean 3, variance 8 / 3.
    assert found == [pytest.approx(3.0 - 0.5 * (8 / 3) ** 0.5), 2.0, None]
    assert RewardEnsemble(["a", "b"], penalty=0.0)([""] * 3, [""] * 3)[:2] == [2.0, 2.0]


def test_constants_of_the_models_are_no_disagreement():
    found = RewardEnsemble(["b", "c"], penalty=2.0, zeros=[1.0, 3.0])([""] * 3, [""] * 3)
    assert found[0] == pytest.approx(2.0)  # 3 − 1 and 5 − 3
    assert found[1] == pytest.approx(0.0 - 2.0)  # 1 and −1 from their zeros: mean 0, s.d. 1


def test_it_is_known_by_all_of_its_models_and_gives_them_its_options():
    found = RewardEnsemble(["a", "b"], batch_size=4)
    assert "hash of a" in found.fingerprint and "hash of b" in found.fingerprint
    assert [model.options for model in found._models] == [{"batch_size": 4}] * 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"paths": ["a"]}, "paths: wanted two or more different folders"),
        ({"paths": ["a", "a"]}, "paths: wanted two or more different folders"),
        ({"paths": "ab"}, "paths: wanted two or more different folders"),
        ({"paths": ["a", "b"], "penalty": -1.0}, "penalty: wanted a number >= 0"),
        ({"paths": ["a", "b"], "zeros": [1.0]}, "zeros: wanted one for each of 2 paths, got 1"),
    ],
)
def test_what_is_no_ensemble_is_refused(arguments, text):
    with pytest.raises(InputError, match=text):
        RewardEnsemble(**arguments)
