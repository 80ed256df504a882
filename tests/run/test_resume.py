"""What a run may go on with: any logging, a longer domain where its schedule allows it; the same precision."""

import signal

import pytest
import yaml

from das_lm.errors import UserError
from das_lm.files import newest_checkpoint
from das_lm.measure.results import Results
from das_lm.report.run_page import _facts
from das_lm.run.directory import CADENCE, HARMLESS, LENGTH, check_output, open_output
from das_lm.run.evaluate import evaluate_run
from das_lm.run.recipe_file import load_recipe
from das_lm.training.config import DASConfig
from das_lm.training.resuming import check_length
from das_lm.training.trainer import ContinualTrainer
from tests.helpers import build_tokenizer, load_script, random_blocks, run_recipe, signal_at_step, tiny_roberta

RECIPE = """\
model_name_or_path: built-in
output_dir: out
domains:
  - {name: bio, training: {max_steps: 7}}
  - {name: cs}
training: {max_steps: 5, learning_rate: 1e-3}
"""


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Resume the run of a recipe with others: `begun(domain's old text, its new text, **training)`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    open_output(tmp_path / "out", load_recipe("r.yaml"), False)

    def resume(old="", new="", **training):
        (tmp_path / "r.yaml").write_text(RECIPE.replace(old, new))
        check_output(tmp_path / "out", load_recipe("r.yaml", {"training": training}), resume=True, overwrite=False)

    return resume


HARMLESS_CHANGES = {
    "logging_steps": 1, "disable_tqdm": True, "report_to": "none", "dataloader_num_workers": 2, "save_steps": 3,
    "eval_strategy": "epoch", "per_device_eval_batch_size": 2, "run_name": "x", "hub_private_repo": True,
    "lr_scheduler_type": "linear", "seed": 42,
}  # fmt: skip


def test_what_changes_no_number_may_change(begun):
    """The default, spelled out, is no change either."""
    for name, value in HARMLESS_CHANGES.items():
        begun(**{name: value})
    begun("name: cs", "name: cs, training: {logging_steps: 1}")
    begun("output_dir: out", "output_dir: out\ndescription: other words")
    known = set(DASConfig.__dataclass_fields__) | {"description", "trust_remote_code"}
    assert known >= HARMLESS | CADENCE | set(LENGTH)


@pytest.mark.parametrize(
    "old, new, training, difference",
    [
        ("", "", {"learning_rate": 2e-3, "logging_steps": 1}, "training.learning_rate: 0.001, not 0.002."),
        ("", "", {"weight_decay": 0.1}, "training.weight_decay: 0.0, not 0.1."),
        ("cs}", "cs, training: {seed: 3}}", {}, "domains[1].training.seed: none, not 3."),
        ("cs}", "cs, max_documents: 9}", {}, "domains[1].max_documents: none, not 9."),
        (
            "built-in",
            "built-in-causal",
            {"seed": 1},
            "model_name_or_path: built-in, not built-in-causal; training.seed",
        ),
    ],
)
def test_only_the_difference_is_told(begun, old, new, training, difference):
    with pytest.raises(UserError) as error:
        begun(old, new, **training)
    assert f"began with {difference}" in str(error.value)
    assert len(str(error.value)) < 300


def test_what_is_measured_may_decide(begun):
    following = {"lr_scheduler_type": "greedy", "metric_for_best_model": "bio_loss", "eval_strategy": "epoch"}
    with pytest.raises(UserError, match="training.metric_for_best_model.*training.eval_strategy"):
        begun(**following)


def test_a_finished_domain_stays_as_long_as_it_is(begun, tmp_path):
    begun(max_steps=9)
    (tmp_path / "out" / "1-bio").mkdir()
    begun("{name: cs}", "{name: cs, training: {max_steps: 9}}")
    begun(num_train_epochs=1)  # max_steps goes before
    with pytest.raises(UserError, match="'bio' is learned, with max_steps 7, not max_steps 9; give the same"):
        begun(max_steps=9)


WSD = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}}


@pytest.mark.parametrize(
    "schedule, step, message",
    [
        (
            {"lr_scheduler_type": "constant"},
            5,
            "learns 20 steps, not 10: the learning rate of lr_scheduler_type 'const",
        ),
        ({"lr_scheduler_type": "linear"}, 0, "0.001 in step 1"),
        ({"lr_scheduler_type": "linear"}, 5, "learning rate to 0.0005; in a run of 20 steps it would be 0.00075"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 6}, 5, "0.000833 in step 6"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, 5, "give max_steps 10, or begin anew"),
        (WSD, 6, "0.001 in step 7"),
        (WSD, 7, "in a run of 20 steps it would be 0.001: give"),
    ],
)
def test_longer_where_the_learning_rate_up_to_here_is_the_same(schedule, step, message, tmp_path):
    args = DASConfig(str(tmp_path), max_steps=20, learning_rate=1e-3, report_to="none", use_cpu=True, max_length=12,
                     per_device_train_batch_size=4, **schedule)  # fmt: skip
    trainer = ContinualTrainer(
        tiny_roberta(), args, train_dataset=random_blocks(16), processing_class=build_tokenizer()
    )
    checkpoint = tmp_path / f"checkpoint-{step}" if step else None
    try:
        told = check_length(trainer, {"max_steps": 10}, checkpoint)
    except UserError as error:
        told = str(error)
        assert "give max_steps 10" in told
    assert message in told
    assert check_length(trainer, {"max_steps": -1, "num_train_epochs": 5.0}, checkpoint) is None  # of 4 steps
    with pytest.raises(UserError, match="began to learn for 24 steps, and 20 are fewer"):
        check_length(trainer, {"max_steps": -1, "num_train_epochs": 6.0}, checkpoint)


@pytest.fixture(scope="module")
def lengthened(world, tmp_path_factory):
    """A run of 6 steps that was stopped in its third, and went on to 8; and one of 8."""
    root = tmp_path_factory.mktemp("lengthened")
    options = ["--method", "naive", "--domain", "bio", "--lr_scheduler_type", "constant"]
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, step=3)
        assert run_recipe(world, root / "run", *options, "--max_steps", "6") == 143
    assert newest_checkpoint(root / "run" / "1-bio.training").name == "checkpoint-3"
    assert run_recipe(world, root / "run", *options, "--max_steps", "8", "--resume", "--logging_steps", "1") == 0
    assert run_recipe(world, root / "whole", *options, "--max_steps", "8", "--logging_steps", "1") == 0
    return root, options


def test_longer_is_as_if_it_had_begun_so(lengthened, world, capsys):
    root, options = lengthened
    assert load_script("chaos").differences(root / "whole", root / "run") == []
    assert yaml.safe_load((root / "run" / "recipe.yaml").read_text())["training"]["max_steps"] == 8
    assert run_recipe(world, root / "run", *options, "--max_steps", "6", "--resume") == 2
    assert "'bio' is learned, with max_steps 8, not max_steps 6" in capsys.readouterr().err


def test_the_environment_decides_about_precision_and_is_told(lengthened, world, monkeypatch, capsys):
    root, options = lengthened
    facts = Results.load(root / "whole")
    assert facts.run["precision"] == {"mixed": "no", "float32": "ieee", "compiler": "no"}
    assert ["precision", "mixed no, float32 ieee, compiler no"] in _facts(facts)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # which the Trainer does not read
    assert run_recipe(world, root / "whole", *options, "--max_steps", "8", "--resume") == 2
    message = "--resume: the precision was mixed no, float32 ieee, compiler no, and would be mixed bf16, float32 ieee"
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="--run .*: the precision was mixed no"):
        evaluate_run(root / "whole")


def test_precision(monkeypatch, tmp_path):
    def precision(**training):
        return tuple(DASConfig(str(tmp_path), use_cpu=True, report_to="none", **training).precision.values())

    assert precision() == ("no", "ieee", "no")
    assert precision(bf16=True) == ("bf16", "ieee", "no")
    assert precision(torch_compile=True) == ("no", "ieee", "inductor default")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert precision() == ("no", "tf32", "eager true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION: 'fp8' is none of no, fp16, bf16"):
        precision()
