# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model, your own scored pairs
#
# `copg_jax` asks one thing of a language model: a function `seq_logp(params, batch)` that returns ln π of every
# completion, summed over its tokens. Here the model is one layer of attention in Flax NNX. The data are eight questions to a
# help desk, each with two replies that a reader gave points. None of the package's own models and file formats is used.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from copg_jax import (
    GroupBatch,
    copg_loss,
    create_state,
    make_nll_loss,
    make_policy_loss,
    make_train_step,
)

# %config InlineBackend.figure_formats = ["png"]

# %% [markdown]
# ## The data
# Prompts, and two replies with their scores. Scores are numbers on any scale. Only their difference within a pair counts, and
# its size counts too: a preference label would keep no more than its sign.

# %%
PAIRS = [
    ("where is my parcel", {"it left our store today": 4.0, "no idea": 0.5}),
    ("my parcel is late", {"sorry we will call today": 3.5, "please wait": 2.0}),
    ("the box is broken", {"it was fine": 1.0, "sorry we will send a new box": 4.5}),
    ("can i return the lamp", {"yes within a month": 3.0, "yes please send it today": 3.5}),
    ("i want my money back", {"we will send it today": 4.0, "please wait a month": 2.0}),
    ("the lamp is too small", {"it is fine": 1.0, "sorry we have a new lamp": 3.5}),
    ("who will call me", {"we will call you today": 3.0, "no idea please wait": 0.0}),
    ("is the store open", {"yes": 2.5, "yes we are open today": 3.0}),
]

# %% [markdown]
# ## One batch
# Words are numbered from 1; 0 ends a reply and fills what is left. A `GroupBatch` holds B prompts with K completions each,
# padded on the right, and their lengths. `ref_logp` is ln π_ref. It is filled in below, once there is a π_ref.

# %%
words = sorted({word for prompt, replies in PAIRS for word in " ".join([prompt, *replies]).split()})
ids = lambda text: [1 + words.index(word) for word in text.split()] + [0] * (8 - len(text.split()))
batch = GroupBatch(
    prompt_tokens=np.array([ids(prompt) for prompt, _ in PAIRS]),  # [B, P]
    prompt_length=np.array([len(prompt.split()) for prompt, _ in PAIRS]),  # [B]
    completion_tokens=np.array([[ids(text) for text in replies] for _, replies in PAIRS]),
    completion_length=np.array([[1 + len(text.split()) for text in r] for _, r in PAIRS]),
    reward=np.array([list(replies.values()) for _, replies in PAIRS]),  # [B, K]
    ref_logp=np.zeros((len(PAIRS), 2)),  # [B, K], nats
)


# %% [markdown]
# ## The model
# The last position of the prompt predicts the first word of the reply, and so on. What fills a short prompt is read like a
# word. `seq_logp` leaves out what follows the end of a reply.


# %%
class Model(nnx.Module):
    def __init__(self, rngs, size=64):
        self.embed = nnx.Embed(len(words) + 1, size, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, size, decode=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.embed.attend(x + self.attention(x, mask=nnx.make_causal_mask(tokens)))


graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)


def seq_logp(params, batch):
    reply = batch.completion_tokens  # [B, K, C]
    prompt = jnp.repeat(batch.prompt_tokens[:, None], reply.shape[1], axis=1)  # [B, K, P]
    logp = jax.nn.log_softmax(nnx.merge(graph, params, rest)(jnp.concatenate([prompt, reply], -1)))
    logp = jnp.take_along_axis(logp[:, :, prompt.shape[2] - 1 : -1], reply[..., None], -1)[..., 0]
    keep = jnp.arange(reply.shape[2]) < batch.completion_length[..., None]
    return jnp.where(keep, logp, 0).sum(-1)  # [B, K], nats


# %% [markdown]
# ## π_ref by supervised learning, then CoPG
# π_ref is the model after a few steps of maximum likelihood on all replies, good and poor alike. Its log-probabilities never
# change, so they are computed once and stored in the batch. Then the policy learns from the scores. β is an argument of the
# compiled step, so that both values run the same program.
#
# The optimum of CoPG has β·Δ = ΔR for every pair: the gap of the log-ratios, times β, is the gap of the scores. That is the
# grey line. π_ref has Δ = 0.

# %%
adam = optax.adam(3e-3)
sft, state = make_train_step(make_nll_loss(seq_logp), adam), create_state(adam, params)
for _ in range(25):
    state, _ = sft(state, batch)
ref, batch = state.params, batch._replace(ref_logp=seq_logp(state.params, batch))
step = make_train_step(make_policy_loss(seq_logp, copg_loss), adam)
plt.axes(xlabel="β·Δ, learnt", ylabel="ΔR, from the scores").axline((0, 0), slope=1, color="0.7")
for beta, num_steps, marker in [(0.5, 4, "x"), (0.5, 300, "o"), (2.0, 300, "+")]:
    state = create_state(adam, ref)
    for _ in range(num_steps):
        state, metrics = step(state, batch, beta=beta)
    gap = np.diff(seq_logp(state.params, batch) - batch.ref_logp)  # Δ, nats
    print(label := f"β = {beta}, {num_steps} steps: r² = {metrics['copg/reward_r2']:.3f}")
    plt.plot(beta * gap, np.diff(batch.reward), marker, fillstyle="none", label=label)
plt.legend(frameon=False).set_title("a mark is a pair")
