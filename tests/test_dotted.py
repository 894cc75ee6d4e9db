"""Functions that a user names: whatever their module does on import, the error names the path."""

import pytest

from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import LossConfig
from copg_jax.dotted import find
from copg_jax.errors import InputError
from copg_jax.objective import find_objective
from copg_jax.rewards.functions import load_reward
from copg_jax.rewards.model import RewardModel

MODULES = {
    "exits": "import sys; sys.exit(0)",
    "raises": "{}['key']",
    "lacks_a_name": "def f(): return x\nf()",
    "is_no_python": "def f(:",
    "runs_out": "raise MemoryError",
    "stops": "next(iter([]))",
    "has_a_number": "f = 3",
}


@pytest.fixture(params=MODULES)
def path(request, tmp_path, monkeypatch) -> str:
    name = f"own_{request.param}"
    (tmp_path / f"{name}.py").write_text(MODULES[request.param])
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}.f"


@pytest.mark.parametrize(
    "use",
    [
        lambda path: load_reward(RewardSpec(path)),
        lambda path: load_reward(RewardSpec(path, {"a": 1})),
        lambda path: find_objective(LossConfig(path)),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(path, use):
    with pytest.raises(InputError) as caught:
        use(path)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("path", ["", ".", "..", ".f", "f", "a b.c", "os.", "os..path", "os.none"])
def test_what_is_no_dotted_path_is_refused(path):
    with pytest.raises(InputError, match="wanted the dotted path of a callable"):
        find(path, "loss.name", "a.b")


def test_a_column_called_self_is_a_column(monkeypatch):
    model = RewardModel.__new__(RewardModel)
    monkeypatch.setattr(model, "_forward", lambda groups: [], raising=False)
    assert model(**{"prompts": [], "completions": [], "self": []}) == []
