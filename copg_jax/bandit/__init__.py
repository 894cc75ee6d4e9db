"""The paper's Sec. 5 and its theory, exact: everything can be enumerated, so every claim is a
number.

1. `exact`: J, L, π*, regret, KL of a (contextual) bandit, and when the data determine π*;
2. `population`: expected gradients of each algorithm and where following them ends;
3. `sequences`: the same on a tiny autoregressive model, through the code that trains Llama;
4. `train`: figure 1, sampled training of every algorithm in one `jit`;
5. `several`: several rewards, their weighted sums and policies that are joined;
6. `ablations` and `instability`: what a researcher would ask next;
7. `figures`: curves on given axes.

Run it in float64: ``with jax.enable_x64(True): ...``; `exact.make_bandit` insists.
"""
