"""Recipes: what loads, what overrides do, and the message for every mistake."""

import sys
from pathlib import Path

import pytest
import yaml

from das_lm.data.domains import Domain
from das_lm.errors import UserError
from das_lm.run.recipe import Recipe
from das_lm.run.recipe_file import describe_recipes, find_recipe, load_recipe, recipes
from das_lm.training.config import DASConfig

MINIMAL = """\
model_name_or_path: built-in
output_dir: out
domains:
  - name: bio
  - name: cs
    data: cs.txt
    training: {max_steps: 7}
measure:
  - name: general
training:
  max_steps: 5
  learning_rate: 1e-3
"""


@pytest.fixture(autouse=True)
def _directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="r.yaml"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def fail(text, overrides=None):
    with pytest.raises(UserError) as error:
        load_recipe(write(text), overrides)
    assert "pydantic" not in str(error.value)
    return str(error.value)


# What loads


def test_a_recipe():
    recipe = load_recipe(write(MINIMAL))
    assert recipe.domains == [Domain("bio"), Domain("cs", "cs.txt", training={"max_steps": 7})]
    assert recipe.measure == [Domain("general")]
    assert recipe.method == ["das"]
    assert recipe.schedule == "sequential"
    assert recipe.training == {"max_steps": 5, "learning_rate": 1e-3}  # YAML reads 1e-3 as text


def test_training_arguments():
    recipe = load_recipe(write(MINIMAL))
    bio, cs = (recipe.training_arguments(domain, "there") for domain in recipe.domains)
    assert isinstance(bio, DASConfig)
    assert (bio.max_steps, cs.max_steps, recipe.training_arguments(None, "there").max_steps) == (5, 7, 5)
    assert (bio.learning_rate, cs.learning_rate) == (1e-3, 1e-3)
    assert bio.output_dir == "there"


@pytest.mark.parametrize(
    "key, given, value",
    [
        ("weight_decay", "'1e-3'", 1e-3),
        ("warmup_steps", "0.1", 0.1),
        ("max_steps", "20.0", 20),
        ("bf16_full_eval", "'no'", False),
        ("lr_scheduler_type", "cosine", "cosine"),
        ("lr_scheduler_kwargs", "{num_cycles: 2}\n  lr_scheduler_type: cosine", {"num_cycles": 2}),
        ("soft_mask_units", "[head, output]", ["head", "output"]),
        ("importance_batch_size", "null", None),
    ],
)
def test_training_values_are_converted(key, given, value):
    recipe = load_recipe(write(MINIMAL.replace("max_steps: 5", f"{key}: {given}")))
    assert recipe.training[key] == value
    assert type(recipe.training[key]) is type(value)


def test_yaml_round_trip_without_secrets():
    text = MINIMAL + "  average_tokens_across_devices: false\n  debug: [underflow_overflow]\n"
    text += "description: 'Ein Text: über Wörter'\nunits: {layers: encoder}\nmethod: naive\nschedule: sequential\n"
    recipe = load_recipe(write(text), {"training": {"hub_token": "hf_secret"}})
    printed = recipe.to_yaml()
    assert "hf_secret" not in printed
    assert recipe.training.pop("hub_token") == "hf_secret"
    again = load_recipe(write(printed, "again.yaml"))
    assert again == recipe
    assert again.training["average_tokens_across_devices"] is False
    assert again.to_yaml() == printed


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    assert {"bio_then_cs", "bio_then_cs_roberta", "das_six_domains"} <= set(recipes())
    (tmp_path / "recipes").mkdir()
    write(MINIMAL + "description: my own\n", "recipes/mine.yaml")
    assert find_recipe("mine") == find_recipe("recipes/mine.yaml") == Path("recipes/mine.yaml")
    assert describe_recipes()["mine"] == "my own"
    with pytest.raises(UserError, match="Did you mean 'bio_then_cs'") as error:
        find_recipe("bio_then_css")
    there_are = (
        "There are bio_then_cs, bio_then_cs_gpt, bio_then_cs_qwen_lora, bio_then_cs_roberta, das_six_domains, mine."
    )
    assert there_are in str(error.value)
    with pytest.raises(UserError, match="recipe 'recipes': a directory"):
        find_recipe("recipes")


@pytest.mark.parametrize("name", ["bio_then_cs", "bio_then_cs_roberta", "das_six_domains"])
def test_shipped_recipes(name):
    recipe = load_recipe(name, check_device=False)
    assert recipe.method[:2] == ["das", "anchor"][: 2 if recipe.remember else 1]
    assert recipe.description
    assert recipe.output_dir == f"output/{name}"
    assert load_recipe(write(recipe.to_yaml()), check_device=False) == recipe


def test_the_six_domains_stand_in_the_order_of_the_authors():
    recipe = load_recipe("das_six_domains", check_device=False)
    assert [domain.name for domain in recipe.domains] == ["restaurant", "acl", "ai", "phone", "pubmed", "camera"]
    arguments = recipe.training_arguments(recipe.domains[0], "out")
    assert (arguments.max_length, arguments.max_steps, arguments.learning_rate) == (164, 2500, 1e-4)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 256


def test_a_device_that_is_not_there_is_no_mistake_of_the_recipe(monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    text = write(MINIMAL.replace("max_steps: 5", "bf16: true"))
    with pytest.raises(UserError, match="r.yaml:11: domain 'bio': training arguments: .*bf16"):
        load_recipe(text)
    assert load_recipe(text, check_device=False).training == {"bf16": True, "learning_rate": 1e-3}


# Overrides


def test_top_level_keys_are_overridden():
    overrides = {
        "model_name_or_path": "roberta-base",
        "method": ["naive"],
        "output_dir": "b",
        "schedule": "sequential",
    }
    recipe = load_recipe(write(MINIMAL), overrides)
    assert (recipe.model_name_or_path, recipe.method, recipe.output_dir) == ("roberta-base", ["naive"], "b")


def test_training_from_the_command_line_goes_before_that_of_a_domain():
    recipe = load_recipe(write(MINIMAL), {"training": {"max_steps": 9}})
    assert [recipe.training_arguments(domain, "out").max_steps for domain in recipe.domains] == [9, 9]


def test_training_shared_through_an_alias():
    text = MINIMAL.replace("{max_steps: 7}", "&shared {max_steps: 7}")
    text = text[: text.index("training:\n")] + "training: *shared\n"
    recipe = load_recipe(write(text), {"training": {"max_steps": 9}})
    assert [recipe.training_arguments(domain, "out").max_steps for domain in [None, *recipe.domains]] == [9, 9, 9]


def test_training_overrides_without_training_in_the_recipe():
    recipe = load_recipe(write("model_name_or_path: built-in\noutput_dir: out\ndomains: [name: bio]"))
    assert recipe.training == {}
    recipe = load_recipe("r.yaml", {"training": {"max_steps": 9}})
    assert recipe.training == {"max_steps": 9}


DOMAINS = """\
model_name_or_path: built-in
output_dir: out
domains:
  - {name: bio, training: {seed: 1}}
  - {name: wiki, data: "hub:org/wiki", config: en, split: test, column: body, held_out: "split:dev", max_documents: 9}
  - {name: own, data: [a.txt, b.txt], held_out: held.txt, min_characters: 5, column: body}
measure:
  - {name: general, min_characters: 30}
"""


def domains(*specs, measure=(), **more):
    recipe = load_recipe(write(DOMAINS), {"domain": list(specs), "measure": list(measure), **more})
    return recipe.domains, recipe.measure


def test_named_domains_replace_the_recipes_in_the_order_given():
    general = Domain("general", min_characters=30)
    bio = Domain("bio", training={"seed": 1})
    assert domains("own", "bio") == (
        [Domain("own", ["a.txt", "b.txt"], held_out="held.txt", min_characters=5, column="body"), bio],
        [general],
    )
    assert domains("cs") == ([Domain("cs")], [general])  # built-in
    assert domains("bio", "general") == ([bio, general], [])  # what is learned is measured anyway


def test_data_of_a_named_domain():
    learned, _ = domains("bio=x/*.jsonl.gz", "wiki=w.txt,v.txt", "own=o.csv", "new=hub:org/new")
    assert learned == [
        Domain("bio", "x/*.jsonl.gz", training={"seed": 1}),
        Domain("wiki", ["w.txt", "v.txt"]),
        Domain("own", "o.csv", held_out="held.txt", min_characters=5),
        Domain("new", "hub:org/new"),
    ]
    learned, _ = domains("own=o.csv", "bio", text_column="abstract")
    assert [domain.column for domain in learned] == ["abstract", "text"]


def test_measured_domains_are_added_or_exchanged():
    learned, measured = domains(measure=["general=g.txt", "cs", "more=m.txt"])
    assert [domain.name for domain in learned] == ["bio", "wiki", "own"]
    assert measured == [
        Domain("general", "g.txt", min_characters=30),
        Domain("cs"),
        Domain("more", "m.txt"),
    ]
    _, measured = domains("cs", measure=["bio"])  # one that is not learned this time
    assert measured == [Domain("general", min_characters=30), Domain("bio")]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"domain": ["boi"]}, "--domain boi: neither the recipe nor the built-in text has a domain of that name. Did"),
        ({"domain": ["x="]}, "--domain x=: no data after '='; write --domain x=PATH"),
        ({"domain": ["bio", "bio=x.txt"]}, "--domain bio=x.txt: 'bio' is given twice"),
        ({"domain": ["../x=a.txt"]}, "--domain: domains[0].name: '../x' names a folder"),
        ({"domain": ["x=hub:"]}, "--domain: domains[0].data: names no data set"),
        ({"measure": ["own=o.txt"]}, "--measure: 'own' stands there twice"),
        ({"text_column": "x", "domain": ["bio"]}, "--text_column: it is the column of text given as"),
        ({"training": {"max_length": 3}}, "--max_length: domain 'bio': training arguments: max_length: 3 must be at"),
        ({"method": ["dsa"]}, "--method: there is no method 'dsa'. Did you mean 'das'?"),
        (
            {"schedule": "serial"},
            "--schedule: expected one of 'sequential', 'alternating', 'interleaved', n",
        ),
    ],
)
def test_bad_overrides_name_the_option(overrides, message):
    assert message in fail(DOMAINS, overrides)


def test_places_of_entries_that_move():
    text = DOMAINS.replace("min_characters: 5", "min_characters: 0")
    assert fail(text, {"domain": ["bio", "own"]}).startswith(
        "r.yaml:6: domains[1].min_characters: 0 must be at least 1"
    )


# Mistakes

BAD = {
    "unknown key": ("output_dir", "output_dri", "r.yaml:2: output_dri: unknown key. Did you mean 'output_dir'?"),
    "missing key": ("output_dir: out\n", "", "r.yaml: output_dir: missing; give text"),
    "unknown key of a domain": ("data:", "date:", "r.yaml:6: domains[1].date: unknown key. Did you mean 'data'?"),
    "unknown key of measure": (
        "- name: general",
        "- {name: general, colum: x}",
        "r.yaml:9: measure[0].colum: unknown key. Did you mean 'column'?",
    ),
    "unknown training key": (
        "learning_rate",
        "lerning_rate",
        "r.yaml:12: training.lerning_rate: unknown key. Did you mean 'learning_rate'?",
    ),
    "unknown training key of a domain": (
        "{max_steps: 7}",
        "{max_step: 7}",
        "r.yaml:7: domains[1].training.max_step: unknown key. Did you mean 'max_steps'?",
    ),
    "wrong type": ("output_dir: out", "output_dir: [out]", "r.yaml:2: output_dir: expected text, not a list"),
    "domains no list": (
        "domains:\n",
        "domains: bio\nnone:\n",
        "r.yaml:3: domains: expected a list, each entry a mapping",
    ),
    "domain no mapping": (
        "- name: bio",
        "- bio",
        "r.yaml:4: domains[0]: expected a mapping of keys to values, not the",
    ),
    "wrong type in a domain": (
        "data: cs.txt",
        "{data: cs.txt, max_documents: many}"[1:-1].replace(", ", "\n    "),
        "r.yaml:7: domains[1].max_documents: expected a whole number or null, not the text 'many'",
    ),
    "wrong type of training": (
        "max_steps: 5",
        "max_steps: five",
        "r.yaml:11: training.max_steps: expected a whole number, not the text 'five'",
    ),
    "fraction of a step": ("max_steps: 5", "max_steps: 2.5", "training.max_steps: expected a whole number, not 2.5"),
    "switch for a number": ("max_steps: 5", "max_steps: yes", "training.max_steps: expected a whole number, not true"),
    "null for a number": ("max_steps: 5", "max_steps:", "training.max_steps: expected a whole number, not null"),
    "choice": (
        "max_steps: 5",
        "lr_scheduler_type: cosin",
        "r.yaml:11: training.lr_scheduler_type: there is no 'cosin'. Did you mean 'cosine'?",
    ),
    "DASConfig's own check": (
        "max_steps: 5",
        "contrast_temperature: 0",
        "r.yaml:11: domain 'bio': training arguments: contrast_temperature: 0.0 must be at least 0.0001",
    ),
    "DASConfig's check of a domain": (
        "{max_steps: 7}",
        "{ema_decay: 2}",
        "r.yaml:7: domain 'cs': training arguments: ema_decay: 2.0 must be between 0 and 1",
    ),
    "output_dir in training": ("max_steps: 5", "output_dir: x", "r.yaml:11: training.output_dir: belongs to the top"),
    "resume in training": ("max_steps: 5", "resume_from_checkpoint: x", "continue a run with --resume"),
    "training no mapping": ("training:\n", "training: [\n", "r.yaml"),
    "no domains": ("domains:", "domains: []\nunits:", "r.yaml:3: domains: is empty; name at least one domain"),
    "domain twice": ("- name: cs", "- name: bio", "r.yaml:3: domains: 'bio' stands there twice"),
    "domains alike but for case": ("- name: cs", "- name: Bio", "r.yaml:3: domains: 'Bio' stands there twice"),
    "learned and measured": ("- name: general", "- name: cs", "r.yaml:8: measure: 'cs' stands there twice"),
    "trained though measured only": (
        "- name: general",
        "- {name: general, training: {seed: 1}}",
        "r.yaml:8: measure: 'general' is never trained on",
    ),
    "no built-in text": (
        "- name: bio",
        "- name: boi",
        "r.yaml:4: domains[0].data: there is no built-in text named 'boi'",
    ),
    "no held-out text": (
        "data: cs.txt",
        "held_out: 0",
        "r.yaml:6: domains[1].held_out: 0 must lie between 0 and 1",
    ),
    "method": (
        "measure:",
        "method: dass\nmeasure:",
        "r.yaml:8: method: there is no method 'dass'. Did you mean 'das'?",
    ),
    "method twice": ("measure:", "method: [das, das]\nmeasure:", "method: das, das: a method stands there twice"),
    "no method": ("measure:", "method: []\nmeasure:", "method: is empty; for training without a method write naive"),
    "schedule of das": (
        "measure:",
        "schedule: interleaved\nmeasure:",
        "r.yaml:8: schedule: 'interleaved' does not go with the method 'das', which consolidates when a domain ends",
    ),
    "schedule and training of a domain": (
        "measure:",
        "schedule: alternating\nmethod: naive\nmeasure:",
        "r.yaml:8: schedule: 'alternating' trains on all domains at once, so 'cs' cannot have training arguments",
    ),
    "empty name of a model": ("built-in\n", "''\n", "r.yaml:1: model_name_or_path: is empty"),
    "duplicate key": (
        "output_dir: out",
        "output_dir: a\noutput_dir: b",
        "r.yaml:3: output_dir: the key stands there twi",
    ),
    "duplicate training key": (
        "{max_steps: 7}",
        "{seed: 7, seed: 8}",
        "domains[1].training.seed: the key stands there tw",
    ),
    "broken YAML": ("domains:", "domains: ]", "r.yaml:3: broken YAML:"),
    "tab": ("  - name: bio", "\t- name: bio", "r.yaml:4: broken YAML:"),
    "Python object": ("output_dir: out", "output_dir: !!python/name:os.system", "r.yaml:2: broken YAML:"),
    "number as key": ("output_dir:", "7: x\noutput_dir:", "7: unknown key."),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes(case):
    old, new, message = BAD[case]
    assert old in MINIMAL
    assert message in fail(MINIMAL.replace(old, new, 1))


def test_importance_of_one_domain_after_another_is_measured_in_one_way():
    text = MINIMAL.replace("{max_steps: 7}", "{importance_normalization: rank}")
    message = (
        "training: domain 'cs' has importance_normalization 'rank', and 'bio', whose importance it takes over, 'pa"
    )
    assert message in fail(text)
    load_recipe(write(text.replace("max_steps: 5", "importance_normalization: rank")))
    load_recipe(write(text.replace("rank}", "rank, importance: proxy}")))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"\xff\xfe\x00", "r.yaml: not UTF-8 text (byte 0)"),
        (
            "",
            "r.yaml: expected a mapping of keys to values, such as 'model_name_or_path: built-in', not an empty file",
        ),
        ("- a\n", "not a list"),
        ("domains: &a [*a]", "r.yaml: broken YAML: an alias refers to what contains it"),
    ],
)
def test_files_that_are_no_recipes(text, message):
    assert message in fail(text)


def test_all_mistakes_are_told_at_once():
    text = MINIMAL.replace("output_dir", "output_dri").replace("max_steps: 5", "max_step: 5")
    lines = fail(text).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["output_dir", "output_dri", "training.max_step"]


def test_mistakes_in_python():
    with pytest.raises(UserError, match="Recipe: domains: is empty"):
        Recipe("built-in", [], "out")
    with pytest.raises(UserError, match="Recipe: domains: missing"):
        Recipe("built-in", output_dir="out")
    recipe = Recipe("built-in", [Domain("bio")], "out", training={"max_step": 3})
    with pytest.raises(UserError, match="domain 'bio': training.max_step: unknown key. Did you mean 'max_steps'"):
        recipe.training_arguments(recipe.domains[0], "out")


def test_import_is_light(tmp_path):
    import subprocess

    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, das_lm.run.recipe_file, das_lm.cli; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert out.stdout.strip() == "[]"


def test_yaml_of_a_recipe_names_every_domain_in_full():
    printed = yaml.safe_load(load_recipe(write(MINIMAL)).to_yaml())
    assert printed["domains"] == [
        {"name": "bio", "data": "built-in"},
        {"name": "cs", "data": "cs.txt", "training": {"max_steps": 7}},
    ]
    assert printed["method"] == ["das"]
