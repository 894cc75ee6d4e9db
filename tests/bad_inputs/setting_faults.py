"""Settings that no stage can follow: values, files, interpolations, the command line."""

from tests.bad_inputs.ground import Case, files, runs, settings


def value(stage: str, field: str, given: str) -> Case:
    """A field of a stage with a value that it cannot have."""
    return Case(f"{field}={given}", settings(stage, f"{field}={given}"), (field,))


def config(name: str, text: str | bytes, line: int | None, *words: str) -> Case:
    """A config file of SFT and the line of it that is at fault."""
    place = f"run.yaml:{line}" if line else "run.yaml"
    return Case(name, settings("sft", make=files(run__yaml=text)), (place, *words))


def argument(name: str, *given: str, words: tuple[str, ...], stage: str = "sft") -> Case:
    """Arguments on the command line."""
    return Case(name, settings(stage, *given), words)


VALUES = [
    ("sft", "training.save_every", "0"),
    ("sft", "training.eval_every", "-5"),
    ("sft", "training.batch_size", "0"),
    ("sft", "training.num_epochs", "0"),
    ("sft", "training.num_epochs", "1e3"),
    ("sft", "training.max_steps", "3.0"),
    ("sft", "data.max_completion_tokens", "-1"),
    ("sft", "data.holdout_fraction", "1.5"),
    ("evaluate", "evaluation.data.part", "dev"),
    ("sft", "data.invalid_rows", "ignore"),
    ("sft", "model.attention", "flash"),
    ("sft", "optim.decay", "linear"),
    ("sft", "optim.warmup_fraction", "1.5"),
    ("sft", "optim.weight_decay", "-0.1"),
    ("sft", "optim.clip_norm", "0"),
    ("sft", "optim.b1", "1"),
    ("sft", "optim.learning_rate", "1e-50"),
    ("sft", "mesh.fsdp", "1.5"),
    ("reward", "distributed", "maybe"),
    ("reward", "seed", "0x1ffffffff"),
    ("score", "reference.dtype", "fp16"),
    ("score", "batch_size", "0"),
    ("score", "logits_chunk", "-1"),
    ("policy", "loss.beta", "1e-50"),
    ("policy", "loss.arguments", "{beta: 1}"),
    ("policy", "loss.arguments", "{baseline: .nan}"),
    ("evaluate", "beta", ".inf"),
    ("evaluate", "evaluation.generation.num_samples", "0"),
    ("evaluate", "evaluation.generation.max_new_tokens", "-3"),
    ("evaluate", "evaluation.generation.batch_size", "0"),
    ("evaluate", "evaluation.generation.missing_eos_reward", "-.inf"),
    ("evaluate", "evaluation", "null"),
    ("policy", "data.combine", "mean"),
    ("policy", "data.combine", "min"),  # without weights
    ("policy", "data.rewards", "{a: 0}"),
    ("policy", "data.rewards", "{a: .nan}"),
    ("policy", "data.rewards", "[a]"),
]

CONFIGS = [
    config("a tab as indentation", "seed: 1\noptim:\n\tlearning_rate: 1\n", 3),
    config("a file in UTF-16", "seed: 1\n".encode("utf-16"), None),
    config("a section given twice", "optim: {b1: 0.5}\nseed: 1\noptim: {b2: 0.5}\n", 3, "'optim'"),
    config("a list for a section", "seed: 1\ntraining: [8]\n", 2, "training"),
    config("a section for a number", "seed: 1\ntraining:\n  max_steps: {a: 1}\n", 3, "max_steps"),
    config("two values on a line", "seed: 1\ndata: path: d\n", 2),
    config("a quote that does not end", "seed: 1\ndata: {path: 'd}\n", None),
    config("a key with a colon in it", "seed: 1\ntraining.max_steps:3\n", None),
    config("a JSON list", '[{"seed": 1}]\n', 1),
    config("a number with a unit", "training:\n  batch_size: 8 # rows\n  max_steps: 10k\n", 3),
    config("a date as a fraction", "optim:\n  b1: 2024-10-01\n", 2, "optim.b1"),
    Case(
        "a folder as a config",
        settings("sft", make=lambda ground, here: (here / "run.yaml").mkdir()),
        ("run.yaml",),
    ),
    *(
        config(f"the resolver {name}", f"seed: 1\ndata:\n  split: ${{{call}}}\n", 3, name)
        for name, call in {
            "oc.decode": "oc.decode:'a'",
            "oc.create": "oc.create:{a:1}",
            "oc.select": "oc.select:seed",
            "oc.dict.keys": "oc.dict.keys:optim",
            "oc.deprecated": "oc.deprecated:seed",
            "eval": "eval:'1+1'",
        }.items()
    ),
    config(
        "a variable of the environment that is not set",
        "seed: 1\nmodel:\n  revision: ${oc.env:COPG_IS_NOT_SET}\n",
        3,
        "COPG_IS_NOT_SET",
    ),
    config("a field that reads itself", "seed: 1\ndata: {split: '${data.split}/x'}\n", 2),
]

ARGUMENTS = [
    argument("an argument in the manner of Hydra", "+training.max_steps=3", words=("+training",)),
    argument("an argument with a colon", "training.max_steps: 3", words=("training.max_steps: 3",)),
    argument("an index into a text", "data.path[0]=x", words=("data.path[0]",)),
    argument("a field below a number", "seed.a=1", words=("seed",)),
    argument("a field of another stage", "loss.beta=0.1", words=("'loss",)),
    argument("an empty field", "data.=x", words=("data.",)),
    argument("a section that is null", "data=null", words=("data",)),
    argument(
        "rewards that are a number", "evaluation.rewards=3", words=("rewards",), stage="evaluate"
    ),
]

SPECS = [
    ("clip: [1, -1]", "clip"),
    ("clip: [1, 1]", "clip"),
    ("clip: [1]", "clip"),
    ("clip: 1", "clip"),
    ("clip: [0, .nan]", "clip"),
    ("name: a/b", "name"),
    ("name: ''", "name"),
    ("overlong: 5", "overlong"),
    ("overlong: {}", "overlong.max_tokens"),
    ("overlong: {max_tokens: 4, buffer_tokens: 5}", "overlong.buffer_tokens"),
    ("overlong: {max_tokens: 4, penalty: -1}", "overlong.penalty"),
]
REWARDS = [
    argument(
        "held-out data of another reward",
        "data.rewards={a: 1}",
        "validation.path=d",
        words=("validation.rewards", "data.rewards"),
        stage="policy",
    ),
    *(
        argument(
            f"a reward with {spec}",
            f"rewards=[{{function: copg_jax.rewards.length, {spec}}}]",
            words=(f"rewards[0].{field}",),
            stage="score",
        )
        for spec, field in SPECS
    ),
]
TWO = "data.sources=[{{path: a, share: {}}}, {{path: b, share: {}}}]"
POOLS = [
    argument("shares that do not sum", "data.path=null", TWO.format(0.5, 0.4),
             words=("data.sources", "sum to 1"), stage="policy"),
    argument("a share of one source alone", "data.path=null", TWO.format(0.5, "null"),
             words=("data.sources", "sum to 1"), stage="policy"),
    argument("a share below zero", "data.path=null", TWO.format(1.5, -0.5), words=("share",),
             stage="policy"),
    argument("sources beside a path", "data.path=a", TWO.format(0.5, 0.5), words=("data.path",),
             stage="policy"),
    argument("neither sources nor a path", "data.path=null", words=("data.path",), stage="policy"),
    argument("shares of pairs across origins", "data.path=null", TWO.format(0.5, 0.5),
             "loss.pairs=cross", words=("data.sources", "loss.pairs"), stage="policy"),
    argument("rewards standardised by each folder alone", "data.path=null", "data.rewards={a: 1}",
             "data.combine=standardized_sum", TWO.format(0.5, 0.5),
             words=("data.combine", "sources"), stage="policy"),
    argument("held-out rewards standardised by another folder", "data.rewards={a: 1}",
             "data.combine=standardized_sum", "validation.path=other", "validation.rewards={a: 1}",
             "validation.combine=standardized_sum",
             words=("validation.combine", "another folder"), stage="policy"),
    argument("held-out pairs across origins", "loss.pairs=cross", "validation.path=other",
             words=("validation", "loss.pairs=cross"), stage="policy"),
    argument("pairs across origins of DPO", "loss.name=dpo", "loss.pairs=cross",
             words=("loss", "pairs=cross"), stage="policy"),
    argument("an origin that is none", "data.path=null", "data.sources=[{path: a, origin: 8}]",
             words=("origin",), stage="policy"),
    argument("several samples of greedy decoding", "sampling.temperature=0",
             words=("sampling", "temperature=0"), stage="sample"),
    argument("samples of no total", "sampling.top_p=0", words=("top_p",), stage="sample"),
]  # fmt: skip

LOSSES = [
    ("math.sqrt", "{}"),
    ("builtins.print", "{}"),
    ("os.getcwd", "{}"),
    ("tests.toys", "{}"),
    ("json.no_such", "{}"),
    ("a..b", "{}"),
    ("rloo", "{k: 2}"),
    ("pg", "{baselin: 1}"),
    ("dpo", "{label_smoothing: 0.1}"),
]

STAGES = [
    Case(
        "weights that name a reward that is not stored",
        runs("policy", "data.rewards={lenght: 1.0}"),
        ("data.rewards", "'lenght'", "it has length"),
    ),
    Case(
        "weights for data that was not scored",
        runs("sft", "data.rewards={length: 1.0}"),
        ("data.rewards", "experiments.score"),
    ),
    Case(
        "prompts without text",
        runs(
            "sample",
            "data.path=HERE/rows.jsonl",
            make=files(rows__jsonl='{"prompt": "a"}\n{"prompt": " "}\n'),
        ),
        ("rows.jsonl:2", "'prompt' is empty"),
    ),
    Case(
        "prompts of no name",
        runs("sample", "data.path=HERE/rows.jsonl", make=files(rows__jsonl='{"promt": "a"}\n')),
        ("rows.jsonl:1", "wanted a `prompt`", "promt"),
    ),
    Case(
        "samples longer than the model's positions",
        runs(
            "sample",
            "data.path=HERE/rows.jsonl",
            "sampling.max_new_tokens=100000",
            make=files(rows__jsonl='{"prompt": "a"}\n'),
        ),
        ("max_new_tokens", "max_position_embeddings"),
    ),
    Case(
        "prompts that an engine did not answer",
        runs(
            "score",
            "data.path=HERE/rows.jsonl",
            "prompts=HERE/prompts.jsonl",
            make=files(
                rows__jsonl='{"prompt": "a", "completions": ["b"], "prompt_token_ids": [3], '
                '"completion_token_ids": [[5]], "rewards": [1]}\n',
                prompts__jsonl='{"prompt": "a", "prompt_token_ids": [3]}\n'
                '{"prompt": "c", "prompt_token_ids": [4]}\n',
            ),
        ),
        ("1 are missing", "prompts.jsonl:2"),
    ),
    Case(
        "an evaluation without reward functions",
        runs("evaluate", "evaluation.rewards=[]"),
        ("rewards",),
    ),
    Case(
        "completions longer than the model's positions",
        runs("evaluate", "evaluation.generation.max_new_tokens=100000"),
        ("max_new_tokens", "max_position_embeddings"),
    ),
    Case(
        "completions longer than what the prompts leave of them",
        runs(
            "policy",
            "evaluation={data: {path: HERE/rows.jsonl}}",
            "evaluation.generation.num_prompts=1",
            "evaluation.rewards=[{function: copg_jax.rewards.length}]",
            "evaluation.generation.max_new_tokens=4092",
            make=files(rows__jsonl='{"prompt": "Say a.", "completion": "a"}\n'),
        ),
        ("max_new_tokens", "4091"),
    ),
    *(
        Case(
            f"the loss {name} with {arguments}",
            runs("policy", f"loss.name={name}", f"loss.arguments={arguments}"),
            (name, "loss."),
        )
        for name, arguments in LOSSES
    ),
]

CASES = [*(value(*row) for row in VALUES), *CONFIGS, *ARGUMENTS, *REWARDS, *POOLS, *STAGES]
