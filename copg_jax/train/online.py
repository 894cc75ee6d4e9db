"""Rounds of fresh samples as what a run trains on.

1. Before the first step of a round the policy of the moment completes its prompts, which are
   scored: `RoundHook`, called by the loop like evaluations and checkpoints.
2. The steps of the round take batches from the last rounds and, on request, scored data.
3. `ReportHook` logs what a round was like, after its last step.

A run that was interrupted goes on at its newest checkpoint. Rounds that began after it are of a
policy that is no more: they are removed and made again. All batches of all rounds have shapes that
are known from the start.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from copg_jax import disk, distributed, inputs
from copg_jax.config.stages import OnlineConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.group_list import GroupList
from copg_jax.data.groups import GroupBatch, warn_of_lists
from copg_jax.data.stream import GroupStream
from copg_jax.errors import InputError
from copg_jax.files import is_remote
from copg_jax.generation import warn_of_cuts
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.pooled import require_mu
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.tracking import MetricsLogger
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.fresh import ROUNDS, FreshRound, RoundMaker
from copg_jax.train.mixture import Mixture, drawn_at
from copg_jax.train.reference import Reference
from copg_jax.train.run import Fed, Run
from copg_jax.train.state import TrainState

log = logging.getLogger(__name__)

_BYTES_A_TOKEN = 20  # of a sample, at most: its id and its text, sampled and scored


@dataclass(frozen=True)
class OnlineFeed:
    """Prompts, rewards and, on request, scored data beside the samples; a `run.Feed`."""

    config: OnlineConfig
    prompts: GroupDataset
    allowed: np.ndarray  # int [n]: the prompts that are drawn
    rewards: WeightedRewards
    offline: GroupDataset | None
    answers: Mapping[bytes, Sequence[int]]  # with pairs of different origins: prompt → offline

    held_out = None

    @property
    def num_steps(self) -> int:
        """See `run.Feed`."""
        return self.config.rounds * self.config.steps_per_round

    @property
    def hashes(self) -> Mapping[str, str]:
        """See `run.Feed`."""
        found = {"data": self.prompts.fingerprint, "rewards": self.rewards.fingerprint}
        return found | ({"offline": self.offline.fingerprint} if self.offline else {})

    @property
    def card(self) -> Mapping[str, str]:
        """See `run.Feed`."""
        prompts, config = self.prompts, self.config
        samples = f"samples of {len(self.allowed)} prompts of `{config.data.path}`, fingerprint "
        found = {"train": samples + prompts.fingerprint[:12]}
        if config.offline is not None and self.offline is not None:
            offline = f"`{config.offline.path}`, {len(self.offline)} groups, fingerprint "
            found["offline"] = offline + self.offline.fingerprint[:12]
        return found

    def begin(
        self,
        run: Run,
        start: int,
        logger: MetricsLogger,
        checkpoints: Checkpoints,
        frozen: Mapping[str, Any] | None,
    ) -> Fed:
        """See `run.Feed`."""
        rounds = RoundHook(self, run, start, checkpoints, frozen)
        return Fed(rounds, [ReportHook(rounds, logger, self.config)], [rounds])


def open_online(
    config: OnlineConfig, model: PretrainedModel, to_write: int, *, needs_mu: bool = False
) -> OnlineFeed:
    """Opens prompts, rewards and scored data, and checks that they fit each other.

    Args:
        config: of the run.
        model: what is trained.
        to_write: bytes that the run writes beside its rounds; 0 where it is complete.
        needs_mu: whether the loss takes ln µ.

    Raises:
        InputError: fewer prompts than a round wants, rewards that cannot judge them, or scored data
            of another reference, tokenizer or dtype; completions without ln µ where the loss needs
            it.
    """
    folder, numbers, offline = epath.Path(config.output_dir), config.sampling, None
    if config.generator is not None and is_remote(folder):
        raise InputError(
            f"generator: wanted an output_dir on a disk, from which the program can read, got "
            f"{folder}"
        )
    if config.generator is not None and needs_mu:
        raise InputError(
            f"generator: wanted none with loss.name={config.loss.name}, which needs the "
            "log-probability of each completion under the policy that wrote it, got an engine, "
            "whose file does not say it. Fix: leave generator out; or another loss, such as copg."
        )
    if config.offline is not None:
        inputs.require_scored_folder(config.offline)
    prompts = inputs.open_data(config.data, model, folder, "rounds", prompts_only=True)
    warn_of_lists(prompts)
    longest, *_ = prompts.shape(multiple=1)
    fix = "lower data.max_prompt_tokens or sampling.max_new_tokens"
    model.require_context(config.data.path, longest, numbers.max_new_tokens, fix=fix)
    rewards = WeightedRewards(config.rewards)
    rewards.require_columns({name for row in prompts for name in row.columns})
    rewards.check_rows(prompts)
    allowed, answers = np.arange(len(prompts)), {}
    if config.offline is not None:
        offline = inputs.open_data(config.offline, model, folder, "offline")
        inputs.require_same_reference(config.offline, model, offline)
        if needs_mu:
            require_mu("offline.path", config.offline.path, offline)
        if config.loss.pairs == "cross":
            answers = _by_prompt(offline)
            keys = [row.prompt_tokens.tobytes() in answers for row in prompts]
            allowed = np.flatnonzero(keys)
            log.info("%d of %d prompts have offline completions", len(allowed), len(prompts))
    if len(allowed) < config.prompts_per_round:
        raise InputError(
            f"prompts_per_round: wanted at most the {len(allowed)} different prompts of data.path "
            f"{config.data.path}{' that offline.path answers' * bool(answers)}, got "
            f"{config.prompts_per_round}"
        )
    warn_of_cuts(numbers)
    kept = min(config.rounds, (config.keep_rounds or config.rounds) + config.replay_rounds)
    tokens = kept * config.prompts_per_round * numbers.num_samples * numbers.max_new_tokens
    if to_write:
        disk.warn_of_space(folder, to_write + _BYTES_A_TOKEN * tokens)
    return OnlineFeed(config, prompts, allowed, rewards, offline, answers)


def _by_prompt(groups: GroupDataset) -> Mapping[bytes, Sequence[int]]:
    """Indices of the groups of each prompt."""
    found: dict[bytes, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group.prompt_tokens.tobytes(), []).append(index)
    return found


class RoundHook:
    """Makes the data of each round before its first step, and is the iterator of batches.

    Args:
        feed: what the run is fed with.
        run: the run.
        start: steps that are done.
        checkpoints: entered Checkpoints.
        frozen: see `run.Feed.begin`.

    Attributes:
        newest: what the round has drawn; None before the first.
        since: when its steps began.
    """

    newest: FreshRound | None = None

    def __init__(
        self,
        feed: OnlineFeed,
        run: Run,
        start: int,
        checkpoints: Checkpoints,
        frozen: Mapping[str, Any] | None,
    ) -> None:
        self._feed, self._run, self._config = feed, run, feed.config
        self._checkpoints = checkpoints
        self._maker = RoundMaker(feed.config, run.model, feed.prompts, feed.allowed, feed.rewards)
        self._mixture = Mixture(feed.config, self._maker, feed.offline, feed.answers, run.mesh)
        self._reference = Reference(run, feed.config, checkpoints, frozen, start)
        self._window: list[FreshRound] = []
        self._stream: GroupStream | None = None
        self._done, self.since = start, 0.0
        self._remove(lambda number: number * self._config.steps_per_round > start)

    def is_due(self, step: int) -> bool:
        """Whether a round begins after `step`."""
        return step % self._config.steps_per_round == 0 and step < self._run.num_steps

    def __call__(self, step: int, state: TrainState) -> None:
        """Makes the round that begins after `step`; or reads that which `step` lies in."""
        number = step // self._config.steps_per_round
        if step == self._run.num_steps or (self.newest and self.newest.number == number):
            return
        self._window = [self._of_window(at, step, state) for at in self._needed(number)]
        self.newest = self._window[-1]
        self._stream = self._mixture.stream(self._window, number)
        self._done, self.since = step, time.perf_counter()
        self._remove_old(number)

    def __iter__(self) -> "RoundHook":
        return self

    def __next__(self) -> tuple[list[str], GroupBatch]:
        assert self._stream is not None and self.newest is not None
        at = self._done - self.newest.step
        self._done += 1
        return self._stream.load(at)

    def staleness(self) -> float:
        """Updates of the policy between the drawing and the use of a fresh group, averaged over the
        steps of the round; also over those that an earlier process took.
        """
        assert self._stream is not None and self.newest is not None
        found = []
        for at in range(self._config.steps_per_round):
            drawn = drawn_at(self._window, self._stream, at)
            found.append(self.newest.step + at - drawn)
        return float(np.concatenate(found).mean())

    def raise_failure(self) -> None:
        """Nothing goes on in the background."""

    def leave(self, step: int, state: TrainState) -> None:
        """What a round has drawn is on disk."""

    def _needed(self, number: int) -> range:
        """The rounds that a round trains on."""
        first = max(self._reference.reset_before(number), number - self._config.replay_rounds + 1)
        return range(max(first, 0), number + 1)

    def _of_window(self, number: int, step: int, state: TrainState) -> FreshRound:
        """A round: in memory, on disk, or made now."""
        for known in self._window:
            if known.number == number:
                return known
        begins = number * self._config.steps_per_round
        if begins < step:
            return self._maker.read(number, begins)
        return self._maker.make(number, step, self._reference.drawer(number, step, state))

    def _remove_old(self, number: int) -> None:
        """Removes the folders that neither the user nor a run that goes on wants."""
        if self._config.keep_rounds is None:
            return
        first = number - self._config.keep_rounds + 1
        for step in self._checkpoints.newest:
            first = min(first, self._needed(step // self._config.steps_per_round).start)
        self._remove(lambda other: other < first)

    def _remove(self, is_unwanted: Callable[[int], bool]) -> None:
        rounds = self._run.folder / ROUNDS
        with distributed.main_first(self._run.folder):
            if distributed.is_main_process() and rounds.exists():
                for folder in rounds.iterdir():
                    if folder.name.isdigit() and is_unwanted(int(folder.name)):
                        folder.rmtree()


class ReportHook:
    """Logs what a round was like, after its last step.

    Args:
        rounds: the rounds.
        logger: an entered MetricsLogger.
        config: of the run.
    """

    def __init__(self, rounds: RoundHook, logger: MetricsLogger, config: OnlineConfig) -> None:
        self._rounds, self._logger, self._config = rounds, logger, config

    def is_due(self, step: int) -> bool:
        """Whether `step` is the last one of a round."""
        return step > 0 and step % self._config.steps_per_round == 0

    def __call__(self, step: int, state: TrainState) -> None:
        """Logs the round that ends with `step`; not where an earlier process has."""
        newest = self._rounds.newest
        if newest is None or step != newest.step + self._config.steps_per_round:
            return
        seconds = dict(newest.seconds) | {"train": time.perf_counter() - self._rounds.since}
        config = self._config
        numbers = describe_round(
            newest.groups, config.loss.beta, is_whole=config.sampling.is_whole_model
        )
        numbers["online/staleness"] = self._rounds.staleness()
        numbers |= {f"perf/{name}_sec": value for name, value in seconds.items()}
        self._logger.log(step, {"online/round": newest.number} | numbers)

    def raise_failure(self) -> None:
        """Nothing goes on in the background."""

    def leave(self, step: int, state: TrainState) -> None:
        """A round that is not at its end has no line."""


def describe_round(groups: GroupList, beta: float, *, is_whole: bool) -> dict[str, float]:
    """Averages of the samples of a round; those of the KL only where ln µ is known and is ln π.

    Args:
        groups: scored samples.
        beta: the paper's β.
        is_whole: whether µ is the policy itself.
    """
    rewards = [group.rewards for group in groups if group.rewards is not None]
    judged = [values for values in rewards if len(values)]
    compared = [values for values in judged if len(values) > 1]
    ended = [group.has_eos for group in groups if group.has_eos is not None]
    ids = [own for group in groups for own in group.completion_tokens]
    found = {
        "online/reward": float(np.concatenate(judged).mean()),
        "online/ties": float(np.mean([values.min() == values.max() for values in compared])),
        "online/eos_rate": float(np.concatenate(ended).mean()),
        "online/length": float(np.mean(list(map(len, ids)))),
    }
    gaps = [
        group.mu_logps - group.ref_logps
        for group in groups
        if group.mu_logps is not None and group.ref_logps is not None
    ]
    if gaps and is_whole:
        kl = float(np.concatenate(gaps).mean())
        found |= {"online/kl": kl, "online/objective": found["online/reward"] - beta * kl}
    return found
