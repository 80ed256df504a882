"""The launchers' files: accelerate reads them as they are meant, and the SLURM script saves, requeues and resumes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

DIRECTORY = Path(__file__).parents[2] / "recipes" / "accelerate"
FILES = sorted(path.name for path in DIRECTORY.glob("*.yaml"))


def launched(name: str, *options: str):
    """What `accelerate launch --config_file` makes of a file and of options on the command line."""
    script = ["scripts/continual_pretrain.py", "--recipe", "bio_then_cs"]
    given = launch_command_parser().parse_args(["--config_file", str(DIRECTORY / name), *options, *script])
    return _validate_launch_command(given)[0]


def test_there_are_all():
    assert FILES == ["ddp.yaml", "fsdp2.yaml", "multi_node.yaml", "single_gpu.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_accelerate_knows_every_key(name):
    """It refuses unknown keys by itself, but not in `fsdp_config`, where a misspelt one would do nothing."""
    load_config_from_file(str(DIRECTORY / name))
    args = launched(name)
    inner = (yaml.safe_load((DIRECTORY / name).read_text())).get("fsdp_config", {})
    assert all(key.startswith("fsdp_") and getattr(args, key) == value for key, value in inner.items())
    assert args.mixed_precision == "no"  # so that bf16 is what the recipe says
    assert args.training_script_args == ["--recipe", "bio_then_cs"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("single_gpu.yaml", [], {"num_processes": 1, "multi_gpu": False, "use_fsdp": False, "gpu_ids": "0"}),
        ("ddp.yaml", [], {"num_processes": 8, "multi_gpu": True, "use_fsdp": False}),
        ("ddp.yaml", ["--num_processes", "4"], {"num_processes": 4, "multi_gpu": True}),
        ("fsdp2.yaml", [], {"num_processes": 8, "multi_gpu": False, "use_fsdp": True, "fsdp_version": 2}),
        ("multi_node.yaml", ["--machine_rank", "1"], {"num_processes": 16, "num_machines": 2, "machine_rank": 1}),
    ],
)
def test_what_is_launched(name, options, expected):
    args = launched(name, *options)
    assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize("name", ["multi_node.yaml", "ddp.yaml", "fsdp2.yaml"])
def test_processes_of_several_machines(name):
    """The file for them, and the others with the numbers that slurm.sh gives."""
    numbers = ["--num_machines", "2", "--num_processes", "16", "--main_process_ip", "10.0.0.1"]
    numbers += ["--main_process_port", "29500", "--machine_rank", "1"]
    args = launched(name, *(numbers[-2:] if name == "multi_node.yaml" else numbers))
    prepare_multi_gpu_env(args)
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_fsdp_in_the_processes(monkeypatch):
    """What the launcher hands to its processes makes the plugin that is meant."""
    for name, value in prepare_multi_gpu_env(launched("fsdp2.yaml")).items():
        monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # the one that does not
    assert not plugin.cpu_ram_efficient_loading


# ---- SLURM ---------------------------------------------------------------------------------------------------------


def test_slurm_script_is_bash():
    script = str(DIRECTORY / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


STUBS = {
    "scontrol": """
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >>"$LOG/scontrol"; fi
""",
    # Every task runs here, as the first node's. What is to run comes after the options.
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 exec "$@"
""",
    # A launcher with one process, which ends itself after a while, or as das-lm does when it is told to stop.
    "accelerate": """
echo "$@" >"$LOG/launched"
trap 'echo launcher >>"$LOG/told"' TERM
bash -c 'trap "echo process >>\\"$LOG/told\\"; exit 143" TERM
  echo >"$LOG/runs"
  for _ in $(seq $LASTS); do sleep 0.1; done' &
child=$!
wait $child
""",
}


@pytest.fixture
def slurm(tmp_path):
    """Starts the script with what stands for SLURM and accelerate."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in STUBS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash{text}")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}

    def start(lasts: int) -> subprocess.Popen:
        environment = {**os.environ, **job, "SLURM_GPUS_ON_NODE": "8", "LOG": str(tmp_path), "LASTS": str(lasts)}
        environment["PATH"] = f"{commands}:{os.environ['PATH']}"
        command = ["bash", str(DIRECTORY / "slurm.sh"), "my recipe.yaml", str(tmp_path / "run")]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    yield start
    Path(f"/tmp/das-lm.{os.getpid()}").unlink(missing_ok=True)


def test_slurm_script_launches_and_resumes(slurm, tmp_path):
    """What it starts is what accelerate understands; a run that there is already is resumed."""
    started = slurm(lasts=0)
    assert (started.wait(timeout=30), started.stderr.read()) == (0, "")
    words = (tmp_path / "launched").read_text().split()
    assert words[:3] == ["launch", "--machine_rank", "0"]
    args = launch_command_parser().parse_args(words[1:])
    assert (args.num_machines, args.num_processes, args.main_process_ip) == (2, 16, "node7")
    assert args.config_file == "recipes/accelerate/ddp.yaml" and 20000 <= args.main_process_port < 30000
    assert "--resume" not in words and not (tmp_path / "scontrol").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    assert slurm(lasts=0).wait(timeout=30) == 0
    assert (tmp_path / "launched").read_text().split()[-1] == "--resume"


@pytest.mark.skipif(shutil.which("pkill") is None, reason="no pkill")
def test_slurm_script_saves_and_requeues(slurm, tmp_path):
    """Before the time is over the processes are told to stop, once and not by their launcher, and then the job goes
    back into the queue."""
    script = slurm(lasts=300)
    until = time.monotonic() + 30
    while not (tmp_path / "runs").exists() and time.monotonic() < until:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert (script.wait(timeout=30), script.stderr.read()) == (0, "")
    assert (tmp_path / "told").read_text() == "process\n"
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"


def test_slurm_script_fails_with_the_run(slurm, tmp_path):
    """An error is no reason to begin again."""
    (tmp_path / "commands" / "accelerate").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert slurm(lasts=0).wait(timeout=30) == 3
    assert not (tmp_path / "scontrol").exists()
