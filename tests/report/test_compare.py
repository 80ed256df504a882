"""Runs side by side: grouping and names, equal gain against numbers worked out by hand, and what is refused."""

import json
from pathlib import Path

import pytest

from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.measure.results import Results
from das_lm.report.compare import compare

T_95 = {2: 12.706204736, 3: 4.302652730}  # Student's t, by seeds


def losses(gain: float, drift: float, forgetting: float) -> list[list[float]]:
    """Rows base, bio, cs; columns general, bio, cs."""
    return [[2, 9, 9], [2, 9 - gain, 9], [2 + drift, 9 - gain + forgetting, 9 - gain]]


def write(
    directory: Path,
    figures: tuple[float, float, float],
    method: str = "naive",
    seed: int | None = 0,
    stages: int = 3,
    **changes,
) -> Path:
    """A run of a recipe with this gain, drift and forgetting; `changes` are training arguments."""
    domains = {"general": None, "bio": 1, "cs": 2}
    scores = [
        {name: {"loss": x, "accuracy": 1 - x / 10, "documents": 50} for name, x in zip(domains, row, strict=True)}
        for row in losses(*figures)
    ]
    training = {"learning_rate": 1e-3, "max_steps": 10, **changes, **({} if seed is None else {"seed": seed})}
    recipe = {
        "description": f"{directory.name}",
        "model_name_or_path": "built-in",
        "output_dir": str(directory),
        "domains": [{"name": "bio", "data": "built-in"}, {"name": "cs", "data": "built-in"}],
        "method": method.split("+"),
        "schedule": "sequential",
        "training": training,
    }
    names = ("base", "bio", "cs")
    rows = [{"name": name, "scores": score} for name, score in zip(names, scores, strict=True)]
    directory.mkdir(parents=True)
    Results(domains, rows[:stages], {"recipe": recipe}).save(directory)
    return directory


def sweep(root: Path, seeds: dict[int, float]) -> Path:
    """Naive at four learning rates, on a straight line, and a mask at one; gain and cost of all shift by seed."""
    for seed, shift in seeds.items():
        for name, rate, gain in (
            ("slow", 1e-4, 1.0),
            ("slower", 4e-4, 1.9),
            ("faster", 6e-4, 2.1),
            ("fast", 1e-3, 3.0),
        ):
            drift, forgetting = 0.2 + (0.4 + shift) * (gain - 1) / 2, 0.1 + 0.4 * (gain - 1) / 2
            write(root / f"{name}-{seed}", (gain + shift, drift, forgetting), seed=seed, learning_rate=rate)
        write(root / f"mask-{seed}", (2.0 + shift, 0.3, 0.4), "das", seed=seed, learning_rate=1e-3)
    return root


# ---- equal gain ----------------------------------------------------------------------------------------------------


def test_equal_gain_is_seed_by_seed(tmp_path):
    """The reference of seed 0 is of no use to seed 1: it drifts 0.4 at gain 2 in one, 1.4 at gain 4 in the other."""
    comparison = compare([sweep(tmp_path, {0: 0.0, 1: 2.0})])
    (mask,) = comparison.at_equal_gain()
    assert (mask.configuration.label, mask.seeds, mask.problem) == ("das learning_rate=0.001", ["0", "1"], "")
    drift, forgetting = mask.differences["drift"], mask.differences["forgetting_rate"]
    assert drift == pytest.approx((-0.6, T_95[2] * 0.5))  # differences −0.1 and −1.1: stdev / √2 = 0.5
    assert forgetting == pytest.approx((0.1, 0.0))  # 0.4 against 0.3, both seeds
    (title, rows) = list(comparison.tables().items())[1]
    assert title == "At equal gain, minus naive (nats per masked token)"
    assert rows == [
        ["run", "gain", "drift", "forgetting"],
        [mask.configuration.label, "3.000", "-0.600 ± 6.353 unclear", "+0.100 ± 0.000 more"],
    ]


def test_less_is_said_where_the_whole_interval_is_below_zero(tmp_path):
    comparison = compare([sweep(tmp_path, {0: 0.0, 1: 0.01, 2: 0.02})])
    (mask,) = comparison.at_equal_gain()
    assert mask.differences["drift"] == pytest.approx((-0.105, T_95[3] * 0.005 / 3**0.5))
    assert comparison.findings() == [
        "das learning_rate=0.001, at the gain of 2.010 against naive: drift -0.105 ± 0.012 (less), forgetting "
        "+0.100 ± 0.000 (more); 3 of 3 seeds. The nearest runs of naive gain 0.100 less and 0.100 more."
    ]


def test_seeds_without_an_equal_gain_are_left_out_and_counted(tmp_path):
    sweep(tmp_path, {0: 0.0, 1: 0.0})
    write(tmp_path / "wild-0", (2.0, 0.3, 0.4), "ewc", seed=0)
    write(tmp_path / "wild-1", (3.5, 0.3, 0.4), "ewc", seed=1)
    write(tmp_path / "other", (2.0, 0.3, 0.4), "l2", seed=7)
    by_label = {one.configuration.method: one for one in compare([tmp_path]).at_equal_gain()}
    assert by_label["ewc"].seeds == ["0"]
    assert by_label["ewc"].differences["drift"] == (pytest.approx(-0.1), None)
    assert by_label["l2"].problem == "no seed in common with the reference"


def test_no_equal_gain_is_said_in_words(tmp_path):
    sweep(tmp_path, {0: 0.0, 1: 0.0})
    for seed in (0, 1):
        write(tmp_path / f"strong-{seed}", (3.2, 0.1, 0.1), "replay", seed=seed)
    comparison = compare([tmp_path])
    words = "no equal gain: gain 3.200, the reference reaches 1.000 to 3.000"
    assert f"replay learning_rate=0.001: {words}." in comparison.findings()
    assert ["replay learning_rate=0.001", "3.200", "–", "–"] in list(comparison.tables().values())[1]
    assert "3.200" in compare([tmp_path], reference="naive").findings()[1]


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    comparison = compare([sweep(tmp_path, {0: 0.0})])
    (mask,) = comparison.at_equal_gain()
    assert mask.differences["drift"] == (pytest.approx(-0.1), None)
    assert "drift -0.100 (no verdict)" in comparison.findings()[0]
    assert comparison.reading().startswith("One seed: no interval, and so no verdict.")


@pytest.mark.parametrize("beyond", [(2.0, 3.0, 2.0), (2.0, 3.0, 0.25)])
def test_past_its_peak_a_reference_is_none(tmp_path, beyond):
    """At learning rate 1e-2 naive gains 2 and drifts 3, whatever it forgets: any mask would look good beside it."""
    sweep(tmp_path, {0: 0.0, 1: 0.0})
    before = compare([tmp_path]).at_equal_gain()[0].differences
    for seed in (0, 1):
        write(tmp_path / f"wild-{seed}", beyond, seed=seed, learning_rate=1e-2)
    comparison = compare([tmp_path])
    (mask,) = comparison.at_equal_gain()
    assert mask.differences == before
    assert comparison.notes == ["Past the peak of what naive gains, no reference: naive learning_rate=0.01."]
    assert len(comparison.frontier[0]["points"]) == 5  # it is shown all the same


def test_the_peak_is_that_of_the_seed(tmp_path):
    """On average 1.2e-3 gains most; in seed 1 it gains less than 1e-3 does, and what it forgets counts no more."""
    sweep(tmp_path, {0: 0.0, 1: 0.0})
    before = compare([tmp_path]).at_equal_gain()[0].differences
    write(tmp_path / "more-0", (4.0, 0.8, 0.7), seed=0, learning_rate=1.2e-3)
    write(tmp_path / "more-1", (2.05, 3.0, 0.15), seed=1, learning_rate=1.2e-3)
    comparison = compare([tmp_path])
    (mask,) = comparison.at_equal_gain()
    assert comparison.notes == []
    assert {name: pytest.approx(value, abs=1e-9) for name, value in before.items()} == mask.differences


def test_of_equal_gains_the_cheaper_run_counts(tmp_path):
    sweep(tmp_path, {0: 0.0, 1: 0.0})
    before = compare([tmp_path]).at_equal_gain()[0]
    for seed in (0, 1):
        write(tmp_path / f"wild-{seed}", (3.0, 5.0, 5.0), seed=seed, learning_rate=1e-2)
        write(tmp_path / f"top-{seed}", (3.0, 0.5, 0.5), "l2", seed=seed)
    mask, top = sorted(compare([tmp_path]).at_equal_gain(), key=lambda one: one.configuration.method)
    assert mask.differences == before.differences
    assert top.differences["drift"] == pytest.approx((-0.1, 0.0), abs=1e-9)


def test_what_is_worse_than_plain_training_is_not_called_better(tmp_path):
    """Plain training past its peak gains 1.1 and drifts 2.0: straight lines between gains called the mask better."""
    for seed in (0, 1, 2):
        for rate, figures in ((1e-4, (1.0, 0.1, 0.1)), (1e-3, (1.3, 0.5, 0.5)), (1e-2, (1.1, 2.0, 0.45))):
            write(tmp_path / f"{rate}-{seed}", figures, seed=seed, learning_rate=rate)
        write(tmp_path / f"mask-{seed}", (1.12, 0.6, 0.3), "das", seed=seed)
    comparison = compare([tmp_path])
    (mask,) = comparison.at_equal_gain()
    assert mask.differences["drift"] == pytest.approx((0.34, 0.0))
    assert mask.differences["forgetting_rate"] == pytest.approx((0.04, 0.0), abs=1e-9)
    assert mask.nearest == pytest.approx((0.12, 0.18))
    assert comparison.findings() == [
        "das learning_rate=0.001, at the gain of 1.120 against naive: drift +0.340 ± 0.000 (no verdict), forgetting "
        "+0.040 ± 0.000 (no verdict); 3 of 3 seeds. The nearest runs of naive gain 0.120 less and 0.180 more. No "
        "verdict: its nearest runs are further apart than 15% of the gain; run it with values in between."
    ]


def curved(root: Path, gains: tuple[float, ...], method: float, cost: float = 1.0) -> list[str]:
    """Verdicts on a mask that drifts `cost` times as much as plain training, whose drift is gain³ / 10 in 4 seeds."""
    for seed, shift in enumerate((-0.02, -0.01, 0.01, 0.02)):
        for number, gain in enumerate(gains):
            gain += shift
            write(root / f"{number}-{seed}", (gain, gain**3 / 10, 0), seed=seed, learning_rate=(1 + number) * 1e-4)
        gain = method + shift / 2
        write(root / f"mask-{seed}", (gain, cost * gain**3 / 10, 0), "das", seed=seed)
    (mask,) = compare([root]).at_equal_gain()
    return [mask.verdict("drift"), mask.doubt]


def test_a_verdict_needs_runs_nearby_and_three_of_them(tmp_path):
    """On the frontier there is none to give; straight lines, 1.5 % too high, would have said less."""
    near = (2.0, 2.3, 2.6, 2.9)
    assert curved(tmp_path / "on", near, 2.45) == ["unclear", ""]
    assert curved(tmp_path / "below", near, 2.45, 0.98) == ["less", ""]
    assert curved(tmp_path / "above", near, 2.45, 1.02) == ["more", ""]
    far = ["no verdict", "its nearest runs are further apart than 15% of the gain"]
    assert curved(tmp_path / "far", (2.0, 2.2, 2.6, 2.9), 2.45, 0.5) == far
    two = ["no verdict", "two runs do not show how much it bends between them"]
    assert curved(tmp_path / "two", near[1:3], 2.45, 0.5) == two


def test_a_reference_with_one_gain_is_none(tmp_path):
    write(tmp_path / "naive", (2.0, 0.4, 0.3))
    write(tmp_path / "mask", (2.0, 0.3, 0.4), "das")
    comparison = compare([tmp_path])
    assert (comparison.at_equal_gain(), len(comparison.tables())) == ([], 1)
    assert "naive has one gain only" in comparison.notes[0]
    assert "there is no naive run" in compare([tmp_path / "mask"]).notes[0]


def test_another_reference(tmp_path):
    sweep(tmp_path, {0: 0.0})
    for number, rate in enumerate((1e-4, 1e-3)):
        write(tmp_path / f"ewc-{number}", (1.5 + number, 0.2, 0.1), "ewc", learning_rate=rate)
    comparison = compare([tmp_path], reference="ewc")
    assert [one.configuration.method for one in comparison.at_equal_gain()] == [*["naive"] * 4, "das"]
    assert comparison.at_equal_gain()[4].differences["drift"].mean == pytest.approx(0.1)
    with pytest.raises(UserError, match="reference 'ewcc': there is no such method. Did you mean 'ewc'"):
        compare([tmp_path], reference="ewcc")


# ---- configurations and curves -------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_labels_say_what_differs(tmp_path):
    figures = (2.0, 0.3, 0.4)
    for seed in (0, 1):
        write(tmp_path / f"a-{seed}", (2.0 + seed, 0.3, 0.4), seed=seed, logging_steps=10 + seed)
        write(tmp_path / f"b-{seed}", figures, "das", seed=seed, contrast_weight=0.0)
    write(tmp_path / "c", figures, "das", contrast_weight=1.0)  # the default
    write(tmp_path / "d", figures, "das", seed=1)  # the same configuration
    write(tmp_path / "e", figures, "das+replay", max_steps=20)
    rows = next(iter(compare([tmp_path]).tables().values()))
    assert [row[:2] for row in rows[1:]] == [
        ["naive max_steps=10", "2"],
        ["das max_steps=10 contrast_weight=0", "2"],
        ["das max_steps=10 contrast_weight=1", "2"],
        ["das+replay max_steps=20", "1"],
    ]
    assert rows[0] == ["run", "seeds", "gain", "drift", "forgetting", "final average"]
    assert rows[1][2:] == ["2.500 ± 6.353", "0.300 ± 0.000", "0.400 ± 0.000", "6.700 ± 6.353"]


def test_the_frontier_has_a_curve_per_knob(tmp_path):
    for rate in (1e-3, 1e-4, 5e-4):
        write(tmp_path / f"naive-{rate}", (1000 * rate, rate, 0.4), learning_rate=rate)
    for alpha in ("0.7", "0.3", "auto"):
        write(tmp_path / f"alpha-{alpha}", (2.0, 0.3, 0.4), "interpolate", interpolation_alpha=alpha)
    for strength in (0.5, 1.0):
        for rate in (1e-4, 1e-3):
            write(tmp_path / f"{strength}-{rate}", (2, 0, 0), "das", learning_rate=rate, soft_mask_strength=strength)
    frontier = compare([tmp_path]).frontier
    assert {
        curve["name"]: (curve["x_label"], [point["value"] for point in curve["points"]]) for curve in frontier
    } == {
        "naive": ("learning_rate", [1e-4, 5e-4, 1e-3]),
        "das soft_mask_strength=0.5": ("learning_rate", [1e-4, 1e-3]),
        "das soft_mask_strength=1": ("learning_rate", [1e-4, 1e-3]),
        "interpolate learning_rate=0.001": ("interpolation_alpha", [0.3, 0.7]),
        "interpolate learning_rate=0.001 interpolation_alpha=auto": ("", [None]),
    }
    assert frontier[0]["points"][1] == {
        **{"run": "naive learning_rate=0.0005", "value": 5e-4, "gain": pytest.approx(0.5)},
        **{"drift": pytest.approx(5e-4), "forgetting": pytest.approx(0.4)},
        **{"gain_half": None, "drift_half": None, "forgetting_half": None},
    }


def small(directory: Path, method: str, seed: int, split: str = "test", **options) -> Path:
    """A run of a classic benchmark, without text that is never learned."""
    scores = [{"even": {"loss": x, "accuracy": x, "documents": 9}, "odd": {"loss": y, "accuracy": y, "documents": 9}}
              for x, y in ((0.1, 0.1), (0.9, 0.1), (0.6, 0.8 + seed / 10))]  # fmt: skip
    run = {"experiment": "odd_even", "method": method, "seed": seed, "parameters": {}, "options": options}
    run |= {"schedule": "sequential", "epochs": None, "split": split}
    directory.mkdir(parents=True)
    stages = [{"name": name, "scores": one} for name, one in zip(("base", "even", "odd"), scores, strict=True)]
    Results({"even": 1, "odd": 2}, stages, run, "nats").save(directory)
    return directory


def test_a_classic_benchmark_without_its_search(tmp_path):
    for seed in (0, 1):
        small(tmp_path / "runs" / f"naive-{seed}", "naive", seed)
        small(tmp_path / "runs" / f"ewc-{seed}", "ewc+replay", seed, penalty_weight=100.0)
    small(tmp_path / "search" / "ewc", "ewc+replay", 1000, "development", penalty_weight=10.0)
    comparison = compare([tmp_path], measure="accuracy")
    assert comparison.tables() == {
        "Gain, and what it cost (top-1 accuracy, %)": [
            ["run", "seeds", "gain", "forgetting", "final average"],
            ["naive", "2", "77.5 ± 31.8", "30.0 ± 0.0", "72.5 ± 31.8"],
            ["ewc+replay penalty_weight=100", "2", "77.5 ± 31.8", "30.0 ± 0.0", "72.5 ± 31.8"],
        ]
    }
    assert "Left out, run on development data: 1." in comparison.notes
    assert len(compare([tmp_path / "search"]).curves) == 1


# ---- what cannot be compared ---------------------------------------------------------------------------------------


def change(directory: Path, edit) -> None:
    path = directory / "forgetting.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_another_model_or_text_is_refused(tmp_path):
    one, other = (write(tmp_path / name, (2, 0.3, 0.4), method) for name, method in (("a", "das"), ("b", "ewc")))

    def refused(edit) -> str:
        before = (other / "forgetting.json").read_text()
        change(other, edit)
        with pytest.raises(UserError) as caught:
            compare([one, other])
        (other / "forgetting.json").write_text(before)
        assert str(caught.value).startswith(f"{one} and {other} cannot be compared: ")
        return str(caught.value).partition("compared: ")[2]

    assert refused(lambda data: data["stages"][0]["scores"]["bio"].update(loss=8.5)) == (
        "before training the loss on 'bio' is 9.000 in the one, 8.500 in the other: another model, or other "
        "held-out text"
    )
    assert refused(lambda data: data["stages"][0]["scores"]["cs"].update(documents=1025)) == (
        "the held-out text of 'cs' has 50 documents in the one, 1,025 in the other"
    )
    assert refused(lambda data: data["domains"].update(bio=2, cs=1)) == (
        "the one measures general (never learned), bio (stage 1), cs (stage 2); the other general (never learned), "
        "bio (stage 2), cs (stage 1)"
    )
    assert "nats per token" in refused(lambda data: data.update(unit="nats per token"))


def test_with_another_seed_the_held_out_masks_differ_and_so_do_the_losses(tmp_path):
    one, other = write(tmp_path / "a", (2, 0.3, 0.4)), write(tmp_path / "b", (2, 0.3, 0.4), seed=1)
    change(other, lambda data: data["stages"][0]["scores"]["bio"].update(loss=8.5))
    (configuration,) = compare([one, other]).configurations
    assert list(configuration.runs) == ["0", "1"]


def test_the_same_run_twice_is_one_and_its_copy_is_refused(tmp_path):
    run = write(tmp_path / "a", (2, 0.3, 0.4), seed=None)
    assert len(compare([run, tmp_path, run]).configurations[0].runs) == 1
    write(tmp_path / "b", (2, 0.3, 0.4), seed=42)  # the default
    with pytest.raises(UserError, match="same configuration with the same seed, 42; give one of them"):
        compare([tmp_path])


def test_an_unfinished_run_is_left_out_and_named(tmp_path):
    unfinished = write(tmp_path / "a", (2, 0.3, 0.4), stages=2)
    with pytest.raises(UserError, match="not finished yet"):
        compare([unfinished])
    write(tmp_path / "b", (2, 0.3, 0.4), seed=1)
    comparison = compare([tmp_path])
    assert list(comparison.configurations[0].runs) == ["1"]
    assert comparison.notes[0] == f"Left out, not finished: {unfinished} (2 stages measured)."


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    runs = sweep(tmp_path / "runs", {0: 0.0, 1: 2.0})
    assert main(["compare", str(runs), "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "das learning_rate=0.001" in printed and "6.353" in printed and "drift" in printed
    assert max(map(len, printed.partition("Mean over")[0].splitlines())) <= 100
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| naive learning_rate=0.0001 | 2 | 2.000 ± 12.706 |" in table
    assert "| das learning_rate=0.001 | 3.000 | -0.600 ± 6.353 unclear | +0.100 ± 0.000 more |" in table
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert data["reference"] == "naive"
    (mask,) = data["at_equal_gain"]
    assert mask["drift"] == {"mean": pytest.approx(-0.6), "half": pytest.approx(6.353, abs=1e-3)}
    assert mask["verdict"] == {"drift": "unclear", "forgetting": "more"}
    assert mask["nearest"] == pytest.approx({"below": 0.1, "above": 0.1}) and mask["doubt"] is None
    assert data["configurations"][0]["runs"] == {"0": str(runs / "slow-0"), "1": str(runs / "slow-1")}
    assert data["frontier"][0]["name"] == "naive"


def test_a_name_is_no_markup(tmp_path, capsys):
    """Not in the table for people, which a browser or an editor renders, nor in the terminal."""
    name = "<script>alert(1)</script>|![x](http://x)[/b]\x1b[2J"
    for number, rate in enumerate((1e-4, 2e-4)):
        write(tmp_path / f"{number}", (2.0 + number, 0.3, 0.4), learning_rate=rate, optim=name)
    write(tmp_path / "das", (2.0, 0.3, 0.4), "das", learning_rate=1e-4)
    write(tmp_path / name.replace("/", ""), (2.0, 0.3, 0.4), "ewc", stages=2)
    assert main(["compare", str(tmp_path), "--output_dir", str(tmp_path)]) == 0
    printed, table = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert "\x1b" not in printed + table and "script>alert(1)" in printed and "[b]?[2J" in printed
    assert "<" not in table and "![" not in table and "&lt;script&gt;alert(1)" in table
    assert {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")} == {7, 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such directory"),
        (["."], "there is no forgetting.json in it or below it"),
        (["runs", "--measure", "cloze"], "runs/fast-0: 'cloze' was not measured. Valid: accuracy, loss."),
        (["runs", "--reference", "masks"], "reference 'masks': there is no such method."),
        (["runs", "--output_dir", "file"], "output_dir: cannot write to file"),
        ([], "RUN"),
    ],
)
def test_bad_input_is_one_message(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "." not in arguments:
        sweep(Path("runs"), {0: 0.0})
    Path("file").write_text("mine")
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert Path("file").read_text() == "mine"


def test_checkpoints_that_evaluate_measured_are_compared_by_their_directory(tmp_path):
    """How they were trained is not known; nothing but the directory names them."""
    for name, drift in (("mine", 0.2), ("theirs", 0.4)):
        scores = [{"old": 1.0, "bio": 4.0}, {"old": 1.0 + drift, "bio": 3.0}]
        results = Results({"old": None, "bio": 1})
        results.stages = [
            {
                "name": stage,
                "scores": {k: {"loss": v, "accuracy": 0.5, "tokens": 9, "documents": 3} for k, v in row.items()},
            }
            for stage, row in zip(("base", "bio"), scores, strict=True)
        ]
        results.run = {"checkpoints": {"base": "a", "bio": name}, "training": {}}
        (tmp_path / name).mkdir()
        results.save(tmp_path / name)
    comparison = compare([tmp_path / "mine", tmp_path / "theirs"], reference="mine")
    points = {point["run"]: point for curve in comparison.frontier for point in curve["points"]}
    assert {name: points[name]["drift"] for name in points} == {
        "mine": pytest.approx(0.2),
        "theirs": pytest.approx(0.4),
    }
