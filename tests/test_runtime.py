"""The process around a run: what is written first, which folder is refused, how signals end it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from importlib import metadata

import jax
import pytest

from copg_jax import run_folder, runtime
from copg_jax.config.load import load_config
from copg_jax.config.options import option, section
from copg_jax.errors import InputError
from copg_jax.run_folder import check_run_folder, write_run_header
from copg_jax.runtime import GracefulExit


@dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-6


@dataclass(frozen=True)
class Config:
    beta: float = 0.1
    log_every: int = 10
    tags: list[str] = option([])
    optim: Optim = section(Optim)


_FAULTS = """
import resource, sys
import numpy as np
from copg_jax import run_folder, runtime

if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    before = faults()
    np.ones(2**24, np.float32)  # 64 MiB, freed at once
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: glibc keeps memory on Linux only")
def test_memory_of_one_step_is_kept_for_the_next_where_all_is_computed_on_cpus():
    def faults(how: str, **env: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0", **env}
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    mapped, kept = faults("leave"), faults("keep", JAX_PLATFORMS="cpu")
    # Each fault clears a page, of 4 KiB or, where the kernel gives large ones by itself, of 2 MiB.
    assert mapped >= 32 > 4 * kept


def test_the_header_holds_the_resolved_config_and_the_versions(tmp_path):
    folder = tmp_path / "runs" / "a"
    write_run_header(folder, Config(beta=0.3), {})
    assert load_config(Config, [str(folder / "config.yaml")]) == Config(beta=0.3)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert versions["transformers"] == metadata.version("transformers")
    assert versions["device_count"] == 8
    assert versions["platform"] == "cpu"
    assert versions["device_kind"]
    names = ["config.yaml", "inputs.json", "versions.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_run_that_began_with_another_content_is_refused(tmp_path):
    write_run_header(tmp_path, Config(), {"data": "a", "model": "b"})
    write_run_header(tmp_path, Config(), {"data": "a", "model": "b"})
    with pytest.raises(InputError, match=r"another content of: model \(.*another output_dir"):
        write_run_header(tmp_path, Config(), {"data": "a", "model": "c"})


def test_the_same_config_resumes(tmp_path):
    write_run_header(tmp_path, Config(), {})
    before = (tmp_path / "config.yaml").read_text()
    check_run_folder(tmp_path, Config())
    write_run_header(tmp_path, Config(), {})
    assert (tmp_path / "config.yaml").read_text() == before


def test_the_folder_of_another_run_is_refused_with_differences_and_fixes(tmp_path):
    write_run_header(tmp_path, Config(), {})
    other = Config(beta=0.3, log_every=5, optim=Optim(2e-5))
    with pytest.raises(InputError) as caught:
        check_run_folder(tmp_path, other, may_differ=["log_every"])
    text = str(caught.value)
    assert "beta: 0.1 -> 0.3" in text
    assert "optim.learning_rate: 1e-06 -> 2e-05" in text
    assert "log_every" not in text
    assert "another output_dir, or delete" in text
    assert load_config(Config, [str(tmp_path / "config.yaml")]) == Config()


@pytest.mark.parametrize("prefix", ["optim", "optim.learning_rate"])
def test_fields_that_may_differ_do_not_make_another_run(tmp_path, prefix):
    write_run_header(tmp_path, Config(), {})
    changed = replace(Config(), optim=Optim(2e-5))
    check_run_folder(tmp_path, changed, may_differ=[prefix])
    write_run_header(tmp_path, changed, {})
    assert load_config(Config, [str(tmp_path / "config.yaml")]) == changed


def test_a_prefix_ends_at_a_dot(tmp_path):
    write_run_header(tmp_path, Config(), {})
    with pytest.raises(InputError, match=r"optim\.learning_rate"):
        check_run_folder(tmp_path, Config(optim=Optim(1.0)), may_differ=["opt"])


def test_an_unreadable_earlier_config_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="could not read it"):
        check_run_folder(tmp_path, Config())


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(InputError, match="wanted a folder, got a file"):
        check_run_folder(path, Config())


def test_only_process_0_writes_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "is_main_process", lambda: False)
    write_run_header(tmp_path / "run", Config(), {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_becomes_a_flag_and_an_exit_code(name, code):
    previous = signal.getsignal(signal.Signals[name])
    with GracefulExit() as graceful:
        assert (graceful.requested, graceful.exit_code) == (None, 0)
        os.kill(os.getpid(), signal.Signals[name])
        assert (graceful.requested, graceful.exit_code) == (name, code)
    assert signal.getsignal(signal.Signals[name]) is previous


def test_a_second_signal_exits_at_once():
    script = """
        import os, signal
        from copg_jax.runtime import GracefulExit
        with GracefulExit():
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("not reached", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == "still here\n"
    assert "SIGTERM: saving after this step" in done.stderr


@pytest.mark.parametrize("names", ["cuda,cpu", "cuda", "tpu,cpu", "rocm"])
def test_an_accelerator_that_is_asked_for_and_not_there_is_named(names, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", names)
    with pytest.raises(
        InputError, match=f"JAX_PLATFORMS={names}: wanted {names.split(',')[0]}, got"
    ):
        runtime.check_platform()


@pytest.mark.parametrize("names", ["", "cpu", "cpu,cuda"])
def test_a_cpu_that_is_asked_for_or_left_to_jax_is_used(names, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", names)
    runtime.check_platform()


_FAILING = """
from jax._src import xla_bridge
from copg_jax import run_folder, runtime

def fail():
    raise RuntimeError("the device is in use")

xla_bridge.register_backend_factory("rocm", fail, priority=500, fail_quietly=False)
runtime.check_platform()
"""


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("", "RuntimeError: Unable to initialize backend 'rocm': the device is in use"),
        ("rocm,cpu", "RuntimeError: Unable to initialize backend 'rocm': the device is in use"),
        ("cuda", "InputError: JAX_PLATFORMS=cuda: wanted cuda, got nothing."),
    ],
)
def test_a_device_that_does_not_start_is_never_replaced_by_the_cpu(names, text):
    command = [sys.executable, "-c", _FAILING]
    environment = {**os.environ, "JAX_PLATFORMS": names}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and text in done.stderr


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_the_compilation_cache_has_a_default_and_obeys_the_environment(tmp_path, given):
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if given:
        environment["JAX_COMPILATION_CACHE_DIR"] = given
    script = (
        "import jax; from copg_jax import runtime; runtime.setup();"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == (given or str(tmp_path / ".cache" / "copg_jax" / "xla"))
