"""Reward functions: any callable ``f(prompts, completions, **columns) -> list[float | None]`` (the
contract of TRL and tunix), named by its dotted path.

1. `load_reward` resolves a spec; with arguments, the path names a factory that is called with them.
2. `score_texts` calls a function, checks what it returns and turns None and NaN into absent
   rewards.
3. Shipped: `rouge_l` against the author's summary, `length`, and `RewardModel`, the Bradley–Terry
   model as one reward function among others. It gives the same number in training evaluation,
   rescoring and generation evaluation, because all of them call it.
"""

import hashlib
import importlib
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from copg_jax import sharding
from copg_jax.cli import option
from copg_jax.data import groups
from copg_jax.data.groups import TokenGroup
from copg_jax.data.prompts import normalize_completion
from copg_jax.data.schemas import InvalidRow, TextGroup
from copg_jax.data.tldr import Limits
from copg_jax.data.tokenizer import Encoder, load_tokenizer
from copg_jax.errors import InputError
from copg_jax.forward import GroupForward, load_frozen
from copg_jax.models import flash, functional, hf_weights
from copg_jax.models.reward import reward as model_reward

RewardFn = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class RewardSpec:
    """One reward function and its share in the total."""

    function: str = option(help="dotted path of the function, e.g. copg_jax.rewards.rouge_l")
    arguments: dict[str, Any] = option(
        {}, "if given, the path names a factory that is called with these and returns the function"
    )
    weight: float = option(1.0, "factor of this reward in the sum")


def load_reward(spec: RewardSpec) -> RewardFn:
    """Resolves a spec to a callable.

    Raises:
        InputError: no such module or attribute, not callable, or arguments that the factory does
            not take.
    """
    module_name, _, name = spec.function.rpartition(".")
    try:
        function: Any = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"reward function {spec.function!r}: wanted the dotted path of a callable, such as "
            f"'copg_jax.rewards.rouge_l' or 'my_module.my_reward' (my_module.py on PYTHONPATH); "
            f"{error}"
        ) from error
    if not spec.arguments:
        if isinstance(function, type) or not callable(function):
            raise InputError(
                f"reward function {spec.function!r} is not a function; a class needs `arguments`"
            )
        return cast(RewardFn, function)
    try:
        return function(**spec.arguments)
    except TypeError as error:
        raise InputError(
            f"reward function {spec.function!r}: arguments do not fit: {error}"
        ) from error


def score_texts(
    function: RewardFn,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    name: str,
) -> np.ndarray:
    """Calls a reward function and checks its answer.

    Args:
        function: the reward function.
        prompts: one a completion; [N].
        completions: [N].
        columns: further fields of the data set, each [N].
        name: the function's name, for messages.

    Returns:
        float64 [N]; None becomes NaN, which marks the completion as to be dropped.

    Raises:
        InputError: columns that do not fit the function, another number of rewards than
            completions, an infinite one, or something that is no number.
    """
    try:
        inspect.signature(function).bind(prompts=[], completions=[], **columns)
    except TypeError as error:
        raise InputError(
            f"reward function {name}: cannot be called as f(prompts, completions, **columns) with "
            f"the columns of this data, {sorted(columns)}: {error}"
        ) from error
    values = function(prompts=list(prompts), completions=list(completions), **columns)
    try:
        values = list(values)
    except TypeError:
        raise InputError(
            f"reward function {name}: wanted a list of {len(completions)} numbers or None, got "
            f"{values!r:.80}; is a `return` missing?"
        ) from None
    if len(values) != len(completions):
        raise InputError(
            f"reward function {name}: wanted {len(completions)} rewards, one a completion, "
            f"got {len(values)}"
        )
    try:
        rewards = np.array([math.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise InputError(f"reward function {name}: wanted numbers or None, got {error}") from error
    if np.isinf(rewards).any():
        where = int(np.flatnonzero(np.isinf(rewards))[0])
        raise InputError(
            f"reward function {name}: infinite reward for completion {completions[where][:80]!r}; "
            "return None to drop a completion"
        )
    return rewards


class WeightedRewards:
    """The weighted sum of several reward functions, keeping each one's numbers.

    Args:
        specs: at least one.
    """

    def __init__(self, specs: Sequence[RewardSpec]):
        if not specs:
            raise InputError(
                "rewards: wanted at least one reward function, got none; e.g. "
                "rewards='[{function: copg_jax.rewards.rouge_l}]'"
            )
        self._parts = [(spec, load_reward(spec)) for spec in specs]

    @property
    def fingerprint(self) -> str:
        """Hash of all of them."""
        return hashlib.sha256(repr(self.provenance).encode()).hexdigest()

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """Each spec with a hash of what computes it: a model's weights, or a function's source."""
        return [asdict(spec) | {"hash": _fingerprint(function)} for spec, function in self._parts]

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Total [N] (NaN where any part is absent) and the parts by dotted path, each [N]."""
        total, parts = np.zeros(len(completions)), {}
        for number, (spec, function) in enumerate(self._parts):
            values = score_texts(function, prompts, completions, columns, name=spec.function)
            name = spec.function if spec.function not in parts else f"{spec.function}[{number}]"
            parts[name] = values
            total = total + spec.weight * values
        return total, parts


def _fingerprint(function: RewardFn) -> str:
    """The function's own `fingerprint`, else a hash of the module that defines it."""
    own = getattr(function, "fingerprint", None)
    if own is not None:
        return own
    module = inspect.getmodule(function)
    return hashlib.sha256(inspect.getsource(module or type(function)).encode()).hexdigest()


def length(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Minus the number of words: the shorter, the better."""
    return [-float(len(text.split())) for text in completions]


def rouge_l(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    reference: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """ROUGE-L F1 (with stemming) against the author's summary; None where there is no reference.

    Args:
        prompts: unused.
        completions: [N].
        reference: the data set's column of reference summaries; [N].
        columns: unused.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        None if target is None else scorer.score(target, text)["rougeL"].fmeasure
        for target, text in zip(reference, completions, strict=True)
    ]


def pairwise_accuracy(function: RewardFn, labelled: Iterable[TextGroup]) -> float:
    """Share of strictly ordered pairs of a labelled data set that a reward function orders the same
    way.

    Args:
        function: the reward function; a tie or None counts as wrong.
        labelled: groups whose `rewards` are the labels, e.g. human choices.
    """
    texts = [group for group in labelled if group.rewards is not None]
    prompts = [group.prompt for group in texts for _ in group.completions]
    completions = [text for group in texts for text in group.completions]
    names = sorted({name for group in texts for name in group.columns})
    columns = {
        name: [group.columns.get(name) for group in texts for _ in group.completions]
        for name in names
    }
    scores = iter(score_texts(function, prompts, completions, columns, name="reward"))
    right = total = 0
    for group in texts:
        labels = group.rewards or ()
        pairs = list(zip(labels, [next(scores) for _ in labels], strict=True))
        for label, score in pairs:
            for other_label, other_score in pairs:
                if label is not None and other_label is not None and label > other_label:
                    total += 1
                    right += score > other_score
    return right / total if total else math.nan


class RewardModel:
    """A Bradley–Terry reward model as a reward function.

    Texts are tokenised with the model's own tokenizer and end in its EOS, whether or not the policy
    wrote one.

    Args:
        path: folder or hub id that `LlamaForSequenceClassification` (num_labels=1) could load.
        batch_size: groups per forward pass.
        dtype: compute dtype.
        max_prompt_tokens: longer TL;DR prompts are cut as in training, so this is the limit it was
            trained with.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 16,
        dtype: str = "float32",
        max_prompt_tokens: int = 512,
    ):
        folder = hf_weights.resolve(path)
        self.fingerprint = hf_weights.params_hash(folder)
        config = replace(hf_weights.read_config(folder), dtype=dtype)
        # All devices, whatever the run's mesh; the weights in as many pieces as are equal.
        shards = math.gcd(len(jax.devices()), config.hidden_size)
        mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=shards))
        self._config = flash.choose("auto", config, mesh)
        self._encoder = Encoder(load_tokenizer(folder))
        # Every completion gets a reward, however long it is.
        self._limits = Limits(max_prompt_tokens, max_completion_tokens=1 << 30)
        axes = functional.logical_axes(self._config, head="score")
        shapes = functional.abstract_params(self._config, head="score")
        layout = sharding.shardings(mesh, axes, shapes)
        self._forward = GroupForward(
            partial(model_reward, self._config),
            load_frozen(folder, self._config, head="score", shardings=layout),
            param_shardings=layout,
            mesh=mesh,
            batch_size=batch_size,
            name="reward model",
        )

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Scores, reward units, one a completion; None for a text that spells EOS."""
        runs = self._group(prompts, completions)
        scores = self._forward([group for group, _ in runs])
        rewards: list[float | None] = [None] * len(completions)
        for (_, slots), values in zip(runs, scores, strict=True):
            for slot, value in zip(slots, values.tolist(), strict=True):
                rewards[slot] = value
        return rewards

    def _group(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[tuple[TokenGroup, list[int]]]:
        """Groups runs of equal prompts; each with the indices of its completions."""
        runs = itertools.groupby(range(len(prompts)), key=prompts.__getitem__)
        return [
            found for _, run in runs for found in self._tokenize(list(run), prompts, completions)
        ]

    def _tokenize(
        self, run: list[int], prompts: Sequence[str], completions: Sequence[str]
    ) -> list[tuple[TokenGroup, list[int]]]:
        """One group of a run; completions that cannot be encoded (they spell EOS) are left out."""
        text = TextGroup(
            id=str(run[0]),
            where=f"prompt {prompts[run[0]][:60]!r}",
            prompt=prompts[run[0]],
            completions=tuple(normalize_completion(completions[i]) for i in run),
        )
        try:
            tokens = groups.tokenize_group(text, self._encoder, self._limits, Counter())
        except InvalidRow as error:
            if error.reason != groups.EOS_INSIDE:
                raise InputError(
                    f"reward model: {error}\nIts own limit is the reward function's argument "
                    f"max_prompt_tokens={self._limits.max_prompt_tokens}."
                ) from error
            alone = [[i] for i in run] if len(run) > 1 else []
            return [found for one in alone for found in self._tokenize(one, prompts, completions)]
        assert isinstance(tokens, TokenGroup)  # nothing is dropped under these limits
        return [(tokens, run)]
