"""CoPG in a PyTorch loop written by hand for speed: prints pairs_per_s.

Its environment needs torch and transformers. The settings are fair, and strong:

- the objective is the one that ours is timed with: −(ΔR·Δ − β/2·Δ²), averaged over pairs;
- ln π_ref is known before the loop, as in ours: no second model runs;
- batches have sequences of like length and are padded to their longest, on the right. A causal
  model never looks at padding there, so that attention takes no mask and its fastest kernel;
- logits exist at completion positions only; Adam is the fused one, without weight decay;
- nothing is recomputed in the backward pass, and batches are made before the clock starts.

On a GPU weights are float32 and products bfloat16 (autocast), as in ours.
"""
# pyright: reportMissingImports=false

import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import shared

BETA = 0.06


class Batch(NamedTuple):
    """Pairs as 2B sequences [prompt | completion], and where their M completion tokens are."""

    ids: Any  # [2B, T], padded with 0
    sequence: Any  # [M], of each completion token
    before: Any  # [M], position of the token that predicts it
    token: Any  # [M]
    reward: Any  # [B, 2], reward units
    ref_logp: Any  # [B, 2], nats


def make_batches(rows: Sequence[shared.Row], batch_size: int) -> list[Batch]:
    """Batches of rows of like length, in random order."""
    ordered = sorted(rows, key=lambda row: max(map(len, _sequences(row))))
    dealt = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    random.Random(0).shuffle(dealt)
    return [collate(part) for part in dealt]


def _sequences(row: shared.Row) -> list[list[int]]:
    return [row["prompt_ids"] + ids for ids in row["completion_ids"]]


def collate(rows: Sequence[shared.Row]) -> Batch:
    """One batch of pairs."""
    import torch

    whole = [ids for row in rows for ids in _sequences(row)]
    starts = [len(row["prompt_ids"]) for row in rows for _ in row["completion_ids"]]
    where = [
        (index, position)
        for index, (start, ids) in enumerate(zip(starts, whole, strict=True))
        for position in range(start, len(ids))
    ]
    longest = max(map(len, whole))
    return Batch(
        ids=torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole]),
        sequence=torch.tensor([index for index, _ in where]),
        before=torch.tensor([position - 1 for _, position in where]),
        token=torch.tensor([whole[index][position] for index, position in where]),
        reward=torch.tensor([row["rewards"] for row in rows]),
        ref_logp=torch.zeros(len(rows), 2),  # as the workload is read for ours
    )


def copg_loss(model: Any, batch: Batch) -> Any:
    """−(ΔR·Δ − β/2·Δ²), averaged over pairs; Δ is the gap of ln π − ln π_ref. Minimised."""
    import torch
    import torch.nn.functional as F

    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[batch.sequence, batch.before]).float()
    token_logp = -F.cross_entropy(logits, batch.token, reduction="none")
    seq_logp = torch.zeros(len(batch.ids), device=logits.device)
    seq_logp = seq_logp.index_add(0, batch.sequence, token_logp).view(-1, 2)
    log_ratio = seq_logp - batch.ref_logp
    gap = log_ratio[:, 0] - log_ratio[:, 1]
    reward_gap = batch.reward[:, 0] - batch.reward[:, 1]
    return -(reward_gap * gap - BETA / 2 * gap**2).mean()


def main() -> None:
    """Warms up, then times every step from the transfer of its batch to its loss on the host."""
    args = shared.parse(__doc__, training=True)
    shared.need(torch="torch", transformers="transformers")
    import os

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    device = "cuda" if args.cuda else "cpu"
    model: Any = LlamaForCausalLM(LlamaConfig(**args.arch))
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)

    def step(batch: Batch) -> float:
        batch = Batch(*(part.to(device) for part in batch))
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=args.cuda):
            loss = copg_loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    first = args.warmup * args.batch
    for batch in make_batches(args.rows[:first], args.batch):
        step(batch)
    timed = make_batches(args.rows[first:], args.batch)
    start = time.perf_counter()
    losses = [step(batch) for batch in timed]
    seconds = time.perf_counter() - start
    shared.show(
        peer="torch",
        pairs_per_s=args.steps * args.batch / seconds,
        step_s=seconds / args.steps,
        loss=losses[-1],
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
