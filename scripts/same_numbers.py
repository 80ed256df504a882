"""Does a change of the code change what runs compute? ``python scripts/same_numbers.py --against COMMIT``.

A fixed set of runs is made twice on this machine, with the code of a commit and with that of the working tree: every
method on the built-in masked and causal model through two domains, a resumed run, a classic benchmark, and two gloo
ranks with DDP and with FSDP2. Weights, what methods keep and result matrices must agree bit for bit. The exit status
is 1 if anything differs. ``--only WORD`` takes the runs with that word in their name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TREE = Path(__file__).resolve().parent.parent
TRAINING = {
    "max_steps": 4,
    "max_length": 32,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 64,
    "importance_samples": 8,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "memory_size": 16,
    "replay_ratio": 0.5,
    "self_replay_sweeps": 1,
    "scp_projections": 2,
    "rwalk_interval": 2,
}
PLAIN_SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
#: Name of a run -> method, and further training arguments.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "das gradient": ("das", {"soft_mask_target": "gradient", "contrast_prior_gradient": False}),
    "das rank": ("das", {"importance_normalization": "rank", "contrast_weight": 0.0}),
    "ewc online": ("ewc", {"ewc_mode": "online", "fisher": "empirical"}),
    "self_replay distributions": ("self_replay", {"self_replay_target": "distributions"}),
    "interpolate auto": ("interpolate", {"interpolation_alpha": "auto"}),
    "ncl kronecker": ("ncl", {"ncl_curvature": "kronecker", **PLAIN_SGD}),
    "das replay interpolate": (["das", "replay", "interpolate"], {"gradient_accumulation_steps": 2}),
}
CLASSIC = ["--experiment", "odd_even", "--epochs", "1", "--seeds", "0", "--no-search", "--workers", "1"]
CLASSIC += ["--method", "naive", "ewc", "si", "replay", "gem"]
RANKS = ("naive", "das", "ewc", "replay")


def record(output: Path, only: str) -> dict[str, Any]:
    """Make the runs with the `das_lm` that Python finds: name of the run -> name of a number or file -> digest."""
    found: dict[str, Any] = {}
    for model in ("built-in", "built-in-causal"):
        for name, (method, options) in _runs().items():
            name = f"{name}, {model}"
            if only in name:
                _pretrain(model, method, options, output / name)
                found[name] = _digests(output / name)
    if only in "resumed":
        options = {"save_strategy": "steps", "save_steps": 2}
        _pretrain("built-in", ["das", "ewc"], options, output / "resumed", stop_at=3)
        _pretrain("built-in", ["das", "ewc"], options, output / "resumed", resume=True)
        found["resumed"] = _digests(output / "resumed")
    if only in "classic":
        _call("scripts/classic_benchmark.py", *CLASSIC, "--output_dir", str(output / "classic"))
        results = sorted((output / "classic").rglob("forgetting.json"))
        found["classic"] = {str(path.relative_to(output)): _scores(path) for path in results}
    for kind in ("ddp", "fsdp2"):
        for method in RANKS:
            name = f"two ranks, {kind}, {method}"
            if only in name:
                arguments = ["record-ranks", kind, method, str(output / name)]
                launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
                _call(*launcher, __file__, *arguments)
                found[name] = _digests(output / name)
    return found


def _runs() -> dict[str, tuple[Any, dict[str, Any]]]:
    from das_lm.methods import METHODS

    runs = {name: (name, PLAIN_SGD if name == "ncl" else {}) for name in METHODS}
    return {**runs, **VARIANTS}


def _pretrain(model: str, method: Any, options: dict[str, Any], output: Path, stop_at: int = 0, **flags: Any) -> None:
    from transformers import TrainerCallback

    from das_lm import continual_pretrain, load_recipe

    class Stop(Exception):
        pass

    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if stop_at and state.global_step == stop_at:
                raise Stop

    import transformers.trainer as trainer

    defaults, trainer.DEFAULT_CALLBACKS = trainer.DEFAULT_CALLBACKS, [*trainer.DEFAULT_CALLBACKS, Stopping]
    file = output.with_name(f"{output.name}.yaml")
    recipe = {
        "model_name_or_path": model,
        "method": method,
        "output_dir": str(output),
        "domains": [{"name": name, "max_documents": 300} for name in ("bio", "cs")],
        "measure": [{"name": "general", "max_documents": 300}],
        "training": {**TRAINING, **options},
    }
    file.write_text(json.dumps(recipe), encoding="utf-8")
    recipe = load_recipe(file)
    try:
        continual_pretrain(recipe, report=False, **flags)
    except Stop:
        pass
    finally:
        trainer.DEFAULT_CALLBACKS = defaults


def _let_gloo_ranks_shard() -> None:
    """accelerate keeps FSDP for GPUs; tell it that gloo ranks are such."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self, *args: Any, **kwargs: Any) -> None:
        shared = PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def _in_ranks(kind: str, method: str, output: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 2}
    if kind == "fsdp2":
        _let_gloo_ranks_shard()
        options |= {"fsdp": "full_shard", "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    _pretrain("built-in", method, options, output)


def _call(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(result.stdout + result.stderr)[-3000:]}")


def _digests(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    digests: dict[str, Any] = {"result matrix": _scores(run / "forgetting.json")}
    for path in sorted(run.glob("[0-9]*-*/*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        digests[str(path.relative_to(run))] = digest.hexdigest()[:16]
    return digests


def _scores(path: Path) -> str:
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return hashlib.sha256(json.dumps([stage["scores"] for stage in stages]).encode()).hexdigest()[:16]


def _recorded(tree: Path, scratch: Path, only: str) -> dict[str, Any]:
    """Run this script with the code of a tree."""
    script, file = scratch / Path(__file__).name, scratch / "numbers.json"
    scratch.mkdir()
    shutil.copy(__file__, script)
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run([sys.executable, script, "record", only, file], env=environment, cwd=tree, check=True)
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", metavar="COMMIT", default="HEAD", help="What to compare with (default: HEAD).")
    parser.add_argument("--only", metavar="WORD", default="", help="Runs with this word in their name.")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        before = Path(scratch, "before")
        subprocess.run(
            ["git", "-C", TREE, "worktree", "add", "--detach", "--quiet", before, options.against], check=True
        )
        try:
            old = _recorded(before, Path(scratch, "old"), options.only)
        finally:
            subprocess.run(["git", "-C", TREE, "worktree", "remove", "--force", before], check=True)
        new = _recorded(TREE, Path(scratch, "new"), options.only)
    differences = 0
    for run in {**old, **new}:
        names = {**old.get(run, {}), **new.get(run, {})}
        changed = [name for name in names if old.get(run, {}).get(name) != new.get(run, {}).get(name)]
        differences += bool(changed)
        print(f"{run}: " + (f"DIFFERENT: {', '.join(changed)}" if changed else f"the same ({len(names)} digests)"))
    print(f"{len({**old, **new})} runs, {differences} different")
    return 1 if differences else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        import torch

        torch.set_num_threads(1)
        only, file = sys.argv[2:]
        with TemporaryDirectory() as directory:
            Path(file).write_text(json.dumps(record(Path(directory), only)), encoding="utf-8")
    elif sys.argv[1:2] == ["record-ranks"]:
        _in_ranks(*sys.argv[2:4], Path(sys.argv[4]))
    else:
        sys.exit(main())
