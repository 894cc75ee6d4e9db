"""The peers' scripts: called as they want to be, and the torch loop has our loss."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from copg_jax import losses
from copg_jax.hf import weights
from copg_jax.models.forward import make_seq_logp
from copg_jax.models.params import Architecture, init_params
from copg_jax.objective import make_policy_loss
from experiments.benchmark import compare, train
from experiments.benchmark.workload import Workload
from tests.toys import LLAMA, names_all


def test_every_script_of_the_folder_is_a_peer():
    found = {path.name for path in compare.FOLDER.glob("*.py")}
    assert found == {peer.file for peer in compare.PEERS.values()} | {"shared.py"}


@pytest.fixture
def commands(rows, write, tmp_path) -> dict[str, tuple[str, ...]]:
    """The commands of all peers, in a Python that has no package at all."""
    config = tmp_path / "config.json"
    compare.write_config(LLAMA, config)
    settings = compare.Settings(
        workload=write(rows),
        config=config,
        shape="tiny",
        batch=2,
        steps=3,
        warmup=1,
        prompts=4,
        new=5,
        remat="full",
        cuda=False,
    )
    envs = {"torch": sys.executable, "tunix": sys.executable}
    found = compare.find(list(compare.PEERS), envs=envs, own=("ours",), settings=settings)
    alone = ("-I", "-S")  # sees neither this environment nor the folder of the script
    start = "import runpy, sys; sys.path.insert(0, sys.argv[1]); del sys.argv[1]; "
    start += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    return {
        one.name: (sys.executable, *alone, "-c", start, str(compare.FOLDER), *one.command[1:])
        for one in found
        if one.name in compare.PEERS
    }


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("torch", "torch transformers"),
        ("trl", "torch trl accelerate"),
        ("tunix", "google-tunix"),
        ("hf_generate", "torch transformers"),
    ],
)
def test_without_its_packages_a_script_takes_its_arguments_and_says_what_to_install(
    commands, name, packages
):
    done = subprocess.run(commands[name], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    names_all(done.stderr, [f"error: {compare.PEERS[name].file} wants", f"install {packages}\n"])


def test_a_row_that_is_no_pair_is_refused_by_scripts_that_train(commands, rows, write):
    rows[1]["completion_ids"].append([1])
    write(rows)
    for name in ("torch", "trl", "tunix"):
        done = subprocess.run(commands[name], capture_output=True, text=True)
        assert done.returncode == 2 and "wanted two completions in every row" in done.stderr


@pytest.mark.oracle("torch")
def test_the_torch_loop_has_our_loss_on_the_same_ids_and_weights(
    rows, groups, tmp_path, monkeypatch
):
    import torch
    import transformers

    monkeypatch.syspath_prepend(str(compare.FOLDER))
    import torch_loop

    arch = Architecture(**vars(LLAMA) | {"rope_theta": 500.0, "rms_norm_eps": 1e-2})
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(arch, jax.random.key(0)))
    weights.save_pretrained(tmp_path / "hf", arch, params, head="lm", tokenizer=tokenizer())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    # From the sizes that peers are told.
    compare.write_config(arch, tmp_path / "config.json")
    sizes = json.loads((tmp_path / "config.json").read_text())
    told = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    told.load_state_dict(model.state_dict())

    (batch,) = train.make_batches(Workload(groups), len(groups), 1, 1)
    loss_fn = make_policy_loss(make_seq_logp(arch), losses.copg_loss)
    ours = jax.jit(loss_fn)(params, batch, beta=train.ARGUMENTS["beta"])
    with torch.no_grad():
        theirs = torch_loop.copg_loss(told, torch_loop.collate(rows))
        pieces = [torch_loop.copg_loss(told, b) for b in torch_loop.make_batches(rows, 5)]
    np.testing.assert_allclose(theirs, ours.total / ours.weight, rtol=1e-4)
    np.testing.assert_allclose(np.mean(pieces), theirs, rtol=1e-5)


def tokenizer():
    """Gives ids of BOS, EOS and padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
