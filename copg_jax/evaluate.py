"""Evaluation: held-out losses, and rewards of the policy's own generations.

`make_loss_evaluator` averages a loss function's metrics over a held-out set.

`GenerationEvaluator` estimates J(π) = E[R] − β·KL(π‖π_ref) by sampling, on the same prompts each
time:
1. sample completions of a fixed list of prompts;
2. decode them up to EOS and call the reward function on the texts;
3. compute ln π_ref of the same tokens and estimate the KL from the samples.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from copg_jax import global_arrays, policy, sharding
from copg_jax.cli import option
from copg_jax.data import groups, packing
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.errors import InputError
from copg_jax.forward import one_late
from copg_jax.models.llama import LlamaConfig
from copg_jax.rewards import WeightedRewards
from copg_jax.sampling import Sampler, Samples, row_keys


@dataclass(frozen=True)
class GenerationConfig:
    """How completions are generated and judged."""

    num_prompts: int = option(
        128, "fixed prompts, the first ones of the data (paper: 128; Fig. 6: 1024)"
    )
    num_samples: int = option(1, "completions per prompt")
    max_new_tokens: int = option(53, "longest completion, EOS included")
    sampling_temperature: float = option(
        1.0, "1 estimates J(pi), an expectation under pi; 0 is greedy decoding"
    )
    missing_eos_reward: float | None = option(
        None, "reward of a completion without EOS; null = that of its text, like any other"
    )
    batch_size: int = option(32, "prompts generated at a time")
    num_texts: int = option(4, "generations shown and logged as text")
    seed: int = option(0, "seed of the sampling; the step is folded in")

    def __post_init__(self):
        for name in ("num_prompts", "num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.sampling_temperature < 0 or self.num_texts < 0:
            raise InputError("sampling_temperature and num_texts must be >= 0")


def make_loss_evaluator(
    loss_step: Callable[[Any, GroupBatch], dict[str, Any]],
    dataset: GroupDataset,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[Any], dict[str, float]]:
    """Builds params → metrics averaged over the whole held-out set, names prefixed with `eval/`.

    Args:
        loss_step: from `step.make_loss_step`.
        dataset: held-out groups.
        batch_size: groups per forward pass.
        mesh: the device mesh.
    """
    prompt_size, num_completions, completion_size = dataset.shape()
    placement, num_blocks = sharding.batch_sharding(mesh), sharding.num_batch_shards(mesh)
    tokens = dataset.num_tokens(np.arange(len(dataset)))
    dealt = packing.deal(tokens, batch_size=batch_size, num_blocks=num_blocks)
    places = packing.in_places(tokens, dealt, num_blocks=num_blocks)
    prompt_sizes = packing.prompt_sizes_of(places, most=prompt_size)
    capacity = packing.capacity_of(places)

    def launched(params: Any) -> Iterator[dict[str, Any]]:
        for rows in dealt:
            batch = groups.collate(
                [None if row < 0 else dataset[row] for row in rows],
                batch_size=batch_size,
                prompt_sizes=prompt_sizes,
                num_completions=num_completions,
                completion_size=completion_size,
                num_blocks=num_blocks,
                capacity=capacity,
            )
            yield loss_step(params, global_arrays.place_whole(batch, placement))

    def evaluate(params: Any) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        for sums in one_late(launched(params)):
            for name, pair in jax.device_get(sums).items():
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
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
    prompt: str
    completion: str
    reward: float  # NaN where the reward function gave None
    logp: float  # ln π, nats
    ref_logp: float  # ln π_ref, nats; NaN without a reference
    kl_k3: float  # k3 estimate, nats; NaN without a reference
    length: int  # tokens, EOS included
    has_eos: bool


class GenerationEvaluator:
    """Generates on fixed prompts and measures reward, KL, length and EOS rate.

    Args:
        config: architecture of policy and reference.
        sampler: from `sampling.make_sampler`, built with the numbers of `generation`.
        prompts: the fixed prompts; their `columns` go to the reward function.
        tokenizer: decodes the samples.
        rewards: the reward function.
        generation: sizes and options.
        beta: β of the reported objective.
        mesh: the device mesh.
        ref_params: parameters of π_ref, or None for no KL and no objective.
        logits_chunk: see `logprobs.token_logp`.
        inputs: name to hash of what this evaluation reads, for the run's header.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        sampler: Sampler,
        prompts: Sequence[TokenGroup],
        tokenizer: Any,
        rewards: WeightedRewards,
        generation: GenerationConfig,
        beta: float,
        mesh: jax.sharding.Mesh,
        ref_params: Any = None,
        logits_chunk: int | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.inputs = dict(inputs or {})
        self._sampler, self._prompts, self._tokenizer = sampler, prompts, tokenizer
        self._rewards, self._generation, self._beta = rewards, generation, beta
        self._num_blocks = shards = sharding.num_batch_shards(mesh)
        self._batch_size = packing.round_up(min(generation.batch_size, len(prompts)), shards)
        self._ref_params, self._placement = ref_params, sharding.batch_sharding(mesh)
        self._ref_token_logp = jax.jit(
            sharding.batch_parallel(mesh)(partial(policy.token_logp, config, chunk=logits_chunk)),
            in_shardings=(None, self._placement),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, params: Any, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics (`eval/…`) and sample texts of the policy `params` at `step`; see `summarize`."""
        found = in_prompt_order(g for batch in self.batches(params, step) for g in batch)
        return summarize(found, beta=self._beta), sample_texts(found, self._generation)

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
        keys = row_keys(self._generation.seed, step, len(self._prompts))
        batches = self._plan([i for i in range(len(self._prompts)) if i not in finished])
        launched = ((batch.rows, *self._launch(params, keys, batch)) for batch in batches)
        # Texts and rewards of a batch are made while the device generates the next one.
        for rows, samples, ref_logp in one_late(launched):
            present = rows >= 0
            samples, ref_logp = jax.tree.map(
                lambda x, present=present: x[present], jax.device_get((samples, ref_logp))
            )
            yield self._judge(self._measure(rows[present].tolist(), samples, ref_logp))

    def _plan(self, prompts: Sequence[int]) -> list[packing.LengthBatch]:
        """Batches of these prompts: the same at every evaluation, so that later ones compile
        nothing."""
        lengths = [(len(self._prompts[i].prompt_tokens), 0) for i in prompts]
        batches = packing.batches_by_length(
            np.array(lengths, int).reshape(-1, 2),
            batch_size=self._batch_size,
            num_blocks=self._num_blocks,
        )
        rows = np.array(prompts, int)
        return [b._replace(rows=np.where(b.rows < 0, -1, rows[b.rows])) for b in batches]

    def _launch(
        self, params: Any, keys: Array, prompts: packing.LengthBatch
    ) -> tuple[Samples, Array | None]:
        """Starts the generation of a batch, and ln π_ref of what it will generate [B, K, C]."""
        collated, slots = self._collate(prompts)
        # The model wants at least one token, but the sampler shall leave empty places empty.
        length = np.where(prompts.rows < 0, 0, collated.prompt_length)
        batch, length, slots = global_arrays.place_whole((collated, length, slots), self._placement)
        keys = keys[np.maximum(prompts.rows, 0)]
        samples = self._sampler(params, batch.prompt_tokens, length, slots, keys)
        if self._ref_params is None:
            return samples, None
        # Not waiting for the samples, which alone would tell the host which slots they leave empty.
        tokens, length = jax.device_put((samples.tokens, samples.length), self._placement)
        batch = batch._replace(completion_tokens=tokens, completion_length=length)
        return samples, self._ref_token_logp(self._ref_params, batch)

    def _collate(self, prompts: packing.LengthBatch) -> tuple[GroupBatch, np.ndarray]:
        """Prompts of a batch with every slot of the samples to come, and the prompts' slots."""
        num_samples, size = self._generation.num_samples, self._generation.max_new_tokens
        num_blocks, room = self._num_blocks, prompts.capacity.tokens
        own = self._batch_size // num_blocks * num_samples * size
        blank = {
            "completion_tokens": (np.zeros(size, np.int32),) * num_samples,
            "rewards": None,
            "ref_logps": None,
        }
        batch = groups.collate(
            [None if i < 0 else replace(self._prompts[i], **blank) for i in prompts.rows],
            batch_size=self._batch_size,
            prompt_sizes=prompts.prompt_sizes,
            num_completions=num_samples,
            completion_size=size,
            num_blocks=num_blocks,
            capacity=packing.Capacity(room + own, own),
        )
        slots = packing.prompt_slots(batch.prompt_length, prompts.prompt_sizes, num_blocks, room)
        return batch, slots

    def _measure(
        self, rows: Sequence[int], samples: Samples, ref_token_logp: np.ndarray | None
    ) -> list[Generation]:
        """Texts and log-probabilities of one batch of samples, prompt by prompt; no rewards yet."""
        found = []
        for b, index in enumerate(rows):
            prompt = self._prompts[index]
            for k in range(self._generation.num_samples):
                n, has_eos = int(samples.length[b, k]), bool(samples.has_eos[b, k])
                logp = np.asarray(samples.token_logp[b, k, :n], np.float64)
                log_ratio = np.full(n, np.nan)
                if ref_token_logp is not None:
                    log_ratio = logp - ref_token_logp[b, k, :n].astype(np.float64)
                ids = samples.tokens[b, k, : n - has_eos]
                found.append(
                    Generation(
                        index=index,
                        id=prompt.id,
                        prompt=prompt.prompt,
                        completion=self._tokenizer.decode(
                            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                        ),
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
        names = sorted({name for row in rows for name in row})
        columns = {name: [row.get(name) for row in rows] for name in names}
        rewards, _ = self._rewards(
            [g.prompt for g in found], [g.completion for g in found], columns
        )
        penalty = self._generation.missing_eos_reward
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
        f"sample/{i}": f"[reward {g.reward:.3f}] {g.completion.strip()}"
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
    by_prompt: dict[str, list[float]] = {}
    for g in generations:
        if np.isfinite(g.reward):
            by_prompt.setdefault(g.prompt, []).append(g.reward)
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
