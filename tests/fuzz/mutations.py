"""
Bad input by the thousand: recipes, command lines, data files, files of tensors and of JSON, each made from a good one.

Every function takes a `random.Random`, so that a case is a function of its seed, or of what hypothesis draws. Nothing
here imports das_lm: `scripts/chaos.py` gives the same command lines to real processes.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

#: Values where others belong: empty, of other types, too large, no numbers, paths that lead elsewhere, other scripts.
# fmt: off
ODD_WORDS = [
    "", " ", "-", "--", "0", "-1", "1", "3", "1.5", "1e-3", "nan", "inf", "-inf", "1e400", "9" * 30, "-" + "9" * 30,
    "true", "false", "null", "None", "no", "[]", "{}", '{"a": 1}', '{"a":', "[1, 2]", '"x"', "%s", "{x}", "[red]x[/]",
    ".", "..", "a/b", "../../x", "/dev/null", "/dev/null/x", "~", "*", "**/*", "[", "out\n", "a" * 5000, "=",
    "=x", "x=", "x==y", ",", "x=,", "bio", "bio=", "bio=bio.txt", "../../x=bio.txt", ".hidden=bio.txt",
    "bio=bio.txt,", "bio=missing.txt", "bio=hub:", "bio=.", "cs=bio.txt", "BIO=bio.txt", "b\tio=bio.txt", "ü", "😀",
    "שלום", "a\u202eb", "e\u0301", "<script>alert(1)</script>", "$(touch pwned)", "\udcff", "x\udcff=bio.txt",
    "built-in", "built-in:general", "built-in:nowhere", "hub:", "split:", "split:x", "proxy", "auto", "adamw_torch",
    "das", "naive", "ewc", "das+ewc", "ewc+ewc", "naive: learning_rate=1e-3", "naive:", ": x=1", "das: x", "split",
    "model", "run", "run/1-bio", "bio.txt", "recipe.yaml", "missing", "missing.yaml", "base=model", "bio=run/1-bio",
]
# fmt: on

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 0.5, -0.1, 1e308, -1e308, 10**30, -(10**30), float("nan"), float("inf")),
    *([], {}, [None], [[]], [{}], {"a": 1}, {"": None}, [1, 2, 3], ["a", "a"], {"a": {"b": [{}]}}, {"name": "x"}),
    *ODD_WORDS,
]

#: Options that most commands know; a test gives all there are.
# fmt: off
OPTIONS = [
    "recipe", "model_name_or_path", "domain", "measure", "text_column", "schedule", "output_dir", "peft", "method",
    "attn_implementation", "trust_remote_code", "resume", "overwrite_output_dir", "print_recipe", "sweep", "seeds",
    "run", "checkpoint", "cloze", "end_task", "end_task_seeds", "pseudo_perplexity", "keep_models", "experiment",
    "learning_rate", "max_steps", "max_length", "num_train_epochs", "per_device_train_batch_size", "seed", "optim",
    "lr_scheduler_type", "lr_scheduler_kwargs", "save_steps", "eval_strategy", "eval_steps", "warmup_steps", "fp16",
    "importance", "importance_samples", "soft_mask_units", "soft_mask_strength", "contrast_weight", "mlm_probability",
    "reference", "title", "n", "output", "strict", "entry", "epochs", "workers", "groups", "tasks", "scenario",
    "data", "low", "high", "num_steps", "trials", "confirm", "threshold", "sampler", "log", "max_evaluations",
    "hub_token",
]
# fmt: on

#: Commands that work in a directory with `recipe.yaml`, `bio.txt`, `model/` and the finished run `run/`, none of which
#: trains for long.
COMMANDS = [
    "pretrain --recipe recipe.yaml --output_dir out --print_recipe",
    "pretrain --recipe recipe.yaml --output_dir out --max_steps 1 --domain bio=bio.txt",
    "pretrain --recipe recipe.yaml --output_dir run --max_steps 1 --resume",
    "pretrain --recipe recipe.yaml --output_dir out --method ewc --learning_rate 1e-3 --optim sgd --max_steps 1",
    "pretrain --recipe recipe.yaml --output_dir out --soft_mask_units head output --seed 3 --max_steps 1",
    "evaluate --run run --domain cs=bio.txt",
    "evaluate --checkpoint base=model bio=run/1-bio --domain bio=bio.txt --output_dir out",
    "compare run --measure loss --reference das",
    "report run --output_dir out --title x",
    "check-data recipe.yaml --domain bio=bio.txt --n 5 --output found.json",
    "sweep --recipe recipe.yaml --seeds 0 --output_dir out --sweep naive:learning_rate=1e-3",
    "classic --experiment split --method naive --seeds 0 --epochs 1 --no-search --output_dir out --workers 1",
    "search-lambda --experiment split --method ewc --low 0 --high 10 --trials 2 --confirm 2 --output_dir out",
    "units nothing --entry recipe.yaml",
    "recipes",
]


def bad_command(draw: random.Random, options: Sequence[str] = OPTIONS) -> list[str]:
    """The words of a das-lm command (without `das-lm`), one of [`COMMANDS`] with one to three mistakes; now and then
    it still works."""
    words = draw.choice(COMMANDS).split()
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place = draw.randrange(len(words) + 1)
        here = draw.randrange(len(words))
        kind = draw.randrange(10)
        if kind == 0 and len(words) > 1:
            del words[here]
        elif kind == 1:
            words.insert(place, words[here])
        elif kind == 2:
            words[here] = misspelt(draw, words[here])
        elif kind == 3:
            words[max(here, 1) if len(words) > 1 else 0] = draw.choice(ODD_WORDS)
        elif kind == 4:
            words.insert(max(place, 1), draw.choice(ODD_WORDS))
        elif kind in (5, 6):
            words += [f"--{draw.choice(options)}", draw.choice(ODD_WORDS)]
        elif kind == 7:
            words.append(f"--{draw.choice(options)}={draw.choice(ODD_WORDS)}")
        elif kind == 8:
            words.append(f"--{draw.choice(options)}")
        else:
            words += [f"--{draw.choice(('domain', 'measure', 'cloze', 'end_task'))}", draw.choice(ODD_WORDS)]
    return words


def misspelt(draw: random.Random, word: str) -> str:
    """A word with one letter lost, doubled, exchanged or in capitals."""
    if not word:
        return "x"
    place = draw.randrange(len(word))
    letter = draw.choice(["", word[place] * 2, draw.choice("abcxyz-_. "), word[place].swapcase()])
    return word[:place] + letter + word[place + 1 :]


# ---- text that is YAML or JSON -----------------------------------------------------------------------------------

# fmt: off
YAML_ODDITIES = [
    "x: !!python/object/apply:os.system ['touch pwned']", "x: !!python/name:os.system", "x: !unknown 1", "? [a]\n: b",
    "a: *nowhere", "a: &a [*a]", "\tx: 1", "x: 1\n x: 2", "x: [1, 2", "- 1", "--- 1\n--- 2", "%YAML 9.9", "x: @",
    "{x: 1", "domains: []", "1: x", "null: x", "true: x", "2001-01-01: x", "training: {1: 2}", "training: {[1]: 2}",
    "'': 1", "training: {max_steps: 0x10, seed: 1_000}", "training: {learning_rate: 1:30}", "description: 2001-01-01",
    "training: {learning_rate: .nan}", "training: {max_steps: .inf}", "description: !!binary aGVsbG8=",
    "x: !!set {a}", "measure: {<<: {name: x}}", "<<: 1", "<<: [1]", 'description: "\\0"', 'output_dir: "a\\0b"',
    "units: !!omap [a: 1]", 'domains: [{name: bio, data: "a\\0b"}]', 'model_name_or_path: "a\\0b"',
    "description: 1e9999", "description: " + "9" * 5000, "training: {seed: " + "9" * 5000 + "}", "x: " + "[" * 3000,
    "x: " + "{a: " * 500,
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
]
# fmt: on


def bad_recipe(draw: random.Random, recipe: str) -> bytes:
    """A recipe, or any YAML mapping with a key a line, with one to three mistakes."""
    lines = recipe.splitlines()
    for _ in range(draw.randint(1, 3)):
        here = draw.randrange(len(lines)) if lines else 0
        kind = draw.randrange(9)
        if not lines or kind == 0:
            lines.append(draw.choice(YAML_ODDITIES))
        elif kind == 1:
            del lines[here]
        elif kind == 2:
            lines.insert(here, lines[here])
        elif kind == 3:
            key, colon, rest = lines[here].partition(":")
            lines[here] = misspelt(draw, key) + colon + rest
        elif kind == 4:
            key = lines[here].partition(":")[0]
            odd = draw.choice(ODD_VALUES)
            lines[here] = f"{key}: {draw.choice([json.dumps(odd), str(odd)])}"
        elif kind == 5:
            lines[here] = draw.choice([" ", "  ", "\t", "- ", "# "]) + lines[here]
        elif kind == 6:
            lines[here] = misspelt(draw, lines[here])
        elif kind == 7:
            lines.insert(here, draw.choice(YAML_ODDITIES))
        else:
            option, odd = draw.choice(OPTIONS), draw.choice(ODD_VALUES)
            lines.append(f"training: {{{option}: {json.dumps(odd)}}}")
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return bad_bytes(draw, text) if draw.randrange(5) == 0 else text


def bad_json(draw: random.Random, data: Any) -> bytes:
    """JSON with one to three values or keys exchanged, removed or doubled, anywhere in it."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.randint(1, 3)):
        places = [((), data), *_places(data)]
        _, holder = draw.choice(
            [place for place in places if isinstance(place[1], dict | list) and place[1]] or places
        )
        if not isinstance(holder, dict | list) or not holder:
            data = copy.deepcopy(draw.choice(ODD_VALUES))
            continue
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        kind = draw.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[misspelt(draw, key)] = holder.pop(key)
        elif kind == 1:
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD_VALUES))
    text = json.dumps(data, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    return bad_bytes(draw, text) if draw.randrange(6) == 0 else text


def _places(data: Any, at: tuple = ()) -> list[tuple[tuple, Any]]:
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in inside for place in (((*at, key), value), *_places(value, (*at, key)))]


def bad_bytes(draw: random.Random, content: bytes) -> bytes:
    """A file that is cut off, empty, in another encoding, or has other bytes in it."""
    place = draw.randrange(len(content) + 1)
    text = content.decode("utf-8", "replace")
    return draw.choice(
        [
            b"",
            content[:place],
            content[place:],
            content[:place]
            + draw.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\xc3", b"\r", b"\x1a"])
            + content[place:],
            b"\xef\xbb\xbf" + content,
            text.encode("utf-16"),
            text.encode("latin-1", "replace"),
            content.replace(b"\n", b"\r\n"),
            gzip.compress(content),
            b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",  # a pickle
            b"PK\x03\x04" + content,
            b"[" * 100_000,
            b"\n" * 50,
        ]
    )


# ---- data files ----------------------------------------------------------------------------------------------------

DOCUMENTS = [f"This is document {number}, and it says {word}." for number, word in enumerate("abcdefghijklmnop")]
CELLS = [
    *DOCUMENTS[:3],
    None,
    1,
    True,
    [],
    {},
    "",
    "\0",
    "\ud800",
    "\u202e" + DOCUMENTS[4],
    "😀" * 30,
    '"',
    "a,b",
    "\r\n",
]


def bad_data(draw: random.Random) -> tuple[str, bytes]:
    """(Name, content) of a file of documents: text, JSON lines, CSV, Parquet, gzip or not; most have a mistake."""
    suffix = draw.choice([".txt", ".jsonl", ".json", ".csv", ".parquet"])
    rows = [draw.choice(CELLS) if draw.random() < 0.3 else document for document in DOCUMENTS]
    if suffix == ".txt":
        content = draw.choice(["\n", "\n\n", "\r\n"]).join(map(str, rows)).encode("utf-8", "surrogatepass")
    elif suffix in (".jsonl", ".json"):
        keys = [draw.choice(["text", "text", "text", "body", ""]) if draw.random() < 0.2 else "text" for _ in rows]
        lines = [json.dumps({key: row}) for key, row in zip(keys, rows, strict=True)]
        if draw.random() < 0.5:
            lines[draw.randrange(len(lines))] = draw.choice(["{", "[]", "1", "null", '"x"', '{"text": }', "NaN", "{}"])
        content = "\n".join(lines).encode()
    elif suffix == ".csv":
        header = draw.choice(["id,text", "text,id", "text", "", "text,text", "id,body", '"text', "id;text", "\0"])
        lines = [
            header,
            *(draw.choice([f"{i},{row}", f'{i},"{row}"', f"{row}", f'"{row},{i}']) for i, row in enumerate(rows)),
        ]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        content = draw.choice(
            [b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"", b"PAR1" + b"\xff" * 20 + b"\x10\0\0\0PAR1"]
        )
    if draw.random() < 0.3:
        content = bad_bytes(draw, content)
    if draw.random() < 0.3:
        suffix, content = suffix + ".gz", draw.choice([gzip.compress(content), gzip.compress(content)[:-9], content])
    return f"data{suffix}", content


# ---- safetensors -------------------------------------------------------------------------------------------------


def bad_tensors(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with other metadata, names, shapes, types or numbers; or none at all."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    kind = draw.randrange(9)
    if kind == 0:
        return bad_bytes(draw, content)
    if kind == 1:
        metadata = header.get("__metadata__", {})
        key = draw.choice([*metadata, "x"])
        metadata[key] = draw.choice([word for word in ODD_WORDS if "\udcff" not in word])
        header["__metadata__"] = metadata
    elif kind == 2:
        header.get("__metadata__", {}).pop(draw.choice([*header.get("__metadata__", ()), "x"]), None)
    elif kind == 3:
        header[misspelt(draw, name)] = header.pop(name)
    elif kind == 4:
        entry["shape"] = draw.choice(
            [[1, *entry["shape"]], [*entry["shape"], 1], entry["shape"][::-1], [2**40], [-1], []]
        )
    elif kind == 5 and entry["dtype"] in ("F32", "I32"):
        entry["dtype"] = draw.choice(["I32", "U32", "F32"])
    elif kind == 6:
        first, last = entry["data_offsets"]
        odd = draw.choice([float("nan"), float("inf"), -1.0, 1e30, 2.0])
        data = data[:first] + struct.pack("<f", odd) * ((last - first) // 4) + data[first + (last - first) // 4 * 4 :]
    elif kind == 7:  # one tensor less: the last in the file, so that no gap is left
        last = max(names, key=lambda one: header[one]["data_offsets"][1])
        data = data[: header.pop(last)["data_offsets"][0]]
    else:
        header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        data = bytes(4)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
