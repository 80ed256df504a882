"""Bad input, widely: over five hundred cases, each of which ends in success, or in one message and status 2, with
every file as it was. `mutations` makes them, hypothesis chooses; what was found stands below as tests of its own."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from das_lm.errors import UserError
from das_lm.methods import METHODS
from das_lm.training.config import DASConfig
from das_lm.training.trainer import ContinualTrainer
from tests.fuzz.harness import World
from tests.fuzz.mutations import (
    ODD_VALUES,
    ODD_WORDS,
    YAML_ODDITIES,
    bad_bytes,
    bad_command,
    bad_data,
    bad_json,
    bad_recipe,
    bad_tensors,
)
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

EVERY_OPTION = [field.name for field in dataclasses.fields(DASConfig)]


def cases(count: int):
    """A test of one argument, `draw`, in so many cases: the same in every run."""

    def decorate(test):
        test = settings(
            max_examples=count,
            derandomize=True,
            deadline=None,
            database=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(test)
        return given(draw=st.randoms(use_true_random=False))(test)

    return decorate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()  # no messages
        yield World(tmp_path_factory.mktemp("world"))
        datasets.enable_progress_bars()


@cases(110)
def test_recipes(world, draw):
    (world.root / "bad.yaml").write_bytes(bad_recipe(draw, (world.root / "recipe.yaml").read_text()))
    world.check(["pretrain", "--recipe", "bad.yaml", "--print_recipe"])


@cases(70)
def test_training_arguments(world, draw):
    command, name = ["pretrain", "--print_recipe", "--recipe"], draw.choice(EVERY_OPTION)
    if draw.random() < 0.5:
        world.check([*command, "recipe.yaml", f"--{name}", draw.choice(ODD_WORDS)])
    else:
        line = f"  {name}: {json.dumps(draw.choice(ODD_VALUES))}\n"
        (world.root / "bad.yaml").write_text((world.root / "recipe.yaml").read_text() + line)
        world.check([*command, "bad.yaml"])


@cases(110)
def test_command_lines(world, draw):
    command = bad_command(draw) if draw.random() < 0.5 else bad_command(draw, EVERY_OPTION)
    world.check(command, changes=["run"] if "run" in command else [])


@cases(60)
def test_data_files(world, draw):
    name, content = bad_data(draw)
    (world.root / name).write_bytes(content)
    world.check(["check-data", "recipe.yaml", "--domain", f"x={name}", "--n", "4"])


RUN = ("forgetting.json", "forgetting.json", "recipe.yaml", "1-bio/manifest.json", "1-bio/continual_state.json")
SPLIT = "--experiment split --method naive --seeds 0 --epochs 1 --no-search --workers 1"
READERS = {  # directory of the world -> (what is broken in a copy of it, the commands that read it)
    "run": (RUN, ["compare bad run", "compare bad", "report bad --output_dir out",
                  "evaluate --run bad --output_dir out", "pretrain --recipe recipe.yaml --output_dir bad --resume"]),
    "classic": (["benchmark.json", "benchmark.json", "runs/naive*/forgetting.json"],
                ["report bad", "compare bad", f"classic {SPLIT} --output_dir bad",
                 f"classic {SPLIT} --chosen_from bad --output_dir out"]),
    "search": (["search.json", "evaluations.jsonl"],
               ["search-lambda --experiment split --method ewc --high 10 --output_dir bad --resume"]),
}  # fmt: skip


@cases(80)
def test_results_and_states(world, draw):
    world.clean()
    name = draw.choice(["run", "run", "classic", "search"])
    files, commands = READERS[name]
    shutil.copytree(world.root / name, world.root / "bad")
    (path,) = (world.root / "bad").glob(draw.choice(files))
    text = path.read_text()
    content = bad_recipe(draw, text) if path.suffix == ".yaml" else bad_json(draw, json.loads(text))
    if path.suffix == ".jsonl" and draw.random() < 0.5:
        content += b"\n" + text.encode()
    path.write_bytes(content)
    world.check(draw.choice(commands).split(), changes=["bad"])


# ---- tensors -------------------------------------------------------------------------------------------------------


class _States(dict):
    def __repr__(self):  # hypothesis shows its arguments
        return "states"


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """By method: an object of it, and the file that it has written after a domain."""
    made = _States()
    for name in ("das", "ewc", "si", "rwalk", "spg", "ncl", "replay", "gem", "lwf"):
        directory = tmp_path_factory.mktemp(name)
        args = DASConfig(str(directory / "out"), max_steps=2, per_device_train_batch_size=4, report_to="none",
                         importance_samples=4, max_length=12, memory_size=4, use_cpu=True, disable_tqdm=True,
                         optim="sgd", max_grad_norm=0.0)  # fmt: skip
        trainer = ContinualTrainer(
            tiny_roberta(), args, METHODS[name](), train_dataset=random_blocks(12), processing_class=build_tokenizer()
        )
        trainer.train()
        (method,) = trainer.methods
        method.save(directory)
        (path,) = directory.glob("*.safetensors")
        made[name] = (method, path, path.read_bytes())
    return made


@cases(120)
def test_files_of_tensors(states, draw):
    name = draw.choice(["das", *states])
    method, path, content = states[name]
    path.write_bytes(bad_tensors(draw, content))
    try:
        method.load(path.parent)
    except UserError as error:
        assert str(path.parent) in str(error) or path.name in str(error)
    else:
        if name == "das":
            known = method.importance
            assert known.values.keys() == method.units.sizes.keys()
            for part in (known.values, *known.by_domain):
                assert all(((value >= 0) & (value <= 1)).all() for value in part.values())
    finally:
        path.write_bytes(content)
        method.load(path.parent)


def test_a_broken_importance_file_stops_a_run_before_it_writes(world):
    content = (world.root / "run" / "1-bio" / "importance.safetensors").read_bytes()
    for seed in range(4):
        (world.root / "bad.safetensors").write_bytes(bad_bytes(random.Random(seed), content[:2000]))
        command = "pretrain --recipe recipe.yaml --output_dir out --importance bad.safetensors"
        assert world.check(command.split()) == 2 and "importance: bad.safetensors" in world.message


# ---- what was found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", YAML_ODDITIES)
def test_odd_yaml(world, line):
    """Among them tags of Python objects, aliases that stand for a billion values, deep nesting, NUL."""
    recipe = (world.root / "recipe.yaml").read_text()
    (world.root / "bad.yaml").write_text(f"{recipe}\n{line}\n")
    world.check(["pretrain", "--recipe", "bad.yaml", "--print_recipe"])
    assert not (world.root / "pwned").exists()


PRINT, RESUME = "pretrain --print_recipe --recipe", "pretrain --recipe recipe.yaml --output_dir bad --resume"
#: A key in which aliases stand for 9⁸ words, and what a merge of mappings makes of as many.
BOMB = "".join(f", ? &{new} [{','.join([f'*{old}'] * 9)}] : 1" for old, new in zip("abcdefg", "bcdefgh", strict=True))
MERGED = "".join(f"{n}: &{n} {{<<: [{','.join([f'*{o}'] * 9)}]}}\n" for o, n in zip("abcdefg", "bcdefgh", strict=True))
FOUND = [  # (file of the world, its new content; command; part of the message)
    (None, "", f"{PRINT} recipe.yaml --gradient_checkpointing_kwargs ,", "is no mapping"),
    (None, "", f"{PRINT} recipe.yaml --num_train_epochs inf", "--num_train_epochs: expected a number"),
    (None, "", f"{PRINT} recipe.yaml --learning_rate nan", "--learning_rate: expected a number"),
    (None, "", f"{PRINT} recipe.yaml --output_dir \udcff", "is not UTF-8 text"),
    ("r.yaml", 'description: "\\ud800"', f"{PRINT} r.yaml", "half of a surrogate pair"),
    ("r.yaml", 'output_dir: "a\\0b"', f"{PRINT} r.yaml", "r.yaml:1: output_dir: holds NUL"),
    ("r.yaml", f"x: {{? &a [x] : 1{BOMB}}}", f"{PRINT} r.yaml", "a list or a mapping cannot be a key"),
    ("r.yaml", f"a: &a {{x: 1}}\n{MERGED}", "units gpt2 --entry r.yaml", "more than 10,000 keys"),
    ("r.yaml", "training: {hub_token: x}", f"{PRINT} r.yaml", "no place for a secret"),
    ("data.csv", "x" * 100_000, "check-data recipe.yaml --domain x=data.csv", "no column 'text'"),
    ("bad/recipe.yaml", "a: [", RESUME, "broken YAML"),
    ("bad/recipe.yaml", "domains: 1", RESUME, "bad/recipe.yaml:1: domains: expected"),
    ("bad/recipe.yaml", "x: !!python/name:os.system", RESUME, "broken YAML"),
    ("bad/forgetting.json", "[" * 10_000, "report bad", "forgetting.json cannot be read"),
    ("bad/forgetting.json", '{"version": 1, "run": {}, "domains": {"a": 1}, "stages": [{}]}', "compare bad", "not as"),
    ("bad/forgetting.json", '{"version": 1, "run": [], "domains": [], "stages": {}}', "compare bad", "not as"),
    ("bad/benchmark.json", '{"methods": {"naive": {"chosen": "x"}}}',
     f"classic {SPLIT} --chosen_from bad --output_dir out", "holds no finished benchmark"),
    ("bad/search.json", "[" * 10_000, "search-lambda --experiment split --output_dir bad --resume", "holds no search"),
]  # fmt: skip


@pytest.mark.parametrize("file, content, command, message", FOUND)
def test_found(world, file, content, command, message):
    if file:
        path = world.root / file
        if path.parent.name == "bad":
            name = {"search.json": "search", "benchmark.json": "classic"}.get(path.name, "run")
            shutil.copytree(world.root / name, path.parent)
        path.write_text(content)
    assert world.check(command.split()) == 2
    assert message in world.message


GONE, HUGE, EVALUATE = ..., 10**400, "evaluate --run bad --output_dir out"
RESULTS = [  # (where in forgetting.json, what stands there instead; command; part of the message, or none if it works)
    (("run", "recipe", "training", "learning_rate"), HUGE, "compare bad", "is no number that can be computed with"),
    (("intervals", "loss", "average", 0), HUGE, EVALUATE, "is no number that can be computed with"),
    (("run", "warnings", "bio"), float("nan"), EVALUATE, "'NaN' is no number"),
    (("stages", 0, "intervals", "general"), [], EVALUATE, "stages[0].intervals.general: "),
    (("stages", 1, "history"), {"a": 1}, "report bad --output_dir out", "stages[1].history: "),
    (("stages", 1, "importance", "maps"), GONE, "report bad --output_dir out", "stages[1].importance.maps: "),
    (("stages", 1, "scores", "bio"), GONE, "compare bad", "KeyError: 'bio'"),
    (("domains", "bio"), 7.5, "compare bad", "domains.bio: "),
    (("run", "recipe", "domains"), GONE, RESUME, "run.recipe.domains: "),
    (("run", "warnings"), GONE, RESUME, None),
]


@pytest.mark.parametrize("place, value, command, message", RESULTS, ids=lambda one: str(one)[:40])
def test_results_that_are_not_as_they_were_written(world, place, value, command, message):
    shutil.copytree(world.root / "run", world.root / "bad")
    path = world.root / "bad" / "forgetting.json"
    data = json.loads(path.read_text())
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    path.write_text(json.dumps(data))
    assert world.check(command.split(), changes=["bad"]) == (2 if message else 0)
    assert (message or "") in world.message


def test_a_broken_manifest_is_a_broken_checkpoint(tmp_path):
    from das_lm.files import MANIFEST, broken_file, seal

    (tmp_path / "x").write_text("x")
    seal(tmp_path)
    assert broken_file(tmp_path) is None
    for content in ("[1]", '{"files": []}', '{"files": {"x": 1}}', '{"files": {"x": {"bytes": 1}}}', "[" * 10_000):
        (tmp_path / MANIFEST).write_text(content)
        assert broken_file(tmp_path) == MANIFEST


def test_the_generators_are_functions_of_their_seed():
    assert [bad_command(random.Random(seed)) for seed in range(50)] == [
        bad_command(random.Random(seed)) for seed in range(50)
    ]
    assert "das_lm" not in [
        line.split()[1].split(".")[0]
        for line in Path(__file__).with_name("mutations.py").read_text().splitlines()
        if line.startswith(("import ", "from "))
    ]
