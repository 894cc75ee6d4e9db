"""Evaluation: held-out losses, and rewards of the policy's own generations.

`make_loss_evaluator` averages a loss function's metrics over a held-out set.

`GenerationEvaluator` estimates J(π) = E[R] − β·KL(π‖π_ref) by sampling, on the same prompts each
time:
1. sample completions of a fixed list of prompts;
2. decode them up to the end token and call the reward function on the texts;
3. compute ln π_ref of the same tokens and estimate the KL from the samples.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from copg_jax import distributed, sharding
from copg_jax.config.sections import GenerationConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.groups import GroupBatch, TokenGroup, warn_of_lists
from copg_jax.errors import InputError
from copg_jax.generation import PromptSampler
from copg_jax.infer import not_finite, one_late
from copg_jax.models.layout import pack
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.runtime import Progress, make_pause
from copg_jax.sampling import Sampler, Samples, row_keys
from copg_jax.summary import Generation, in_prompt_order, sample_texts, summarize

log = logging.getLogger(__name__)


def make_loss_evaluator(
    loss_step: Callable[[Any, GroupBatch], dict[str, Any]],
    dataset: GroupDataset,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[Any], dict[str, float]]:
    """Builds params → metrics averaged over the whole held-out set, names prefixed with `eval/`.

    Args:
        loss_step: from `step.make_loss_step`, its coefficients given.
        dataset: held-out groups.
        batch_size: groups per forward pass.
        mesh: the device mesh.

    The function that is returned raises InputError where the loss of a batch is not finite.
    """
    placement = sharding.batch_sharding(mesh)
    batches = pack(
        dataset.num_tokens(np.arange(len(dataset))),
        batch_size=batch_size,
        num_bins=sharding.num_batch_shards(mesh),
        sizes=dataset.shape(),
    )
    pause, is_compiled = make_pause(mesh), False

    def launched(params: Any) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        for rows in batches.rows:
            batch = batches.collate([None if row < 0 else dataset[row] for row in rows])
            yield rows, loss_step(params, distributed.place_whole(batch, placement))

    def evaluate(params: Any) -> dict[str, float]:
        nonlocal is_compiled
        totals: dict[str, np.ndarray] = {}
        with Progress("held-out loss", len(batches.rows), "batches", compiles=not is_compiled) as p:
            for done, (rows, sums) in enumerate(one_late(launched(params)), 1):
                sums = jax.device_get(sums)
                if not np.isfinite(sums["loss"]).all():
                    named = ", ".join(dataset[row].where for row in rows[rows >= 0][:8])
                    raise InputError(
                        "validation: the loss of these rows, or of some of them, is not finite: "
                        f"{named}. Fix: look at them; train with a lower optim.learning_rate or "
                        "optim.clip_norm in a new output_dir."
                    )
                for name, pair in sums.items():
                    totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
                p.update(done)
                is_compiled = True
                pause()
        return {
            f"eval/{name}": float(total / weight) if weight else float("nan")
            for name, (total, weight) in totals.items()
        }

    return evaluate


class Generator(NamedTuple):
    """What generates: a sampler and, for the KL, the reference of its policy."""

    sample: Sampler  # from `sampling.make_sampler`, built with the numbers of the GenerationConfig
    decode: Callable[[Any], str]  # ids without the end token → text
    mesh: jax.sharding.Mesh
    ref_token_logp: Callable[[GroupBatch], Array] | None = None  # nats, [B, K, C]; None = no KL
    policy: str = "policy"  # their names, for messages
    reference: str = "reference"


class GenerationEvaluator:
    """Generates on fixed prompts and measures reward, KL, length and EOS rate.

    Args:
        config: sizes and options.
        prompts: the fixed prompts; their `columns` go to the reward function.
        generator: draws completions of them.
        rewards: the reward function.
        beta: β of the reported objective.

    Raises:
        InputError: a reward function that cannot be called with the columns of the prompts.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Sequence[TokenGroup],
        generator: Generator,
        rewards: WeightedRewards,
        *,
        beta: float,
    ) -> None:
        self._config, self._prompts, self._generator = config, prompts, generator
        self._rewards, self._beta = rewards, beta
        self._counts: Counter[str] = Counter()
        self._placement = sharding.batch_sharding(generator.mesh)
        self._sampler = PromptSampler(
            generator.sample,
            mesh=generator.mesh,
            batch_size=min(config.batch_size, len(prompts)),
            num_samples=config.num_samples,
            max_new_tokens=config.max_new_tokens,
        )
        self._pause, self._is_compiled = make_pause(generator.mesh), False
        self._columns = sorted({name for prompt in prompts for name in prompt.columns})
        rewards.require_columns(self._columns)
        rewards.check_rows(prompts)
        warn_of_lists(prompts)

    def __call__(self, params: Any, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics (`eval/…`) and sample texts of the policy `params` at `step`; see `summarize`.

        Raises:
            InputError: ln π or ln π_ref that is not finite, or a reward function that misbehaves.
        """
        found = in_prompt_order(g for batch in self.batches(params, step) for g in batch)
        metrics = summarize(found, beta=self._beta) | self.counts()
        return metrics, sample_texts(found, self._config)

    def counts(self) -> dict[str, float]:
        """Rewards that are missing, by function and reason, and those that `clip` and `overlong`
        changed, among what the last call of `batches` generated.
        """
        return {f"eval/{name}": float(number) for name, number in self._counts.items()}

    def batches(
        self, params: Any, step: int, finished: Collection[int] = ()
    ) -> Iterator[list[Generation]]:
        """Generates and judges batch by batch, from the longest prompts to the shortest.

        Args:
            params: the policy's parameters.
            step: folded into the seed; the same step gives a prompt the same samples, whatever its
                batch.
            finished: prompts to leave out, by index, when going on with an interrupted evaluation;
                its mesh and batch size may have been others.
        """
        keys = row_keys(self._config.seed, step, len(self._prompts))
        left = np.array([i for i in range(len(self._prompts)) if i not in finished], int)
        # Texts and rewards of a batch are made while the device generates the next one.
        self._counts.clear()
        done, compiles = 0, not self._is_compiled and len(left) > 0
        with Progress("generation", len(left), "prompts", compiles=compiles) as progress:
            for rows, samples, ref_logp in one_late(self._launched(params, keys, left)):
                present = rows >= 0
                samples, ref_logp = jax.tree.map(
                    lambda x, present=present: x[present], jax.device_get((samples, ref_logp))
                )
                found = self._measure(rows[present].tolist(), samples, ref_logp)
                self._is_compiled = True
                done += int(present.sum())
                progress.update(done)
                yield self._judge(found)
                self._pause()

    def _launched(
        self, params: Any, keys: Array, left: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Samples, Array | None]]:
        """Starts the generation of batch after batch, and ln π_ref of what each will generate
        [B, K, C]; gives the prompts of each with them, [B], -1 = none. The batches are the same at
        every evaluation, so that later ones compile nothing.
        """
        prompts = [self._prompts[i] for i in left]
        for rows, samples, batch in self._sampler.launched(params, prompts, keys[left]):
            ref_logp = None
            if self._generator.ref_token_logp is not None:
                # Not waiting for the samples, which alone would tell the host how long they are.
                own = jax.device_put((samples.tokens, samples.length), self._placement)
                batch = batch._replace(completion_tokens=own[0], completion_length=own[1])
                ref_logp = self._generator.ref_token_logp(batch)
            yield np.where(rows < 0, -1, left[rows]), samples, ref_logp

    def _measure(
        self, rows: Sequence[int], samples: Samples, ref_token_logp: np.ndarray | None
    ) -> list[Generation]:
        """Texts and log-probabilities of one batch of samples, prompt by prompt; no rewards yet."""
        found = []
        for b, index in enumerate(rows):
            prompt = self._prompts[index]
            for k in range(self._config.num_samples):
                n, has_eos = int(samples.length[b, k]), bool(samples.has_eos[b, k])
                logp = np.asarray(samples.token_logp[b, k, :n], np.float64)
                text = self._generator.decode(samples.tokens[b, k, : n - has_eos])
                log_ratio = np.full(n, np.nan)
                if not np.isfinite(logp).all():
                    raise not_finite(self._generator.policy, logp.sum(), prompt.where, text)
                if ref_token_logp is not None:
                    ref_logp = ref_token_logp[b, k, :n].astype(np.float64)
                    if not np.isfinite(ref_logp).all():
                        name = self._generator.reference
                        raise not_finite(name, ref_logp.sum(), prompt.where, text)
                    log_ratio = logp - ref_logp
                found.append(
                    Generation(
                        index=index,
                        id=prompt.id,
                        prompt=prompt.prompt,
                        completion=FORMATS[prompt.format].answer(text),
                        reward=np.nan,
                        rewards={},
                        logp=float(logp.sum()),
                        ref_logp=float((logp - log_ratio).sum()),
                        kl_k3=float((np.expm1(-log_ratio) + log_ratio).sum()),
                        length=n,
                        has_eos=has_eos,
                    )
                )
        return found

    def _judge(self, found: list[Generation]) -> list[Generation]:
        """Fills in the rewards."""
        rows = [self._prompts[g.index].columns for g in found]
        columns = {name: [row.get(name) for row in rows] for name in self._columns}
        number = len(found) * len(self._rewards)
        with Progress(f"rewards of {len(found)} generations", number, "rewards") as progress:
            rewards, by_name = self._rewards(
                [g.prompt for g in found],
                [g.completion for g in found],
                columns,
                [self._prompts[g.index].where for g in found],
                num_tokens=[g.length for g in found],
                counts=self._counts,
                update=progress.update,
            )
        penalty = self._config.missing_eos_reward
        return [
            replace(
                g,
                reward=float(rewards[i] if penalty is None or g.has_eos else penalty),
                rewards={name: float(values[i]) for name, values in by_name.items()},
            )
            for i, g in enumerate(found)
        ]
