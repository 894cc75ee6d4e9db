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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from copg_jax import distributed, sharding
from copg_jax.config.sections import GenerationConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.formats.texts import Text, content
from copg_jax.data.groups import GroupBatch, TokenGroup, columns_by_completion
from copg_jax.errors import InputError
from copg_jax.infer import not_finite, one_late
from copg_jax.models.layout import Shape, pack, pack_by_length
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.runtime import Progress, make_pause
from copg_jax.sampling import Sampler, Samples, row_keys

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


@dataclass(frozen=True)
class Generation:
    """One generated completion with what was measured on it."""

    index: int  # of its prompt among the fixed ones
    id: str
    prompt: Text  # messages where those of the prompt's row are
    completion: Text
    reward: float  # NaN where the reward function gave None
    logp: float  # ln π, nats
    ref_logp: float  # ln π_ref, nats; NaN without a reference
    kl_k3: float  # k3 estimate, nats; NaN without a reference
    length: int  # tokens, the end token included
    has_eos: bool


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
        self._pause, self._is_compiled = make_pause(generator.mesh), False
        self._columns = sorted({name for prompt in prompts for name in prompt.columns})
        rewards.require_columns(self._columns)
        if whole := columns_by_completion(prompts)[0]:
            log.warning(
                "columns with one entry for each completion of the data: %s: functions receive the "
                "whole list for each generated completion",
                ", ".join(sorted(whole)),
            )

    def __call__(self, params: Any, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics (`eval/…`) and sample texts of the policy `params` at `step`; see `summarize`.

        Raises:
            InputError: ln π or ln π_ref that is not finite, or a reward function that misbehaves.
        """
        found = in_prompt_order(g for batch in self.batches(params, step) for g in batch)
        metrics = summarize(found, beta=self._beta) | self.dropped()
        return metrics, sample_texts(found, self._config)

    def dropped(self) -> dict[str, float]:
        """Rewards that are missing among what was generated last, by function and reason."""
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
        launched = (
            (rows, *self._launch(params, keys, rows, shape)) for rows, shape in self._plan(finished)
        )
        # Texts and rewards of a batch are made while the device generates the next one.
        left, done = len(self._prompts) - len(finished), 0
        self._counts.clear()
        compiles = not self._is_compiled and left > 0
        with Progress("generation", left, "prompts", compiles=compiles) as progress:
            for rows, samples, ref_logp in one_late(launched):
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

    def _plan(self, finished: Collection[int]) -> Iterator[tuple[np.ndarray, Shape]]:
        """Batches of the prompts that are left, [B] each, -1 = none: the same at every evaluation,
        so that later ones compile nothing.
        """
        config = self._config
        left = np.array([i for i in range(len(self._prompts)) if i not in finished], int)
        lengths = [(len(self._prompts[i].prompt_tokens), 0) for i in left]
        batches = pack_by_length(
            np.array(lengths, int).reshape(-1, 2),
            batch_size=min(config.batch_size, len(self._prompts)),
            num_bins=sharding.num_batch_shards(self._generator.mesh),
            sizes=(config.num_samples, config.max_new_tokens),
        )
        for packed in batches:
            full = packed.shape.with_all_completions()  # they may become as long as they can
            yield from ((np.where(rows < 0, -1, left[rows]), full) for rows in packed.rows)

    def _launch(
        self, params: Any, keys: Array, rows: np.ndarray, shape: Shape
    ) -> tuple[Samples, Array | None]:
        """Starts the generation of a batch, and ln π_ref of what it will generate [B, K, C]."""
        config = self._config
        blank = (np.zeros(config.max_new_tokens, np.int32),) * config.num_samples
        nothing: dict[str, Any] = {"rewards": None, "ref_logps": None, "completion_tokens": blank}
        host = shape.collate(
            [None if i < 0 else replace(self._prompts[i], **nothing) for i in rows]
        )
        # The model wants at least one token, but the sampler shall leave empty rows empty.
        length = np.where(rows < 0, 0, host.prompt_length)
        alone = shape.prompt_layout(host.prompt_length)
        batch, length, alone = distributed.place_whole((host, length, alone), self._placement)
        keys = keys[np.maximum(rows, 0)]
        samples = self._generator.sample(params, batch.prompt_tokens, length, alone, keys)
        if self._generator.ref_token_logp is None:
            return samples, None
        # Not waiting for the samples, which alone would tell the host how long they are.
        tokens, length = jax.device_put((samples.tokens, samples.length), self._placement)
        batch = batch._replace(completion_tokens=tokens, completion_length=length)
        return samples, self._generator.ref_token_logp(batch)

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
            rewards, _ = self._rewards(
                [g.prompt for g in found],
                [g.completion for g in found],
                columns,
                [self._prompts[g.index].where for g in found],
                counts=self._counts,
                update=progress.update,
            )
        penalty = self._config.missing_eos_reward
        return [
            replace(g, reward=float(reward if penalty is None or g.has_eos else penalty))
            for g, reward in zip(found, rewards, strict=True)
        ]


def in_prompt_order(generations: Iterable[Generation]) -> list[Generation]:
    """The same generations as the prompts come, whatever the batches were."""
    return sorted(generations, key=lambda g: g.index)


def sample_texts(generations: Sequence[Generation], sizes: GenerationConfig) -> dict[str, str]:
    """The first completions of the first prompts, with their rewards, to look at.

    Args:
        generations: all of an evaluation, from `in_prompt_order`.
        sizes: numbers of samples and of texts.
    """
    shown = generations[:: sizes.num_samples][: sizes.num_texts]
    return {
        f"sample/{i}": f"[reward {g.reward:.3f}] {content(g.completion).strip()}"
        for i, g in enumerate(shown)
    }


def summarize(generations: Sequence[Generation], *, beta: float) -> dict[str, float]:
    """Averages of an evaluation.

    `eval/kl` is the k1 estimate E[ln π − ln π_ref], unbiased and possibly negative on few samples;
    `eval/kl_k3` sums k3 = exp(−d) − 1 + d over tokens, d = ln π − ln π_ref of the token, unbiased
    too and never negative. Both estimate KL(π‖π_ref) for samples of temperature 1. `eval/objective`
    is E[R] − β·`eval/kl`. Standard errors count samples of one prompt as one observation (their
    mean), since they are not independent.

    Args:
        generations: from `GenerationEvaluator.batches`.
        beta: the paper's β.
    """
    reward = np.array([g.reward for g in generations])
    known = np.isfinite(reward)
    by_prompt: dict[int, list[float]] = {}
    for g in generations:
        if np.isfinite(g.reward):
            by_prompt.setdefault(g.index, []).append(g.reward)
    means = np.array([np.mean(values) for values in by_prompt.values()])
    stderr = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else float("nan")
    kl = np.array([g.logp - g.ref_logp for g in generations]).mean()
    mean = means.mean() if len(means) else float("nan")
    return {
        "eval/reward_mean": float(mean),
        "eval/reward_stderr": float(stderr),
        "eval/kl": float(kl),
        "eval/kl_k3": float(np.mean([g.kl_k3 for g in generations])),
        "eval/objective": float(mean - beta * kl),
        "eval/length": float(np.mean([g.length for g in generations])),
        "eval/eos_rate": float(np.mean([g.has_eos for g in generations])),
        "eval/num_prompts": float(len({g.id for g in generations})),
        "eval/dropped_rewards": float((~known).sum()),
    }
