"""Several reward models as one reward, which is low where they disagree."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from copg_jax.data.formats.texts import Text
from copg_jax.errors import InputError
from copg_jax.rewards.model import RewardModel


class RewardEnsemble:
    """m − c·s: mean and standard deviation of several reward models, which a policy cannot exploit
    where they disagree (Coste et al. 2023, arXiv 2310.02743, who take the variance).

    Args:
        paths: folders of reward models, two or more.
        penalty: c, in units of the standard deviation; 0 is their mean.
        zeros: of each model, the reward that counts as 0, such as its mean over the scored data: a
            Bradley–Terry reward is defined up to a constant, and constants of their own would look
            like disagreement. None: all 0.
        options: of each `RewardModel`.
    """

    on_accelerator = True

    def __init__(
        self,
        paths: Sequence[str],
        penalty: float = 1.0,
        zeros: Sequence[float] | None = None,
        **options: Any,
    ):
        if isinstance(paths, str) or len(paths) < 2 or len(set(paths)) < len(paths):
            raise InputError(f"paths: wanted two or more different folders, got {paths!r:.120}")
        if not penalty >= 0:
            raise InputError(f"penalty: wanted a number >= 0, got {penalty!r:.80}")
        if zeros is not None and len(zeros) != len(paths):
            raise InputError(f"zeros: wanted one for each of {len(paths)} paths, got {len(zeros)}")
        self._models = [RewardModel(os.path.expanduser(path), **options) for path in paths]
        self._penalty = penalty
        self._zeros = np.zeros(len(paths)) if zeros is None else np.asarray(zeros, float)
        # What they compute with: the numbers are among the arguments of the config.
        self.fingerprint = " ".join(model.fingerprint for model in self._models)

    def __call__(
        self, /, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Scores, reward units, one a completion; None where a model has none."""
        scores = [model(prompts, completions) for model in self._models]
        values = np.array(scores, float) - self._zeros[:, None]  # None becomes NaN
        found = values.mean(0) - self._penalty * values.std(0)
        return [None if np.isnan(value) else float(value) for value in found]
