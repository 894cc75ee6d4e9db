"""Evaluation: held-out losses, and rewards of the policy's own generations.

`make_loss_evaluator` averages a loss function's metrics over a held-out set.

`GenerationEvaluator` estimates J(π) = E[R] − β·KL(π‖π_ref) by sampling, on the same prompts each
time:
1. sample completions of a fixed list of prompts;
2. decode them up to EOS and call the reward function on the texts;
3. compute ln π_ref of the same tokens and estimate the KL from the samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from copg_jax import policy, sharding
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
    dealt = packing.deal(tokens.sum(1), batch_size=batch_size, num_blocks=num_blocks)
    blocks = packing.block_tokens(tokens, dealt, num_blocks=num_blocks)
    capacity = packing.Capacity(int(blocks.sum(-1).max()), int(blocks[..., 1].max()))

    def launched(params: Any) -> Iterator[dict[str, Any]]:
        for rows in dealt:
            batch = groups.collate(
                [None if row < 0 else dataset[row] for row in rows],
                batch_size=batch_size,
                prompt_size=prompt_size,
                num_completions=num_completions,
                completion_size=completion_size,
                num_blocks=num_blocks,
                capacity=capacity,
            )
            yield loss_step(params, sharding.place_whole(batch, placement))

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
        self._mesh, self._ref_params = mesh, ref_params
        shards = sharding.num_batch_shards(mesh)
        self._batch_size = -(-min(generation.batch_size, len(prompts)) // shards) * shards
        # The same at every evaluation, so that later ones compile nothing.
        self._batches = packing.batches_by_length(
            np.array([(len(prompt.prompt_tokens), 0) for prompt in prompts]),
            batch_size=self._batch_size,
            num_blocks=shards,
        )
        rows = sharding.batch_sharding(mesh)
        self._ref_token_logp = jax.jit(
            sharding.batch_parallel(mesh)(partial(policy.token_logp, config, chunk=logits_chunk)),
            in_shardings=(None, rows),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, params: Any, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics (`eval/…`) and sample texts of the policy `params` at `step`; see `summarize`."""
        found = [g for batch in self.batches(params, step) for g in batch]
        prompts = np.concatenate([batch.rows[batch.rows >= 0] for batch in self._batches])
        order = np.argsort(prompts.repeat(self._generation.num_samples), kind="stable")
        generations = [found[i] for i in order]
        texts = sample_texts(generations, self._generation)
        return summarize(generations, beta=self._beta), texts

    def batches(self, params: Any, step: int, first: int = 0) -> Iterator[list[Generation]]:
        """Generates and judges batch by batch, from the longest prompts to the shortest.

        Args:
            params: the policy's parameters.
            step: folded into the seed; the same step gives a prompt the same samples, whatever its
                batch.
            first: prompts to skip, when going on with an interrupted evaluation.
        """
        keys = row_keys(self._generation.seed, step, len(self._prompts))
        rows = [batch.rows[batch.rows >= 0] for batch in self._batches]
        ends = np.cumsum([len(present) for present in rows])
        num_finished = int((ends <= first).sum())
        launched = (self._launch(params, keys, batch) for batch in self._batches[num_finished:])
        # Texts and rewards of a batch are made while the device generates the next one.
        for number, (samples, ref_logp) in enumerate(one_late(launched), start=num_finished):
            prompts = [self._prompts[i] for i in rows[number]]
            present = self._batches[number].rows >= 0
            samples, ref_logp = jax.tree.map(
                lambda x, present=present: x[present], jax.device_get((samples, ref_logp))
            )
            found = self._judge(prompts, self._measure(prompts, samples, ref_logp))
            done = max(0, first - int(ends[number] - len(prompts)))
            yield found[done * self._generation.num_samples :]

    def _launch(
        self, params: Any, keys: Array, prompts: packing.LengthBatch
    ) -> tuple[Samples, Array | None]:
        """Starts the generation of a batch, and ln π_ref of what it will generate [B, K, C]."""
        batch, prompt_slots = sharding.place_whole(
            self._collate(prompts), sharding.batch_sharding(self._mesh)
        )
        # Places without a prompt generate too, with any key; nobody reads that.
        samples = self._sampler(
            params,
            batch.prompt_tokens,
            batch.prompt_length,
            prompt_slots,
            keys[np.maximum(prompts.rows, 0)],
        )
        if self._ref_params is None:
            return samples, None
        # Not waiting for the samples, which alone would tell the host which slots they leave empty.
        tokens, length = jax.device_put(
            (samples.tokens, samples.length), sharding.batch_sharding(self._mesh)
        )
        batch = batch._replace(completion_tokens=tokens, completion_length=length)
        return samples, self._ref_token_logp(self._ref_params, batch)

    def _collate(self, prompts: packing.LengthBatch) -> tuple[GroupBatch, np.ndarray]:
        """Prompts of a batch with every slot of the samples to come, and the prompts' slots."""
        num_samples, size = self._generation.num_samples, self._generation.max_new_tokens
        num_blocks = sharding.num_batch_shards(self._mesh)
        batch = groups.collate(
            [],
            batch_size=self._batch_size,
            prompt_size=prompts.prompt_size,
            num_completions=num_samples,
            completion_size=size,
        )
        for place, row in enumerate(prompts.rows):
            if row >= 0:
                ids = self._prompts[row].prompt_tokens
                batch.prompt_tokens[place, : len(ids)] = ids
                batch.prompt_length[place] = len(ids)
        batch.completion_length[:] = size
        prompt_room, own = (
            prompts.capacity.tokens,
            self._batch_size // num_blocks * num_samples * size,
        )
        prompt_slots = packing.slots_of(
            batch.prompt_length, prompts.prompt_size, num_blocks, prompt_room
        )
        capacity = packing.Capacity(prompt_room + own, own)
        return groups.with_slots(batch, num_blocks=num_blocks, capacity=capacity), prompt_slots

    def _measure(
        self, chunk: Sequence[TokenGroup], samples: Samples, ref_token_logp: np.ndarray | None
    ) -> list[Generation]:
        """Texts and log-probabilities of one batch of samples, prompt by prompt; no rewards yet."""
        found = []
        for b, prompt in enumerate(chunk):
            for k in range(self._generation.num_samples):
                n, has_eos = int(samples.length[b, k]), bool(samples.has_eos[b, k])
                logp = np.asarray(samples.token_logp[b, k, :n], np.float64)
                log_ratio = np.full(n, np.nan)
                if ref_token_logp is not None:
                    log_ratio = logp - ref_token_logp[b, k, :n].astype(np.float64)
                ids = samples.tokens[b, k, : n - has_eos]
                found.append(
                    Generation(
                        id=prompt.id,
                        prompt=prompt.prompt,
                        completion=self._text(ids),
                        reward=np.nan,
                        logp=float(logp.sum()),
                        ref_logp=float((logp - log_ratio).sum()),
                        kl_k3=float((np.expm1(-log_ratio) + log_ratio).sum()),
                        length=n,
                        has_eos=has_eos,
                    )
                )
        return found

    def _text(self, ids: Any) -> str:
        """What was written, blank for blank."""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _judge(self, chunk: Sequence[TokenGroup], found: list[Generation]) -> list[Generation]:
        """Fills in the rewards."""
        repeated = [prompt for prompt in chunk for _ in range(self._generation.num_samples)]
        names = sorted({name for prompt in chunk for name in prompt.columns})
        columns = {name: [row.columns.get(name) for row in repeated] for name in names}
        rewards, _ = self._rewards(
            [g.prompt for g in found], [g.completion for g in found], columns
        )
        penalty = self._generation.missing_eos_reward
        return [
            replace(g, reward=float(reward if penalty is None or g.has_eos else penalty))
            for g, reward in zip(found, rewards, strict=True)
        ]


def sample_texts(generations: Sequence[Generation], sizes: GenerationConfig) -> dict[str, str]:
    """The first completions of the first prompts, with their rewards, to look at."""
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
