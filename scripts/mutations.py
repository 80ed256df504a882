"""Does a test notice when a formula is wrong? ``python scripts/mutations.py [--only WORD]``.

Each mutation is one wrong line in one file, in a copy of the tree. The test file named beside it must fail. The exit
status is 1 if a mutation survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

TREE = Path(__file__).resolve().parent.parent
PARTS = ("das_lm", "tests", "scripts", "recipes", "pyproject.toml", "README.md")


class Mutation(NamedTuple):
    """A wrong line: in which file, what it replaces, what stands there instead, and the test file that must fail."""

    file: str
    right: str
    wrong: str
    test: str


MUTATIONS = {
    "importance: of the signed gradient": Mutation(
        "units/importance.py",
        'gradient.abs() if accumulation == "absolute" else gradient',
        "gradient",
        "units/test_importance.py",
    ),
    "importance: the latest domain instead of the largest": Mutation(
        "units/importance.py",
        "torch.maximum(self.values.get(key, value), value)",
        "value",
        "units/test_importance.py",
    ),
    "importance: z without its absolute value": Mutation(
        "units/importance.py",
        'tanh.abs() if how == "paper"',
        'tanh if how == "paper"',
        "units/test_importance.py",
    ),
    "soft-mask: keeps what it should hold back": Mutation(
        "units/soft_mask.py",
        "lerp_(before, held_back)",
        "lerp_(before, 1 - held_back)",
        "units/test_soft_mask.py",
    ),
    "soft-mask: no strength": Mutation(
        "units/soft_mask.py",
        "parameter.ndim) * strength",
        "parameter.ndim)",
        "units/test_soft_mask.py",
    ),
    "contrast: the prior view is no negative": Mutation(
        "units/contrast.py",
        "torch.cat([_gather(positive), _gather(prior)])",
        "_gather(positive)",
        "units/test_contrast.py",
    ),
    "contrast: multiplied by the temperature": Mutation(
        "units/contrast.py",
        "anchor @ others.T / temperature",
        "anchor @ others.T * temperature",
        "units/test_contrast.py",
    ),
    "contrast: padding is pooled": Mutation(
        "units/contrast.py",
        "(hidden * mask).sum(dim=1) / mask.sum(dim=1)",
        "hidden.mean(dim=1)",
        "units/test_contrast.py",
    ),
    "penalty: pushes away": Mutation(
        "methods/penalty.py",
        "values[name] - self.anchor[name], value=weight",
        "self.anchor[name] - values[name], value=weight",
        "methods/test_penalties.py",
    ),
    "penalty: twice its gradient": Mutation(
        "methods/penalty.py",
        "self.args.penalty_weight * self.trainer.gradient_scale",
        "2 * self.args.penalty_weight * self.trainer.gradient_scale",
        "methods/test_penalties.py",
    ),
    "ewc: anchors of separate domains are not weighted": Mutation(
        "methods/ewc.py",
        "torch.where(total > 0, new / total, 1.0)",
        "torch.where(total > 0, 0.5 + 0 * new, 1.0)",
        "methods/test_penalties.py",
    ),
    "ewc: the labels of the data for those of the model": Mutation(
        "methods/ewc.py",
        'if labels == "true":',
        'if labels != "true":',
        "methods/test_penalties.py",
    ),
    "si: the path with the wrong sign": Mutation(
        "methods/si.py",
        "self.path[name].sub_(",
        "self.path[name].add_(",
        "methods/test_penalties.py",
    ),
    "spg: the latest domain instead of the largest": Mutation(
        "methods/spg.py",
        "importance if old is None else torch.maximum(old, importance)",
        "importance",
        "methods/test_spg.py",
    ),
    "agem: projects where the gradients agree": Mutation(
        "methods/agem.py",
        "if product < 0:",
        "if product > 0:",
        "methods/test_agem.py",
    ),
    "gem: the projection with the wrong sign": Mutation(
        "methods/gem.py",
        "nnls(matrix, -(vector",
        "nnls(matrix, (vector",
        "methods/test_gem.py",
    ),
    "interpolate: old and new exchanged": Mutation(
        "methods/interpolate.py",
        "torch.lerp(old[name], new[name], 1.0",
        "torch.lerp(new[name], old[name], 1.0",
        "methods/test_replay.py",
    ),
    "lwf: no temperature": Mutation(
        "methods/lwf.py",
        "return temperature**2 * F.kl_div",
        "return F.kl_div",
        "methods/test_replay.py",
    ),
    "anchor: the divergence the other way round": Mutation(
        "methods/targets.py",
        "F.kl_div(ours, theirs,",
        "F.kl_div(theirs, ours,",
        "methods/test_anchor.py",
    ),
    "anchor: cached tokens without their mean": Mutation(
        "methods/targets.py",
        "logits.gather(1, tokens).mean(1)",
        "logits.gather(1, tokens).amax(1)",
        "methods/test_anchor.py",
    ),
    "budget: λ falls where it should rise": Mutation(
        "methods/budget.py",
        "self.weight * math.exp(change)",
        "self.weight * math.exp(-change)",
        "methods/test_budget.py",
    ),
    "budget: the landing looks at one half of the way alone": Mutation(
        "methods/budget.py",
        "low, high = (alpha, high) if",
        "low, high = (low, alpha) if",
        "methods/test_budget.py",
    ),
    "remember: weights of sources are not heeded": Mutation(
        "methods/remembered.py",
        "np.cumsum(weights / weights.sum())",
        "np.cumsum(np.ones_like(weights) / len(weights))",
        "methods/test_remembered.py",
    ),
    "written text: a new document sees the old one": Mutation(
        "methods/writing.py",
        "seen.masked_fill(begins, 0)",
        "seen.masked_fill(begins, 1)",
        "methods/test_writing.py",
    ),
    "anchor: the domain's loss is of the remembered rows too": Mutation(
        "training/trainer.py",
        'own = outputs.of_first(len(inputs["input_ids"]))',
        "own = outputs",
        "methods/test_anchor.py",
    ),
    "trainer: the loss of a batch is not divided by the step's": Mutation(
        "training/trainer.py",
        "losses.sum() / num_items_in_batch",
        "losses.mean()",
        "training/test_trainer.py",
    ),
    "trainer: others see the step before it is masked": Mutation(
        "training/trainer.py",
        '        self.call_hook("mask_step")\n        self.call_hook("after_step")\n',
        '        self.call_hook("after_step")\n        self.call_hook("mask_step")\n',
        "methods/test_pairs.py",
    ),
    "randomness: one stream for all addresses": Mutation(
        "training/measuring.py",
        "addressed_seed(self.args.seed, self.domain, *address)",
        "self.args.seed",
        "training/test_measuring.py",
    ),
    "results: forgetting from the first value": Mutation(
        "measure/results.py",
        "worth[stage:last, j].max(axis=0)",
        "worth[stage, j]",
        "measure/test_results.py",
    ),
    "frontier: straight lines between the runs": Mutation(
        "report/frontier.py",
        "if min(below, above) <= 1e-9 * slope:",
        "if True:",
        "report/test_frontier.py",
    ),
    "packing: the windows of a document overlap": Mutation(
        "data/packing.py",
        "prefix + ids[start : start + room] + suffix",
        "prefix + ids[max(0, start - 1) : start + room] + suffix",
        "data/test_packing.py",
    ),
}


def survives(name: str, mutation: Mutation, tree: Path) -> bool:
    """Whether the test passes with the mutation."""
    path = tree / "das_lm" / mutation.file
    text = path.read_text(encoding="utf-8")
    if mutation.right not in text:
        raise SystemExit(f"{name}: {mutation.file} has no '{mutation.right}'; write the mutation anew")
    path.write_text(text.replace(mutation.right, mutation.wrong, 1), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        f"tests/{mutation.test}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode == 0
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="Mutations with this word in their name.")
    only, survived = parser.parse_args().only, []
    with TemporaryDirectory() as scratch:
        for part in PARTS:
            copy = shutil.copytree if (TREE / part).is_dir() else shutil.copy
            copy(TREE / part, Path(scratch, part))
        chosen = {name: one for name, one in MUTATIONS.items() if only in name}
        for number, (name, mutation) in enumerate(chosen.items(), 1):
            alive = survives(name, mutation, Path(scratch))
            survived += [name] * alive
            print(f"{number}/{len(chosen)} {'SURVIVED' if alive else 'caught'}: {name}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
