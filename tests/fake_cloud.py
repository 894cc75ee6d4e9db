"""A TPU slice for tests of launch_tpu.sh: folders as workers, and a gcloud that knows them.

1. The slice has a list of states; each look at it moves one state on, up to the last.
2. `gcloud` records its calls and runs "remote" commands as real processes, so that what the
   launcher starts, stops and reads is really done; what a session leaves in its process group ends
   with it.
3. `FakeCloud` holds a checkout to launch from, and looks at what happened.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
# What a shell would split, expand or run.
HOSTILE = [
    "a b",
    " ",
    "",
    "it's",
    'say "x"',
    ";touch ran",
    "$(touch ran)",
    "`touch ran`",
    "&& touch ran",
    "| touch ran",
    ">ran",
    "$HOME",
    "${HOME}",
    "*",
    "?[a-z]",
    "~",
    "{a,b}",
    "!!",
    "#x",
    "a\\b",
    "a\\",
    "two\nlines",
    "\ttab",
    "-x",
    "--",
    "é\u2028日本",
    "$'\\x41'",
]
SCRIPTS = [ROOT / "launch_tpu.sh", ROOT / "experiments" / "tpu_worker.sh"]
BASH, ENV = str(shutil.which("bash")), str(shutil.which("env"))

GCLOUD = r"""#!/bin/bash
next() { [[ ${#states[@]} == 1 ]] || echo "${states[@]:1}" >"$CLOUD/states"; }
fail() { echo "ERROR: (gcloud.compute.tpus) $*" >&2; exit 1; }
printf '%s\0' "$@" '' >>"$CLOUD/calls"
read -ra states <"$CLOUD/states"
case "$*" in
  "config get-value project") echo "$CONFIGURED_PROJECT" ;;
  *" describe pod "*failedData*) echo "no quota for v5litepod-16" ;;
  *" describe pod "*)
    case "$3 $states" in
      *BROKEN) next && fail "UNAUTHENTICATED: run gcloud auth login" ;;
      *ABSENT) fail "NOT_FOUND: Resource 'pod' was not found" ;;
      "tpu-vm CREATING" | "tpu-vm READY" | "tpu-vm PREEMPTED" | "tpu-vm STOPPED") ;;
      tpu-vm* | *CREATING | *READY | *PREEMPTED) fail "NOT_FOUND: Resource 'pod' was not found" ;;
    esac
    echo "$states" && next ;;
  *" queued-resources create pod "*)
    [[ -s $CLOUD/lives ]] || fail PERMISSION_DENIED
    head -n 1 "$CLOUD/lives" >"$CLOUD/states" && sed -i 1d "$CLOUD/lives" ;;
  *" delete pod "*)
    [[ $3 == tpu-vm || ! -e $CLOUD/no_request ]] || fail "NOT_FOUND: Resource 'pod' was not found"
    echo ABSENT >"$CLOUD/states" && rm -rf "$CLOUD"/workers/*/* "$CLOUD"/workers/*/.[a-z]* ;;
  *" tpu-vm scp "*" pod: --worker=all "*)
    for home in "$CLOUD"/workers/*; do cp "$5" "$6" "$home"; done ;;
  *" tpu-vm ssh pod --worker=all "*)
    hang_up() { kill -HUP -- $(jobs -p | sed s/^/-/) 2>/dev/null; } # a session's whole group
    trap 'hang_up; exit 255' TERM
    set -m # a group for each, which exists as soon as the job does
    for home in "$CLOUD"/workers/*; do
      cd "$home"
      HOME=$home WORKER=${home##*/} PATH=$CLOUD/tools:/usr/bin:/bin bash -c "${7#--command=}" &
      workers+=($!)
    done
    for worker in "${workers[@]}"; do wait "$worker" || status=$?; done
    hang_up
    exit "${status:-0}" ;;
  *) fail "unexpected: $*" ;;
esac
"""
TOOLS = {
    "curl": 'echo "$WORKER"',
    "python3.13": "exit 1",
    "python3.12": 'echo "$1 $2" >>~/made; [ "$2" != venv ] || cp -r "$CLOUD/venv" .venv',
    "python3.11": "exit 1",
    "python3": "exit 1",
}
VENV_PYTHON = """#!/bin/bash
case "$1 $2" in
  "-c "*) echo py312 ;;
  "-m pip") echo "$@" >>~/pip ;;
  *) echo "$JAX_PLATFORMS" >~/platforms && printf '%s\\n' "$@" >~/arguments &&
    printf '%s\\0' "$@" >~/words && . "$CLOUD/train" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    """Writes a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_checkout(tree: Path) -> None:
    """A repository with the scripts, one file to ignore, one deleted and one not yet added."""
    for script in SCRIPTS:
        executable(tree / script.relative_to(ROOT), script.read_text())
    (tree / "constraints").mkdir()
    (tree / "constraints" / "py312.txt").write_text("jax==1\n")
    (tree / "setup.py").write_text("setup()\n")
    (tree / ".gitignore").write_text("/runs/\n")
    (tree / "runs").mkdir()
    (tree / "runs" / "ignored").touch()
    (tree / "deleted").touch()
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", tree, *arguments], check=True)
    (tree / "deleted").unlink()
    (tree / "not tracked.py").touch()


class FakeCloud:
    """A slice called pod with two workers, all in `folder`.

    Attributes:
        cloud: what gcloud reads and writes.
        tree: the checkout to launch from.
    """

    def __init__(self, folder: Path) -> None:
        self.cloud, self.tree = folder / "cloud", folder / "tree"
        self._env = {"CLOUD": str(self.cloud), "HOME": str(folder), "CONFIGURED_PROJECT": "mine"}
        self._env["PATH"] = f"{folder}/bin:/usr/bin:/bin"
        self._started: list[subprocess.Popen] = []
        for worker in (0, 1):
            self.home(worker).mkdir(parents=True)
        (self.cloud / "calls").touch()
        for name, text in TOOLS.items():
            self.give_workers(name, text)
        executable(self.cloud / "venv" / "bin" / "python", VENV_PYTHON)
        executable(folder / "bin" / "gcloud", GCLOUD)
        executable(folder / "bin" / "sleep", "#!/bin/bash\nexec /bin/sleep 0.1\n")
        make_checkout(self.tree)
        self.set_up()

    def give_workers(self, name: str, text: str) -> None:
        """Puts a program on the PATH of every worker."""
        executable(self.cloud / "tools" / name, f"#!/bin/bash\n{text}\n")

    def set_up(
        self, states: str = "READY", lives: Sequence[str] = (), train: str = "echo training"
    ) -> None:
        """Sets the states of the slice now and after each request, and what its python runs."""
        (self.cloud / "states").write_text(states + "\n")
        (self.cloud / "lives").write_text("".join(f"{life}\n" for life in lives))
        (self.cloud / "train").write_text(train)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        """Starts the launcher."""
        # A shell cannot trap what its parent ignores, as jobs in the background and nohup do.
        launcher = [BASH, str(self.tree / "launch_tpu.sh"), *arguments]
        command = [ENV, "--default-signal=INT,HUP", *launcher]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=self._env | env, stdout=pipe, stderr=pipe, text=True
        )
        self._started.append(process)
        return process

    def finish(self, process: subprocess.Popen) -> SimpleNamespace:
        """Waits for the launcher: exit status, output and errors."""
        out, err = process.communicate(timeout=180)
        return SimpleNamespace(status=process.returncode, out=out, err=err)

    def launch(self, *arguments: str, **env: str) -> SimpleNamespace:
        """Runs the launcher."""
        return self.finish(self.start(*arguments, **env))

    def calls(self, *words: str) -> list[list[str]]:
        """The calls of gcloud that have all these arguments."""
        recorded = (self.cloud / "calls").read_text().removesuffix("\0\0").split("\0\0")
        lines = [line.split("\0") for line in recorded if line]
        return [line for line in lines if set(words) <= set(line)]

    def home(self, worker: int) -> Path:
        """The home folder of a worker."""
        return self.cloud / "workers" / str(worker)

    def end(self) -> None:
        """Ends what still runs."""
        for pid in self.cloud.glob("workers/*/copg_jax.pid"):
            subprocess.run(["pkill", "-KILL", "-P", pid.read_text().strip()])
        for process in self._started:
            with process:  # closes its pipes, which whatever it left may hold open
                process.terminate()
