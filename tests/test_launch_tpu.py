"""launch_tpu.sh against a gcloud that records its calls and runs "remote" commands in folders."""

import shlex
import signal
import subprocess

import pytest

from tests.fake_cloud import HOSTILE, ROOT, FakeCloud

SLICE = ["pod", "v5litepod-16", "us-west4-a"]
TRAIN = ["python", "-m", "experiments.train_policy", "configs/a b.yaml", "rewards=[{f: 'x'}]"]


@pytest.fixture
def pod(tmp_path):
    cloud = FakeCloud(tmp_path)
    yield cloud
    cloud.end()


def remains(result) -> bool:
    """Whether the last line says that the slice goes on costing money, and how to end that."""
    last = result.err.strip().splitlines()[-1]
    delete = "launch_tpu.sh pod v5litepod-16 us-west4-a --project mine --delete"
    return "remains and costs money" in last and last.endswith(delete)


def test_it_creates_waits_copies_installs_and_runs(pod):
    pod.set_up("ABSENT", ["WAITING_FOR_RESOURCES PROVISIONING CREATING READY"])
    result = pod.launch(*SLICE, "--create", "--spot", "--", *TRAIN)
    assert result.status == 0, result.err
    (create,) = pod.calls("queued-resources", "create")
    assert set(create[5:]) == {
        "--node-id=pod",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--zone=us-west4-a",
        "--project=mine",
    }
    for state in ("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING"):
        assert f"slice pod: {state}" in result.err
    for worker in (0, 1):
        assert (pod.home(worker) / "arguments").read_text().splitlines() == TRAIN[1:]
        assert (pod.home(worker) / "copg_jax.log").read_text() == "training\n"
        assert (pod.home(worker) / "platforms").read_text() == "tpu,cpu\n"
        installed = (pod.home(worker) / "pip").read_text().split()
        assert installed[-4:] == ["--constraint", "constraints/py312.txt", "--editable", ".[tpu]"]
    assert remains(result)


def test_no_shell_on_the_way_reads_the_arguments(pod):
    wanted = ["-m", "experiments.train_policy", *(f"x={text}" for text in HOSTILE), *HOSTILE]
    result = pod.launch(*SLICE, "--", "python", *wanted)
    assert result.status == 0, result.err
    for worker in (0, 1):
        assert (pod.home(worker) / "words").read_text().split("\0")[:-1] == wanted
        assert list(pod.home(worker).rglob("ran")) == []
    assert list(pod.tree.rglob("ran")) == []


def test_only_the_log_of_worker_0_is_shown(pod):
    pod.set_up(train="echo I am worker $WORKER")
    assert pod.launch(*SLICE, "--", *TRAIN).out == "I am worker 0\n"
    assert (pod.home(1) / "copg_jax.log").read_text() == "I am worker 1\n"


def test_the_copy_is_what_git_tracks_or_would(pod):
    assert pod.launch(*SLICE, "--", *TRAIN).status == 0
    copied = {path.name for path in (pod.home(0) / "copg_jax").iterdir()}
    assert {"not tracked.py", "setup.py", "experiments"} <= copied
    assert not {"deleted", "runs", ".git"} & copied


def test_the_next_copy_replaces_the_last_one_and_nothing_that_a_run_wrote(pod):
    pod.set_up(train="mkdir -p results && echo step 1 >results/checkpoint")
    assert pod.launch(*SLICE, "--", *TRAIN).status == 0
    (pod.tree / "not tracked.py").rename(pod.tree / "renamed.py")
    assert pod.launch(*SLICE, "--", *TRAIN).status == 0
    copied = {path.name for path in (pod.home(1) / "copg_jax").iterdir()}
    assert {"renamed.py", "results", ".venv"} <= copied and "not tracked.py" not in copied


def test_an_existing_slice_is_reused_and_installed_once(pod):
    for _ in range(2):
        result = pod.launch(*SLICE, "--", *TRAIN)
        assert result.status == 0 and remains(result)
    assert pod.calls("create") == []
    assert (pod.home(0) / "pip").read_text().count("--editable") == 1
    (pod.tree / "setup.py").write_text("setup(1)\n")
    assert pod.launch(*SLICE, "--create", "--", *TRAIN).status == 0
    assert (pod.home(0) / "pip").read_text().count("--editable") == 2
    assert pod.calls("create") == []


def test_one_failing_worker_fails_the_launch_and_shows_its_log(pod):
    pod.set_up(train='echo on $WORKER; [ $WORKER = 0 ] || { echo "out of memory"; exit 3; }')
    result = pod.launch(*SLICE, "--", *TRAIN)
    assert result.status == 3
    assert "worker 1 failed with exit status 3" in result.err and "out of memory" in result.err
    assert result.out == "on 0\n"
    assert remains(result)
    assert len(pod.calls("scp")) == 1


@pytest.mark.parametrize("tools", [{}, {"python3": 'echo "$@" >>~/uv; cp -r "$CLOUD/venv" .venv'}])
def test_a_worker_without_python_3_11_gets_one_or_fails(pod, tools):
    for name, text in ({"python3.12": "exit 1"} | tools).items():
        pod.give_workers(name, text)
    result = pod.launch(*SLICE, "--", *TRAIN)
    if tools:
        assert result.status == 0
        assert "-m uv venv" in (pod.home(1) / "uv").read_text()
    else:
        assert result.status == 2
        assert "wanted Python 3.11, 3.12 or 3.13" in result.err
        assert not (pod.home(0) / "arguments").exists()


def test_a_gcloud_that_gives_no_answer_for_a_while_ends_no_run_and_repeats_none(pod):
    pod.set_up("READY BROKEN", train="sleep 1; echo done")
    result = pod.launch(*SLICE, "--create", "--", *TRAIN)
    assert result.status == 0 and result.out == "done\n"
    broken = f'[ -e ~/runs ] || echo {"BROKEN " * 24} READY >"$CLOUD/states"'
    pod.set_up(train=f"{broken}; echo run >>~/runs; exit 3")
    result = pod.launch(*SLICE, "--", *TRAIN)
    assert result.status == 3 and (pod.home(0) / "runs").read_text() == "run\n"
    assert "UNAUTHENTICATED" in result.err.partition("looking for a minute")[2]


@pytest.mark.parametrize("states", ["READY", "CREATING READY"])
def test_a_run_that_succeeds_while_the_connection_is_lost_has_succeeded(pod, states):
    pod.set_up(
        train=f"""
echo run >>~/runs
[ $WORKER != 0 ] || until pkill -f "${{CLOUD%cloud}}bin/gcloud .*follow"; do sleep 0.1; done
[ $WORKER != 0 ] || echo {states} >"$CLOUD/states"
echo done
"""
    )
    result = pod.launch(*SLICE, "--", *TRAIN)
    assert result.status == 0, result.err
    assert result.out.endswith("done\n") and "looking for a minute" in result.err
    assert [(pod.home(worker) / "runs").read_text() for worker in (0, 1)] == ["run\n", "run\n"]


def test_a_lost_connection_is_made_again_and_the_run_goes_on(pod):
    pod.set_up(
        train="""
echo run >>~/runs; echo on
if [ $WORKER = 0 ]; then
    echo BROKEN BROKEN BROKEN READY >"$CLOUD/states"
    until pkill -f "${CLOUD%cloud}bin/gcloud .*follow"; do sleep 0.1; done
fi
until [ "$(grep -ao follow "$CLOUD/calls" | wc -l)" -ge 2 ]; do sleep 0.1; done
echo done
"""
    )
    result = pod.launch(*SLICE, "--", *TRAIN)
    assert result.status == 0, result.err
    assert result.out.endswith("on\ndone\n") and "looking for a minute" in result.err
    assert [(pod.home(worker) / "runs").read_text() for worker in (0, 1)] == ["run\n", "run\n"]
    assert len(pod.calls("scp")) == 1


PREEMPTED = """
[ ! -e "$CLOUD/lost" ] || exec echo resumed
if [ "$WORKER" = 0 ]; then
    touch "$CLOUD/lost"; echo PREEMPTED PREEMPTED BROKEN PREEMPTED >"$CLOUD/states"
fi
sleep 60
"""


def test_a_preempted_slice_is_requested_again_and_the_command_repeated(pod):
    pod.set_up("ABSENT", ["READY", "WAITING_FOR_RESOURCES READY"], PREEMPTED)
    result = pod.launch(*SLICE, "--create", "--spot", "--", *TRAIN)
    assert result.status == 0, result.err
    assert "PREEMPTED" in result.err and result.out == "resumed\n"
    kinds = [call[3] for call in pod.calls("tpus") if call[3] in ("create", "delete", "scp")]
    assert kinds == ["create", "scp", "delete", "create", "scp"]
    assert (pod.home(1) / "arguments").read_text().splitlines() == TRAIN[1:]
    assert remains(result)


def test_a_preempted_slice_is_left_alone_without_create(pod):
    pod.set_up("READY", train=PREEMPTED)
    result = pod.launch(*SLICE, "--", *TRAIN)
    assert result.status == 2
    assert "got PREEMPTED; with --create" in result.err
    assert pod.calls("create") == pod.calls("delete") == []
    assert remains(result)


def test_a_stopped_slice_is_not_waited_for(pod):
    pod.set_up("STOPPED")
    result = pod.launch(*SLICE, "--create", "--", *TRAIN)
    assert result.status == 2 and remains(result)
    assert "tpus tpu-vm start pod --zone=us-west4-a --project=mine" in result.err


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", "ABSENT", "PREEMPTED"])
def test_a_slice_that_is_gone_is_explained(pod, state):
    pod.set_up(state)
    result = pod.launch(*SLICE, "--", *TRAIN)
    assert result.status == 2
    assert f"wanted it READY in us-west4-a, got {state}; with --create" in result.err
    assert remains(result) == (state != "ABSENT")
    assert pod.calls("scp") == []


def test_an_old_failed_request_is_replaced(pod):
    pod.set_up("FAILED", ["READY"])
    assert pod.launch(*SLICE, "--create", "--", *TRAIN).status == 0
    assert [call[3] for call in pod.calls("queued-resources") if call[3] != "describe"] == [
        "delete",
        "create",
    ]


def test_a_request_that_fails_says_why(pod):
    pod.set_up("ABSENT", ["WAITING_FOR_RESOURCES FAILED"])
    result = pod.launch(*SLICE, "--create", "--", *TRAIN)
    assert result.status == 2
    assert "the request failed: no quota for v5litepod-16" in result.err
    assert remains(result)


def test_a_refused_request_may_still_have_made_a_slice(pod):
    pod.set_up("ABSENT", [])
    result = pod.launch(*SLICE, "--create", "--", *TRAIN)
    assert result.status == 2 and "PERMISSION_DENIED" in result.err and remains(result)


def test_ctrl_c_lets_the_run_save_and_mentions_the_slice(pod):
    pod.set_up(train='trap "echo saved; exit 143" TERM; echo step 1; while :; do sleep 0.1; done')
    process = pod.start(*SLICE, "--", *TRAIN)
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(signal.SIGINT)
    result = pod.finish(process)
    assert result.status == 130
    assert result.out == "saved\n"
    assert (pod.home(1) / "copg_jax.log").read_text() == "step 1\nsaved\n"
    assert remains(result)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_leaving_the_queue_mentions_the_request(pod, signum, status):
    pod.set_up("ABSENT", ["WAITING_FOR_RESOURCES"])
    process = pod.start(*SLICE, "--create", "--", *TRAIN)
    while "WAITING_FOR_RESOURCES" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signum)
    result = pod.finish(process)
    assert result.status == status and remains(result)


def test_a_new_launch_ends_the_run_that_a_lost_one_left_before_it_replaces_the_code(pod):
    pod.set_up(train='trap "ls >>~/ended; exit 143" TERM; echo on; while :; do sleep 0.1; done')
    process = pod.start(*SLICE, "--", *TRAIN)
    assert process.stdout.readline() == "on\n"
    process.terminate()  # the launcher only
    assert pod.finish(process).status == 143
    pod.set_up(train="echo again")
    (pod.tree / "new.py").touch()
    assert pod.launch(*SLICE, "--", *TRAIN).out == "again\n"
    ended = (pod.home(0) / "ended").read_text().splitlines()
    assert "setup.py" in ended and "new.py" not in ended


def test_a_number_from_before_a_reboot_ends_no_other_process(pod):
    with subprocess.Popen(["bash", "-c", "cat; exit"], stdin=subprocess.PIPE) as other:
        (pod.home(0) / "copg_jax.pid").write_text(f"{other.pid}\n")
        assert pod.launch(*SLICE, "--", *TRAIN).status == 0
    assert other.returncode == 0


def test_the_commands_of_the_docs_do_what_they_say(pod):
    text = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [
        shlex.split(line)[1:] for line in text.splitlines() if line.startswith("./launch_tpu.sh ")
    ]
    pod.set_up("ABSENT", ["READY"])
    for command in commands:
        assert pod.launch(*command).status == 0
    assert [call[3] for call in pod.calls("queued-resources") if call[3] != "describe"] == [
        "create",
        "delete",
    ]


def test_delete_removes_the_request_with_its_node(pod):
    result = pod.launch(*SLICE, "--delete")
    assert result.status == 0
    (delete,) = pod.calls("delete")
    assert delete[2] == "queued-resources" and "--force" in delete
    assert "remains" not in result.err


def test_delete_removes_a_node_that_was_made_without_a_request(pod):
    (pod.cloud / "no_request").touch()
    result = pod.launch(*SLICE, "--delete")
    assert result.status == 0 and "remains" not in result.err
    assert [call[2] for call in pod.calls("delete")] == ["queued-resources", "tpu-vm"]


def test_delete_of_nothing_is_fine(pod):
    pod.set_up("ABSENT")
    assert pod.launch(*SLICE, "--delete").status == 0
    assert pod.calls("delete") == []


@pytest.mark.parametrize(("train", "deleted"), [("echo ok", 1), ("exit 2", 0)])
def test_delete_with_a_command_waits_for_its_success(pod, train, deleted):
    pod.set_up(train=train)
    result = pod.launch(*SLICE, "--delete", "--", *TRAIN)
    assert len(pod.calls("delete")) == deleted
    assert remains(result) == (not deleted)


def test_missing_gcloud_is_explained(pod, tmp_path):
    result = pod.launch(*SLICE, "--", *TRAIN, PATH=str(tmp_path / "empty"))
    assert result.status == 2
    assert "wanted gcloud on PATH, got none" in result.err and "gcloud auth login" in result.err


def test_missing_project_is_explained(pod):
    result = pod.launch(*SLICE, "--", *TRAIN, CONFIGURED_PROJECT="")
    assert result.status == 2
    assert "wanted a project, got none; add --project P" in result.err
    assert pod.launch(*SLICE, "--project", "p", "--", *TRAIN, CONFIGURED_PROJECT="").status == 0
    assert all("--project=p" in call for call in pod.calls("pod"))


def test_gclouds_own_error_is_shown(pod):
    pod.set_up("BROKEN")
    result = pod.launch(*SLICE, "--create", "--", *TRAIN)
    assert result.status == 2 and "UNAUTHENTICATED: run gcloud auth login" in result.err
    assert pod.calls("create") == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pod", "v5p-8"], "wanted NAME TYPE ZONE first"),
        (["pod", "--create", "v5p-8", "z"], "wanted NAME TYPE ZONE first"),
        (["pod", "a100", "z", "--", "true"], "TYPE: wanted an accelerator type"),
        ([*SLICE, "python"], "wanted the command after --, got 'python'"),
        ([*SLICE, "--create"], "wanted a command after --"),
        ([*SLICE, "--create", "--"], "wanted a command after --"),
        ([*SLICE, "--delete", "--project"], "--project: wanted a project after it, got ''"),
        ([*SLICE, "--project", "--delete"], "--project: wanted a project after it, got '--delete'"),
        ([*SLICE, "--spot", "--", "true"], "--spot: wanted --create with it"),
    ],
)
def test_bad_arguments_are_refused_before_gcloud_is_asked(pod, arguments, text):
    result = pod.launch(*arguments)
    assert result.status == 2 and text in result.err
    assert pod.calls() == []
