"""The scripts of launch/: linted, rendered, and run with stand-ins for gcloud and srun."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from moe_jax.planning.hardware import USABLE

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")
TPU = {"NAME": "moe", "PROJECT": "my-project", "ZONE": "us-east5-a", "SHARED": "10.0.0.2:/share"}
# Text that a shell must not split, expand or run.
ODD = "--config.data.corpus=a b'c\"d$HOME`id`;!*\\"


def run(script, *arguments, environment=None, check=True, directory=None):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=kept | (TPU if environment is None else environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=directory,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def dry(script, *arguments, environment=None):
    """Returns the commands of a dry run, each as a list of arguments."""
    said = run(script, "--dry_run", *arguments, environment=environment).stdout
    # A newline inside an argument is printed as $'\n', which shlex cannot parse.
    echo = 'eval "set -- $1"; printf "%s\\0" "$@"'
    return [
        subprocess.run(
            ["bash", "-c", echo, "bash", line], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        for line in said.splitlines()
    ]


def stand_in(directory, name, text):
    """Writes an executable that replaces a program, and returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


def test_every_script_is_there():
    names = {path.name for path in LAUNCH.iterdir()}
    assert names == {
        "common.sh", "local.sh", "tpu_vm.sh", "tpu_pod.sh", "slurm.sbatch",
        "jobset.yaml", "jobset_gpu.yaml", "Dockerfile",
    }  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(
        [str(SHELLCHECK), "--external-sources", "--source-path=SCRIPTDIR/..", str(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh", "local.sh"])
def test_without_a_verb_a_script_says_how_to_use_it(script):
    said = run(script, environment={}).stdout
    assert f"launch/{script}" in said and "--dry_run" in said and "Environment (default)" in said


WHERE = ["--project=my-project", "--zone=us-east5-a"]


def test_a_tpu_vm_from_its_creation_to_its_end():
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    options = ["--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e"]
    assert dry("tpu_vm.sh", "create") == [[*tpu, "create", "moe", *options, *WHERE]]
    environment = TPU | {"SPOT": "true", "ACCELERATOR_TYPE": "v4-8"}
    (command,) = dry("tpu_vm.sh", "create", environment=environment)
    assert "--spot" in command and "--accelerator-type=v4-8" in command
    pack, copy, install = dry("tpu_vm.sh", "install")
    assert pack[0] == "git" and pack[3] == "archive" and pack[-1] == "HEAD"
    assert copy == [*tpu, "scp", "/tmp/moe_jax.tar.gz", "moe:moe_jax.tar.gz", *WHERE]
    assert '"moe_jax[tpu]"' in install[6] and install[7:] == WHERE
    assert dry("tpu_vm.sh", "fetch", "/runs/a b", "here") == [
        [*tpu, "scp", "--recurse", "moe:/runs/a b", "here", *WHERE]
    ]
    assert dry("tpu_vm.sh", "delete") == [[*tpu, "delete", "moe", "--quiet", *WHERE]]


@pytest.mark.parametrize(
    ("slices", "nodes"), [("1", ["moe-0"]), ("3", ["moe-0", "moe-1", "moe-2"])]
)
def test_a_pod_of_one_and_of_several_slices(slices, nodes):
    environment = TPU | {"SLICES": slices}
    tpus = ["gcloud", "compute", "tpus"]
    (create,) = dry("tpu_pod.sh", "create", environment=environment)
    assert create[:5] == [*tpus, "queued-resources", "create"] and create[5] == "moe"
    assert "--runtime-version=v2-alpha-tpuv5" in create
    several = ["--node-count=3", "--node-prefix=moe"]
    assert [o for o in create if "--node" in o] == (
        ["--node-id=moe-0"] if slices == "1" else several
    )
    pack, *copies_and_installs = dry("tpu_pod.sh", "install", environment=environment)
    assert "archive" in pack and len(copies_and_installs) == 2 * len(nodes)
    assert all("--worker=all" in command for command in copies_and_installs)
    assert "mount -t nfs 10.0.0.2:/share /mnt/shared" in copies_and_installs[-1][7]
    commands = dry("tpu_pod.sh", "run", "--config=x", environment=environment)
    assert [command[5] for command in commands] == nodes
    for command in commands:
        assert command[:5] == [*tpus, "tpu-vm", "ssh"] and command[6] == "--worker=all"
        assert "moe_jax.train --processes=auto --config=x " in command[7]
    with_extras = dry("tpu_pod.sh", "install", environment=environment | {"EXTRAS": "chat,wandb"})
    assert '"moe_jax[tpu,chat,wandb]"' in with_extras[-1][7]
    (delete,) = dry("tpu_pod.sh", "delete", environment=environment)
    assert delete[3:5] == ["queued-resources", "delete"] and "--force" in delete


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("tpu_vm.sh", ["create"], TPU | {"NAME": ""}, "NAME is not set. Set it: NAME=..."),
        ("tpu_vm.sh", ["create"], {"NAME": "moe", "PROJECT": "p"}, "ZONE is not set"),
        ("tpu_vm.sh", ["run"], TPU, "run needs the flags of moe_jax.train"),
        ("tpu_vm.sh", ["fetch", "a"], TPU, "fetch needs a directory of the VM"),
        ("tpu_vm.sh", ["destroy"], TPU, "no such verb: destroy"),
        ("tpu_vm.sh", ["install"], TPU | {"EXTRAS": "a b"}, "EXTRAS are names joined by commas"),
        ("tpu_vm.sh", ["run", "--x"], TPU | {"ENV": "LANG KEY"}, "KEY is not set. Set it: KEY="),
        ("tpu_pod.sh", ["install"], TPU | {"SHARED": ""}, "SHARED is not set"),
        ("tpu_pod.sh", ["create"], TPU | {"SLICES": "0"}, "SLICES is a number from 1: got 0"),
        ("local.sh", ["train"], {"PROCESSES": "1"}, "PROCESSES is a number from 2: got 1"),
        ("slurm.sbatch", [], {}, "give the flags of moe_jax.train"),
    ],
)
def test_what_is_missing_or_wrong_is_refused_by_name(script, arguments, environment, message):
    done = run(script, "--dry_run", *arguments, environment=environment, check=False)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_odd_values_arrive_as_they_are(tmp_path):
    """A remote command is one string to gcloud, and the remote shell splits it again."""
    assert dry("slurm.sbatch", ODD, environment={"VENV": "/a b"})[0][3:] == [
        "/a b/bin/python", "-u", "-m", "moe_jax.train", "--processes=auto", ODD,
    ]  # fmt: skip
    assert dry("local.sh", "train", ODD, environment={})[1][-1] == ODD
    (command,) = dry("tpu_vm.sh", "run", ODD)
    remote = command[6].removeprefix("--command=")
    home = tmp_path / "home"
    (home / "moe_jax").mkdir(parents=True)
    stand_in(home / "venv" / "bin", "python", 'printf "%s\\0" "$@" "${KEY:-}" >~/arguments\n')
    subprocess.run(["bash", "-c", remote], env={"HOME": str(home), "PATH": os.defpath}, check=True)
    wait_until((home / "arguments").exists)
    wait_until(lambda: (home / "arguments").read_text().endswith("\0"))
    assert (home / "arguments").read_text().split("\0") == ["-m", "moe_jax.train", ODD, "", ""]


def gcloud_here(directory):
    """Writes a gcloud that runs the remote command here, and returns a PATH that starts with it."""
    stand_in(
        directory, "gcloud",
        'for word; do case $word in --command=*) command=${word#--command=};; esac; done\n'
        'if [[ -n ${command:-} ]]; then cd ~ && bash -c "$command"; fi\n',
    )  # fmt: skip
    return f"{directory}:{os.environ['PATH']}"


def test_variables_that_env_names_reach_the_run_and_no_dry_run_shows_them(tmp_path):
    home, path = tmp_path / "home", gcloud_here(tmp_path / "bin")
    (home / "moe_jax").mkdir(parents=True)
    stand_in(home / "venv" / "bin", "python", 'printf "%s\\0" "${KEY:-}" >~/seen\n')
    environment = TPU | {"ENV": "LANG KEY", "LANG": "C", "KEY": ODD}
    assert (
        "KEY=HIDDEN" in run("tpu_vm.sh", "--dry_run", "run", "--x", environment=environment).stdout
    )
    run("tpu_vm.sh", "run", "--x", environment=environment | {"HOME": str(home), "PATH": path})
    wait_until(lambda: (home / "seen").exists() and (home / "seen").read_text())
    assert (home / "seen").read_text() == f"{ODD}\0"


@pytest.mark.parametrize("killed_by", ["", "tar", "mv"])
def test_an_installation_replaces_the_code_and_keeps_the_runs(tmp_path, killed_by):
    """Complete, or killed while it unpacks or moves: the next installation completes it."""
    home, bin_directory = tmp_path / "home", tmp_path / "bin"
    path = gcloud_here(bin_directory)
    results = "experiments/balance/results.jsonl"
    kept = ("runs/a/checkpoint", "notes.txt", "configs/mine.py", results)
    kept = [home / "moe_jax" / name for name in kept]
    old = home / "moe_jax" / "moe_jax" / "no_longer_there.py"
    for one in (*kept, old):
        one.parent.mkdir(parents=True, exist_ok=True)
        one.write_text("x")
    stand_in(home / "venv" / "bin", "python", "")
    stand_in(bin_directory, "python3", "")  # for pip and uv
    source = tmp_path / "source"
    for name in ("moe_jax/__init__.py", ".gitignore", "runs/a/checkpoint", "configs/a.py", results):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("new")
    archive = ["tar", "-czf", str(home / "moe_jax.tar.gz"), "-C", str(source), "."]
    subprocess.run(archive, check=True)
    stand_in(bin_directory, "git", "")  # packs the archive
    environment = TPU | {"HOME": str(home), "PATH": path}
    if killed_by:
        program = stand_in(bin_directory, killed_by, "kill -9 $PPID\n")
        done = run("tpu_vm.sh", "install", environment=environment, check=False)
        assert done.returncode != 0 and all(one.read_text() == "x" for one in kept)
        program.unlink()
    run("tpu_vm.sh", "install", environment=environment)
    assert all(one.read_text() == "x" for one in kept) and not old.exists()
    for name in ("moe_jax/__init__.py", "configs/a.py"):
        assert (home / "moe_jax" / name).read_text() == "new"
    assert (home / "moe_jax" / ".gitignore").exists() and not (home / "moe_jax.new").exists()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_on_a_host_is_stopped_by_sigterm_and_started_only_once(tmp_path):
    """The stand-in for gcloud runs the remote command here, in a separate home directory."""
    home, path = tmp_path / "home", gcloud_here(tmp_path / "bin")
    (home / "moe_jax").mkdir(parents=True)
    stand_in(
        home / "venv" / "bin", "python",
        "trap 'echo saved; exit 143' TERM\necho started\nwhile true; do sleep 0.05; done\n",
    )  # fmt: skip
    environment = TPU | {"HOME": str(home), "PATH": path}
    run("tpu_pod.sh", "run", "--config=x", environment=environment)
    wait_until(lambda: "started" in (home / "train.log").read_text())
    again = run("tpu_pod.sh", "run", "--config=x", environment=environment, check=False)
    assert again.returncode == 1 and "a run is going on" in again.stderr
    assert "saved" in run("tpu_pod.sh", "stop", environment=environment).stdout
    run("tpu_pod.sh", "run", "--config=x", environment=environment)
    assert "saved" in run("tpu_pod.sh", "stop", environment=environment).stdout


@pytest.mark.parametrize(
    ("exit_code", "seconds_left", "deaths_before", "requeued"),
    [
        (0, 5000, 0, False),
        (143, 200, 0, True),  # SIGTERM before the time limit
        (143, 5000, 0, False),  # scancel or a preemption
        (134, 5000, 0, True),  # JAX ended this process because another was lost
        (137, 5000, 4, True),
        (137, 5000, 5, False),
        (1, 5000, 0, False),  # a user's error
    ],
)
def test_a_slurm_job_goes_on_by_itself_when_that_helps(
    tmp_path, exit_code, seconds_left, deaths_before, requeued
):
    stand_in(tmp_path, "srun", f'echo "$@"; exit {exit_code}\n')
    stand_in(tmp_path, "scontrol", 'echo "scontrol $*"\n')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_END_TIME": str(int(time.time()) + seconds_left),
        "SLURM_RESTART_COUNT": "40",  # time limits too
    }
    deaths = tmp_path / ".moe_jax-7.deaths"
    if deaths_before:
        deaths.write_text(f"{deaths_before}\n")
    done = run(
        "slurm.sbatch", "--config=x", environment=environment, check=False, directory=tmp_path
    )
    assert done.returncode == exit_code
    after = deaths_before + 1 if requeued and exit_code != 143 else None
    assert (int(deaths.read_text()) if deaths.exists() else None) == after
    assert "--kill-on-bad-exit=1" in done.stdout and "--processes=auto --config=x" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "0.92 none"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "0.5 none"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.6"}, "none 0.6"),  # JAX refuses to have both set
    ],
)
def test_slurm_jobs_have_the_memory_that_plans_assume(tmp_path, given, said):
    assert USABLE == 0.92
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    stand_in(tmp_path, "srun", "echo " + " ".join(f"${{{name}:-none}}" for name in names))
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("slurm.sbatch", "--config=x", environment={"PATH": path, **given})
    assert done.stdout.split("\n")[0] == said


def test_slurm_options_are_what_jax_needs():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH ")
    )
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    assert options["signal"] == "TERM@300" and "requeue" in options
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "never read"


def test_local_processes_get_the_signal_and_the_first_exit_code_is_told(tmp_path):
    python = stand_in(
        tmp_path, "python", f"trap 'exit 143' TERM\ntouch {tmp_path}/up.$$\n"
        "while true; do sleep 0.05; done\n",
    )  # fmt: skip
    environment = os.environ | {"PYTHON": str(python), "PROCESSES": "3", "LOGS": str(tmp_path)}
    with subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "train"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: len(list(tmp_path.glob("up.*"))) == 3)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 143
    assert [line for line in said.splitlines() if "ended with exit code 143" in line] != []
    assert sorted(path.name for path in tmp_path.glob("*.log")) == [
        "process_1.log", "process_2.log",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "resource"), [("jobset", "google.com/tpu"), ("jobset_gpu", "nvidia.com/gpu")]
)
def test_a_jobset_has_what_a_run_relies_on(name, resource):
    jobset = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # The training process itself receives SIGTERM, and has time to save.
    assert container["command"][:4] == ["python", "-u", "-m", "moe_jax.train"]
    assert "--processes=auto" in container["command"]
    assert pod["terminationGracePeriodSeconds"] >= 300
    # A lost process ends its job at once, and all processes restart. A user's error is final.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    assert pod_rule["onExitCodes"]["values"] == [1] and pod_rule["action"] == "FailJob"
    assert pod_rule["onExitCodes"]["containerName"] == container["name"]
    assert container["resources"]["limits"][resource] > 0
    workdir = next(o for o in container["command"] if o.startswith("--workdir="))
    mount = next(m for m in container["volumeMounts"] if m["name"] == "shared")
    assert shlex.split(workdir)[0].startswith(f"--workdir={mount['mountPath']}/")
    assert pod["volumes"][0]["persistentVolumeClaim"]
    if resource == "google.com/tpu":
        chips = 1
        for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
            chips *= int(size)
        assert job["parallelism"] * container["resources"]["limits"][resource] == chips
    else:
        values = {entry["name"]: entry for entry in container["env"]}
        host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
        assert values["JAX_COORDINATOR_ADDRESS"]["value"] == f"{host}:8476"
        assert values["JAX_NUM_PROCESSES"]["value"] == str(job["parallelism"])
        assert "completion-index" in str(values["JAX_PROCESS_ID"]["valueFrom"])
        assert values["XLA_PYTHON_CLIENT_MEM_FRACTION"]["value"] == str(USABLE)
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert f"WORKDIR {container['workingDir']}" in lines
