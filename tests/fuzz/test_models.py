"""Model directories with a mistake in them: each can be used, or is refused in one message that names it."""

import json
import random
import shutil
from pathlib import Path

import datasets
import peft
import pytest
import torch

from das_lm.data.domains import Domain
from das_lm.errors import UserError
from das_lm.model.loading import check_model, load_model, load_tokenizer
from das_lm.run.inspection import load_config
from das_lm.run.reading import held_out_windows
from das_lm.run.recipe import Recipe
from das_lm.run.trainers import measuring_trainer
from tests.fuzz.harness import seconds
from tests.fuzz.mutations import bad_bytes, bad_json, bad_tensors
from tests.helpers import WORDS, build_tokenizer, tiny_roberta

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, about fields of an adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories with one model: whole, in shards, as a pickle, and as an adapter of the first."""
    root = tmp_path_factory.mktemp("models")
    model = tiny_roberta()
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "shards", max_shard_size="20KB")
    model.config.save_pretrained(root / "pickle")
    torch.save(model.state_dict(), root / "pickle" / "pytorch_model.bin")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(root / "adapter")
    change(root / "adapter" / "adapter_config.json", base_model_name_or_path=str(root / "whole"))
    for name in ("whole", "shards", "pickle", "adapter"):
        build_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def check(models):
    """Use a copy of one of the models that has a mistake; what is said of it, or nothing if it can be used."""
    datasets.disable_progress_bars()
    bad, documents = models / "bad", datasets.Dataset.from_dict({"text": [" ".join(WORDS[:20])]})
    training = {"max_length": 24, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    recipe = Recipe(str(bad), [Domain("bio")], str(models / "out"), method="naive", training=training)

    def use(name, mistake):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(models / name, bad)
        mistake(bad)
        try:
            with seconds(20):
                check_model(recipe)
                tokenizer = load_tokenizer(str(bad), recipe)
                trainer = measuring_trainer(load_model(str(bad), recipe), recipe, tokenizer, str(models / "out"))
                trainer.measure(held_out_windows(recipe, {"bio": documents}, tokenizer, trainer.args).measured)
        except UserError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 1_000
            return str(error)

    yield use
    datasets.enable_progress_bars()


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def changed(file, key, value):
    return lambda directory: change(directory / file, **{key: value})


def written(file, content):
    return lambda directory: (directory / file).write_bytes(content)


def in_tokenizer(change):
    def mistake(directory):
        data = json.loads((directory / "tokenizer.json").read_text())
        change(data)
        (directory / "tokenizer.json").write_text(json.dumps(data))

    return mistake


CONFIG = list(tiny_roberta().config.to_dict())
FURTHER = ["num_labels", "id2label", "quantization_config", "chunk_size_feed_forward", "return_dict"]


@pytest.mark.parametrize("value", ["x", -1, 1_000_000_000, [], 10**400], ids=lambda value: str(value)[:10])
def test_every_field_of_a_config(check, value):
    for key in [*CONFIG, *FURTHER]:
        check("whole", changed("config.json", key, value))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "adapter_config.json"])
def test_every_field_of_a_tokenizer_and_an_adapter(check, models, file):
    for number, key in enumerate(json.loads((models / "adapter" / file).read_text())):
        check("adapter", changed(file, key, ["x", [1], {}, 5][number % 4]))


SYSTEMATIC = [
    *(("whole", file) for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")),
    *(("whole", file) for file in ("special_tokens_map.json", "added_tokens.json", "generation_config.json")),
    ("shards", "model.safetensors.index.json"),
    ("pickle", "pytorch_model.bin"),
    *(("adapter", file) for file in ("adapter_config.json", "adapter_model.safetensors")),
]


@pytest.mark.parametrize("content", [b"", b"{}", b"5", b"[" * 5_000, b"\xff\0"], ids=lambda one: repr(one[:4]))
def test_every_file_holds_something_else(check, content):
    for name, file in SYSTEMATIC:
        check(name, written(file, content))


@pytest.mark.parametrize("name, file", SYSTEMATIC)
def test_random_mistakes_in_every_file(check, models, name, file):
    path = models / name / file
    content = path.read_bytes() if path.exists() else b"{}"
    for seed in range(6):
        draw = random.Random(seed)
        if file.endswith(".json"):
            bad = bad_json(draw, json.loads(content))
        else:
            bad = bad_tensors(draw, content) if file.endswith(".safetensors") else bad_bytes(draw, content)
        check(name, written(file, bad))


def _links(file):
    def mistake(directory):
        (directory / file).unlink()
        (directory / file).symlink_to(file)

    return mistake


def _in_vocabulary(**tokens):
    return in_tokenizer(lambda data: data["model"]["vocab"].update(tokens))


def _panic(data):
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}


def _bytes_of(file, share):
    return lambda directory: (directory / file).write_bytes(
        (content := (directory / file).read_bytes())[: int(len(content) * share)]
    )


TOLD = {  # (what is broken, how, part of the message)
    "labels": ("whole", changed("config.json", "num_labels", 10**9), "num_labels: 1e+09"),
    "layers": ("whole", changed("config.json", "num_hidden_layers", 10**9), "num_hidden_layers: 1e+09"),
    "size": ("whole", changed("config.json", "hidden_size", 64), "its weights have other shapes than its config says"),
    "vocabulary": ("whole", changed("config.json", "vocab_size", 10**9), "other shapes"),
    "architectures": ("whole", changed("config.json", "architectures", [5]), "architectures that are no names"),
    "forward": ("whole", changed("config.json", "return_dict", False), "can be loaded, but not run"),
    "link": ("whole", _links("config.json"), "bad"),
    "gap": ("whole", _in_vocabulary(w3=64), "ids up to 64, and the model knows 64 tokens"),
    "more": ("whole", _in_vocabulary(z=64, y=65), "ids up to 65"),
    "special": ("whole", in_tokenizer(lambda data: data["post_processor"]["special_tokens"]["<s>"].update(ids=[999])),
                "ids up to 999"),
    "unknown": ("whole", in_tokenizer(lambda data: data["model"].update(unk_token="nope")), "Missing [UNK] token"),
    "panic": ("whole", in_tokenizer(_panic), "Cannot parse precompiled_charsmap"),
    "longest": ("whole", changed("tokenizer_config.json", "model_max_length", "x"), "model_max_length is no number"),
    "kind": ("whole", changed("tokenizer_config.json", "tokenizer_class", "GPT2Tokenizer"), "makes no token"),
    "shard": ("shards", changed("model.safetensors.index.json", "weight_map", {"x": "../../nowhere"}), "bad"),
    "shortened": ("whole", _bytes_of("model.safetensors", 0.9), "incomplete metadata"),
    "pickle": ("pickle", written("pytorch_model.bin", b"\x80\x04cos\nsystem\n."), "save the model as safetensors"),
    "shortened pickle": ("pickle", _bytes_of("pytorch_model.bin", 0.5), "cannot be loaded"),
    "adapter": ("adapter", changed("adapter_config.json", "r", "x"), "the adapter in"),
    "base": ("adapter", changed("adapter_config.json", "base_model_name_or_path", 5), "base_model_name_or_path"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_told(check, case):
    name, mistake, message = TOLD[case]
    assert message in check(name, mistake)


@pytest.mark.parametrize("name", ["whole", "shards", "pickle", "adapter"])
def test_without_a_mistake_they_can_be_used(check, name):
    assert check(name, lambda directory: None) is None


@pytest.mark.parametrize("value", ["x", None, [1]])
def test_units_tell_a_broken_config(tmp_path, value):
    tiny_roberta().config.save_pretrained(tmp_path)
    change(Path(tmp_path, "config.json"), hidden_dropout_prob=value)
    with pytest.raises(UserError, match="is no model type, no directory with a config.json"):
        load_config(str(tmp_path))
