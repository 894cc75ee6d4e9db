"""The data of a round: its prompts completed by the policy of the moment, scored, and read back.

A folder of a round has what `experiments.sample` and `experiments.score` write: `samples/` and
`scored/`, each in resumable parts. Where an engine draws, it has `prompts.jsonl` and
`completions.jsonl` in place of samples.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from copg_jax import generation, reuse, scoring, sharding
from copg_jax.config.stages import OnlineConfig
from copg_jax.data import sampled
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.group_list import GroupList, read_folder
from copg_jax.data.groups import TokenGroup, keep
from copg_jax.data.sources import SIDE_CAR
from copg_jax.errors import Damaged
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.infer import GroupForward
from copg_jax.models.forward import make_seq_logp
from copg_jax.models.one_shape import OneShape
from copg_jax.part_loop import is_complete
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.runtime import make_pause
from copg_jax.sampling import row_keys
from copg_jax.train.engine_round import draw_with_engine

log = logging.getLogger(__name__)

ROUNDS = "rounds"  # the folder of all rounds, in that of the run


class Drawer(NamedTuple):
    """A policy that draws, and the reference that its samples are scored with."""

    params: Any  # all that the policy computes with
    trained: Any  # what is trained of it
    policy_hash: str
    reference: Any  # weights of π_ref; None where no round will need them
    reference_hash: str
    is_reference: bool  # ln µ of its samples is ln π_ref


class FreshRound(NamedTuple):
    """What a round has drawn."""

    number: int
    step: int  # updates of the policy that drew it
    groups: GroupList
    seconds: Mapping[str, float]  # of its parts


class RoundMaker:
    """Draws and scores the samples of rounds; all of the same shapes.

    Args:
        config: of the run.
        model: what is trained.
        prompts: that rounds draw completions of.
        allowed: which of them; int [n].
        rewards: of the completions.

    Attributes:
        seeds: whose prompts decide the shapes; in a study those of all runs, so that they share a
            compilation.
    """

    def __init__(
        self,
        config: OnlineConfig,
        model: PretrainedModel,
        prompts: GroupDataset,
        allowed: np.ndarray,
        rewards: WeightedRewards,
    ) -> None:
        self._config, self._model, self._rewards = config, model, rewards
        self._prompts, self._text_format = prompts, prompts.stats["text_format"]
        self._folder = epath.Path(config.output_dir)
        self.seeds = tuple(sorted({config.seed, *reuse.seeds_of_runs()}))
        self._orders = {s: np.random.default_rng(s).permutation(allowed) for s in self.seeds}
        self._pause, self._is_warm = make_pause(model.mesh), False

    def prompts_of(self, number: int, seed: int | None = None) -> list[TokenGroup]:
        """The prompts of a round: all in one order, again and again, so that each comes once before
        any comes twice.

        Args:
            number: of the round, from 0.
            seed: one of `seeds`; None for that of the run.
        """
        order = self._orders[self._config.seed if seed is None else seed]
        count = self._config.prompts_per_round
        turns = np.arange(number * count, (number + 1) * count) % len(order)
        return [self._prompts[int(index)] for index in order[turns]]

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return len(self._orders[self._config.seed])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self._prompts.shape(multiple=1)[0]

    @property
    def expected_rounds(self) -> range:
        """The first rounds, whose prompts decide the shapes."""
        return range(min(self._config.rounds, -(-EXPECTED_ROUNDS // len(self.seeds))))

    def expected(self, number: int, seed: int) -> GroupList:
        """The prompts of a round with completions as long as they can be; see `prompts_of`."""
        numbers, prompts = self._config.sampling, self.prompts_of(number, seed)
        blank = (np.zeros(numbers.max_new_tokens, np.int32),) * numbers.num_samples
        own = {"completions": ("",) * numbers.num_samples, "completion_tokens": blank}
        return GroupList([replace(prompt, **own) for prompt in prompts], "", {})

    def folder_of(self, number: int) -> epath.Path:
        """The folder of a round."""
        return self._folder / ROUNDS / f"{number:05d}"

    def read(self, number: int, step: int) -> FreshRound:
        """A round that was made before.

        Raises:
            Damaged: it is not there as it was.
        """
        folder, checkpoints = self.folder_of(number) / "scored", self._folder / "checkpoints"
        fix = "The newest checkpoint has seen this round, whose policy is no more. Fix: restore "
        fix += f"{folder} from a copy; or delete {checkpoints}, and the same command begins anew."
        if not scoring.is_scored_to_its_end(folder, fix=fix):
            raise Damaged(f"{folder / SIDE_CAR}: missing, or not of all samples. {fix}")
        return FreshRound(number, step, _without_missing(read_folder(folder)), {})

    def make(self, number: int, step: int, drawer: Drawer) -> FreshRound:
        """Draws and scores what is not there yet of a round.

        Args:
            number: of the round, from 0.
            step: updates of the policy.
            drawer: the policy, and its reference.
        """
        begin = time.perf_counter()
        draw = self._sampled if self._config.generator is None else self._generated
        samples = draw(number, drawer)
        middle = time.perf_counter()
        self._score(number, samples, drawer)
        seconds = {"sample": middle - begin, "score": time.perf_counter() - middle}
        return self.read(number, step)._replace(seconds=seconds)

    def _sampled(self, number: int, drawer: Drawer) -> GroupList:
        """Samples of our sampler."""
        folder, config = self.folder_of(number) / "samples", self._config
        prompts = self.prompts_of(number)
        is_whole = partial(sampled.is_sampled_to_its_end, folder)
        if not is_complete(folder, len(prompts), config.part_size, is_whole):
            generation.sample_dataset(
                prompts,
                folder=folder,
                part_size=config.part_size,
                completer=self._completer,
                params=drawer.params,
                keys=row_keys(config.sampling.seed, number, len(prompts)),
                origin=0,
                side_car=generation.describe_samples(
                    config.sampling,
                    self._model,
                    text_format=self._text_format,
                    limits=config.data.limits,
                    model_hash=drawer.policy_hash,
                ),
                quiet=True,
            )
        return read_folder(folder)

    def _generated(self, number: int, drawer: Drawer) -> GroupDataset:
        """Samples of an engine."""
        return draw_with_engine(
            self.folder_of(number),
            self.prompts_of(number),
            number=number,
            trained=drawer.trained,
            model=self._model,
            config=self._config,
            text_format=self._text_format,
            pause=self._pause,
        )

    def _score(self, number: int, samples: GroupList | GroupDataset, drawer: Drawer) -> None:
        """Rewards and ln π_ref of samples."""
        folder, config = self.folder_of(number) / "scored", self._config
        is_whole = partial(scoring.is_scored_to_its_end, folder)
        if is_complete(folder, len(samples), config.part_size, is_whole):
            return
        self._forward.params = drawer.reference
        reference = scoring.sampled_logps if drawer.is_reference else self._forward
        if drawer.is_reference and drawer.reference is not None and not self._is_warm:
            self._forward([samples[0]])  # later rounds compile nothing
        self._is_warm = True

        def paused(rows: Sequence[TokenGroup]) -> list[np.ndarray]:
            self._pause()
            return reference(rows)

        scoring.score_dataset(
            samples,
            folder=folder,
            part_size=config.part_size,
            rewards=self._rewards,
            reference=paused,
            side_car=scoring.make_side_car(
                config.data.limits,
                self._model,
                self._rewards,
                samples,
                reference_hash=drawer.reference_hash,
            ),
            quiet=True,
        )
        self._forward.params = None  # another reference may take the place of this one

    def _one_shape(self, completion_tokens: int) -> OneShape:
        """Of the batches of all rounds.

        Args:
            completion_tokens: of all completions of a prompt; 0 for prompts alone, whose bins are
                the fullest elsewhere.
        """
        config, numbers = self._config, self._config.sampling
        expected = []
        for number, seed in product(self.expected_rounds, self.seeds):
            lengths = [len(prompt.prompt_tokens) for prompt in self.prompts_of(number, seed)]
            pairs = np.array([(length, completion_tokens) for length in lengths])
            expected += np.split(pairs, range(config.part_size, len(pairs), config.part_size))
        return OneShape(
            expected,
            batch_size=min(config.batch_size, config.prompts_per_round),
            num_bins=sharding.num_batch_shards(self._model.mesh),
            sizes=(self.longest, numbers.num_samples, numbers.max_new_tokens),
        )

    @cached_property
    def _completer(self) -> generation.Completer:
        config = self._config
        batch_size = min(config.batch_size, config.prompts_per_round)
        return generation.make_completer(
            config.sampling, self._model, batch_size=batch_size, shapes=self._one_shape(0)
        )

    @cached_property
    def _forward(self) -> GroupForward:
        config, model, numbers = self._config, self._model, self._config.sampling
        shape = self._one_shape(numbers.num_samples * numbers.max_new_tokens)
        arch = replace(model.arch, remat="none")
        return reuse.once(
            "reference of rounds",
            (model.folder, arch, model.mesh, config.logits_chunk, shape.shape),
            lambda: GroupForward(
                make_seq_logp(arch, model.partitioner, chunk=config.logits_chunk),
                None,
                mesh=model.mesh,
                batch_size=shape.shape.batch_size,
                name=f"reference {model.folder}",
                shape=shape,
            ),
            only_newest=True,
        )


EXPECTED_ROUNDS = 64
"""Rounds whose prompts decide the shape of all batches, of all seeds together."""


def _without_missing(groups: GroupList) -> GroupList:
    """The same groups without completions that have no reward; one without any stays in its place,
    and teaches nothing.
    """
    judged = []
    for group in groups:
        assert group.rewards is not None
        is_judged = ~np.isnan(group.rewards)
        judged.append(group if is_judged.all() else keep(group, np.flatnonzero(is_judged)))
    return GroupList(judged, groups.fingerprint, groups.stats)
