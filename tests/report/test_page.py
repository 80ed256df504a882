"""The page as a parser and as Chromium see it; what it says; what it refuses."""

import csv
import json
import re
import shutil
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from das_lm.cli import main
from das_lm.errors import UserError
from das_lm.measure.results import FILE_NAME
from das_lm.report.page import write_report
from das_lm.report.terms import TERMS, defined
from tests.report.full_runs import language_run, plain, save, small_run
from tests.report.helpers import FIGURES, SCRIPT, read


@pytest.fixture(scope="module")
def page(path):
    return read(path)


# ---- the file ---------------------------------------------------------------------------------------------------


def test_every_figure_has_its_files_and_a_table(run, path, page):
    assert path == run / "report.html"
    names = sorted(file.name for file in (run / "figures").iterdir())
    assert names == sorted(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg"))
    for name in FIGURES:
        assert ElementTree.parse(run / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert imread(run / "figures" / f"{name}.png").std() > 0.01
    assert page.tags.count("figure") == page.tags.count("svg") == len(FIGURES)
    html = path.read_text(encoding="utf-8")
    for figure in re.findall(r"<figure>.*?</figure>", html, flags=re.DOTALL):
        assert "<table>" in figure and re.search(r'role="img" .*aria-label="[^"]{20,}"', figure)


def test_nothing_leaves_the_page(page):
    """No script, and all that could be loaded lies in the page itself."""
    assert "script" not in page.tags and not [tag for tag in page.tags if tag in ("iframe", "link", "object", "base")]
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert policy in page.values("content")
    references = [
        value for key in ("src", "href", "xlink:href", "srcset", "action", "data") for value in page.values(key)
    ]
    assert page.values("href")[-1] == "results.csv"  # beside it, and no more than a link
    assert all(value == "results.csv" or value.startswith(("#", "data:image/png;base64,")) for value in references)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    urls = [
        url for value in page.values("style") + page.values("clip-path") for url in re.findall(r"url\((.*?)\)", value)
    ]
    targets = {value[1:] for value in [*references, *urls] if value.startswith("#")}
    assert urls and targets <= set(ids)


def test_a_name_is_text(page):
    assert f"Importance after {SCRIPT}" in page.of("h3")
    assert any(row[0] == SCRIPT for table in page.tables for row in table)


def test_control_characters_are_in_no_file(tmp_path):
    """Whatever names a file holds: XML allows no such character, and an editor or a terminal obeys some."""
    bad = "\x1b[2J\x00\x85"
    run = language_run([f"bio{bad}", "cs"])
    run.unit += bad
    for stage in run.stages:
        stage["name"] += bad
        for entry in stage.get("history", ()):
            entry[f"loss_{bad}"] = 1.0
    page = write_report([save(run, tmp_path / "run")], title=bad)
    texts = [page.read_text(encoding="utf-8")]
    for file in (tmp_path / "run" / "figures").glob("*.svg"):
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
        texts.append(file.read_text(encoding="utf-8"))
    assert len(texts) == 12 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "".join(texts))


def test_the_same_run_gives_the_same_page(tmp_path):
    run = save(plain(language_run(["bio"])), tmp_path / "run")
    first, again = write_report([run]), write_report([run], tmp_path / "again")
    assert (first, again) == (run / "report.html", tmp_path / "again" / "report.html")
    assert again.read_bytes() == first.read_bytes()


# ---- what it says -----------------------------------------------------------------------------------------------


def test_the_top(page):
    """Four large figures with their intervals."""
    assert page.of("dt")[:4] == [
        "gain learned of bio and <script>alert(1)</script>",
        "drift lost of general",
        "forgetting lost again of bio",
        "cost 200 steps",
    ]
    assert page.of("dd")[:7] == [
        *("+3.000", "95 % interval [+2.980,\N{NO-BREAK SPACE}+3.020]"),
        *("+0.300", "95 % interval [+0.280,\N{NO-BREAK SPACE}+0.320]"),
        *("+0.300", "95 % interval [+0.280,\N{NO-BREAK SPACE}+0.320]", "4 min 40 s"),
    ]
    assert [value for value in page.values("class") if value in ("better", "worse", "calm")] == [
        *("better", "worse", "worse", "calm"),
    ]


def test_what_is_noise_is_not_coloured(tmp_path):
    run = plain(language_run(["bio", "cs"]))
    run.intervals = {"loss": {"gain": [2.9, 3.1], "drift": [-0.1, 0.7]}}
    page = read(write_report([save(run, tmp_path / "run")]))
    assert [one for one in page.values("class") if one in ("better", "worse", "calm")][:3] == [
        "better",
        "calm",
        "worse",
    ]
    assert page.of("dd")[4] == "does not stand out of the noise" and page.of("dd")[6] == "without an interval"


def test_what_it_cost(tmp_path):
    run = plain(language_run(["bio", "cs"]))
    for stage in run.stages[1:]:
        stage |= {"tokens_seen": {"bio": 60_000, "old, remembered": 10_000}, "peak_memory": 3 * 2**29}
    page = read(write_report([save(run, tmp_path / "run")]))
    cost = page.of("dd")[page.of("dd").index("4 min 40 s") :][:4]
    assert cost == ["4 min 40 s", "140,000 tokens", "499 tokens a second", "peak memory 1.50 GiB"]
    table = next(table for table in page.tables if "tokens a second" in table[0])
    assert table[1] == ["bio", "100", "2 min 20 s", "70,000", "499", "1.50 GiB"]


def test_words_are_defined_where_they_stand(page):
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("abbr", "title")]
    assert {TERMS[term] for term in ("gain", "drift", "forgetting", "backward transfer", "nats")} <= set(titles)
    assert list(TERMS) == page.of("dt")[4:]
    html = str(defined("<b> Gain, a gain of nats & forgetting.json; forgetting rate"))
    assert html.startswith("&lt;b&gt; <abbr") and html.count("<abbr") == 3 and " a gain of" in html
    assert f'title="{TERMS["forgetting rate"]}">forgetting rate<' in html


def test_at_most_two_tables_are_open(path):
    html = path.read_text(encoding="utf-8")
    is_open = re.sub(r"<details>.*?</details>", "", html, flags=re.DOTALL)
    assert is_open.count("<table>") == 1 and html.count("<table>") > 15
    assert html.count("<details>") == html.count("</details>") and "<details open" not in html


def test_before_and_after(tmp_path):
    run = plain(language_run(["bio", "cs"]))
    place = {"before": f"the {SCRIPT}", "after": "of cells", "right": "wall"}
    run.stages[0]["samples"] = {"bio": [{**place, "guesses": [["cat", 0.5], ["wall", 0.25]]}]}
    run.stages[-1]["samples"] = {"bio": [{**place, "guesses": [["wall", 0.75], ["", 0.2]]}]}
    page = write_report([save(run, tmp_path / "run")])
    assert ["bio", f"the {SCRIPT} ____ of cells", "wall", "cat 50%, wall 25%", "wall 75%, ␣ 20%"] in [
        row for table in read(page).tables for row in table
    ]
    html = page.read_text(encoding="utf-8")
    assert '<td class="strong text">wall 75%' in html and "<script" not in html
    run.stages[-1]["samples"]["bio"][0]["right"] = "walls"  # cut in another way: nothing to compare
    assert "Before and after" not in read(write_report([save(run, tmp_path / "other")])).of("h2")


def test_every_table_scrolls_in_its_own_box(path):
    html = path.read_text(encoding="utf-8")
    assert html.count('<div class="scroll" tabindex="0"><table>') == html.count("<table>")


def test_what_is_below_0_is_told(tmp_path):
    run = plain(language_run(["bio", "cs"]))
    run.stages[-1]["scores"]["bio"]["loss"] = 2.5
    page = read(write_report([save(run, tmp_path / "run")]))
    assert page.of("dd")[4:7] == ["−0.500", "without an interval", "below 0: it got better"]
    assert [one for one in page.values("class") if one in ("better", "worse")] == ["better", "worse", "better"]
    assert any("How plain training does here is not known" in text for text in page.of("p"))


def test_importance_comes_last(page):
    titles = page.of("h2")
    assert titles[0] == "Over training" and titles[-3:] == ["Importance", "How the numbers came about", "Words"]
    assert page.of("h3")[-1] == f"Importance after {SCRIPT}"


def test_all_values_as_csv(tmp_path):
    run = language_run(["=bio", "cs"])
    page = write_report([save(run, tmp_path / "run")])
    rows = list(csv.DictReader((page.parent / "results.csv").open(encoding="utf-8")))
    (loss,) = [row for row in rows if (row["after"], row["of"], row["measure"]) == ("cs", "general", "loss")]
    assert [float(loss[key]) for key in ("value", "low", "high")] == pytest.approx([1.8, 1.7, 1.9])
    (drift,) = [row for row in rows if (row["of"], row["measure"]) == ("drift", "loss")]
    assert float(drift["value"]) == pytest.approx(0.3) and float(drift["high"]) == pytest.approx(0.32)
    assert not any(cell.startswith("=") for row in rows for cell in row.values()) and "'=bio" in {
        r["of"] for r in rows
    }


def test_words(page):
    items = [item for item in page.of("li") if item not in page.of("h2")]
    assert items[0] == "general, never learned: loss from 1.500 to 1.800, a drift of +0.300 (worse than before)."
    assert items[1] == (
        "bio: its stage took the loss from 6.000 to 3.000, a gain of +3.000; at the end it is 3.300: 0.300 was lost "
        "again (10% of the gain)."
    )
    assert items[2].endswith("a gain of +3.000; it was learned last, so nothing could be lost of it yet.")
    cloze = next(item for item in items if item.startswith("Gain in cloze accuracy"))
    assert cloze.endswith("it does not stand out of the noise.")
    lead, note, _, first = page.of("p")[:4]
    assert lead == "A made-up run. The model learned bio and <script>alert(1)</script> with the method das."
    assert note == "Warning about bio: 2 documents stand there twice"
    assert "nats per masked token (lower is better) of every domain and of general, never learned" in first
    (mask,) = [text for text in page.of("p") if "the mean importance" in text]
    assert re.search(r"the mean importance is \d\d% for attention heads, \d\d% for intermediate neurons and", mask)


def test_tables(page):
    figures = next(table for table in page.tables if "positive is" in table[0])
    matrix = next(table for table in page.tables if table[0][0] == "after")
    assert figures[0] == ["", "positive is", "loss", "top-1 accuracy", "cloze accuracy", "end-task macro F1"]
    assert [row[1] for row in figures[1:]] == ["", "good", "good", "good", "bad", "bad", "bad"]
    assert figures[2][2] == "+3.000 [+2.980,\N{NO-BREAK SPACE}+3.020]"
    assert [row[0] for row in matrix] == ["after", "base", "bio", SCRIPT]
    header = ["end-task", "classes", "training", "test", "seeds", "accuracy at the end", "micro F1 at the end"]
    tasks = next(table for table in page.tables if table[0] == header)
    assert tasks[1][:5] == ["bio.topics", "3", "1,000", "500", "3"]
    assert tasks[1][5] == "63.7%\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}3.8%"
    byte = page.tables[[t[0][0] for t in page.tables].index("questions") - 3]
    assert float(byte[1][1]) == pytest.approx(1.5 * 3740 / 16000, abs=5e-5)
    assert "method:\n- das" in page.of("pre")[0]
    assert ["versions", "das_lm 0.1.0, torch 2.13.0"] in page.tables[-1]


def test_a_file_without_the_optional_keys(tmp_path):
    run = plain(language_run(["bio", "cs"]))
    page = read(write_report([save(run, tmp_path / "run")]))
    assert page.tags.count("figure") == 3
    assert page.of("dd")[:2] == ["+3.000", "without an interval"]
    assert ["base", "1.500", "6.000", "8.000"] in [row for table in page.tables for row in table]


def test_what_got_better_was_not_lost(tmp_path):
    run = plain(language_run(["bio", "cs"]))
    run.stages[2]["scores"]["bio"]["loss"] = 2.5
    page = read(write_report([save(run, tmp_path / "run")]))
    assert next(item for item in page.of("li") if item.startswith("bio: ")).endswith(
        "a gain of +3.000; at the end it is 2.500: nothing was lost, it got 0.500 better."
    )


@pytest.mark.parametrize("finished", [0, 1])
def test_a_run_that_is_not_finished(tmp_path, finished):
    run = plain(language_run(["bio", "cs", "law"], finished=finished))
    page = read(write_report([save(run, tmp_path / "run")]))
    missing = ["bio (stage 1), cs (stage 2), law (stage 3)", "cs (stage 2), law (stage 3)"][finished]
    note = f"This run is not finished: {missing} have not been learned yet. All figures are those so far."
    assert note in page.of("p")
    assert ("Only the base model has been measured" in page.of("p")[0]) == (finished == 0)
    drifts = [item for item in page.of("li") if "rift" in item]
    assert len(drifts) == finished and ("+0.150" in page.of("dd")) == bool(finished)
    assert "refresh" not in page.values("http-equiv")


@pytest.mark.parametrize("measure, loss", [("accuracy", "15.0\N{NO-BREAK SPACE}pp"), ("r2", "0.150")])
def test_a_small_model(tmp_path, measure, loss):
    page = read(write_report([save(small_run(measure), tmp_path / "run")], title=SCRIPT))
    assert page.of("title", "h1") == [SCRIPT, SCRIPT]
    assert any(f"{loss} was lost again" in item for item in page.of("li"))
    assert "with the method ewc" in page.of("p")[0]
    assert "(higher is better" in page.of("p")[1]


# ---- several ----------------------------------------------------------------------------------------------------


def test_several_runs(tmp_path, monkeypatch):
    """Same names are told apart; the frontier comes first; the default directory is `report`."""
    runs = [save(plain(language_run(["bio", "cs"], method="das")), tmp_path / "das" / "run")]
    for rate in (5e-4, 1.5e-3):
        run = language_run(["bio", "cs"], method="naive", learning_rate=rate)
        runs.append(save(plain(run), tmp_path / f"naive{rate}" / "run"))
    monkeypatch.chdir(tmp_path)
    path = write_report(runs)
    assert path.resolve() == tmp_path / "report" / "report.html"
    page = read(path)
    assert page.of("h1") == ["das-lm: 3 runs"]
    assert page.of("h2")[:3] == ["Ranking", "Frontier", "At equal gain"]
    assert page.of("h3")[0] == "Frontier: what was lost against what was gained"
    assert (tmp_path / "report" / "figures" / "comparison-frontier.svg").is_file()
    assert (tmp_path / "report" / "figures" / "2-naive0.0005-run-matrix-loss.png").is_file()
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert page.tags.count("figure") == 1  # the runs' own stand in their reports
    links = [link for link in page.values("href") if link.startswith("reports/")]
    assert sorted(set(links)) == ["reports/1-das-run.html", *(f"reports/{n}-naive{r}-run.html" for n, r in RATES)]
    single = read(tmp_path / "report" / "reports" / "1-das-run.html")
    assert single.of("h1") == ["das-lm: das/run"] and "../report.html" in single.values("href")
    assert {"das/run", "naive0.0005/run"} < {
        row["run"] for row in csv.DictReader((tmp_path / "report" / "results.csv").open(encoding="utf-8"))
    }


RATES = ((2, 0.0005), (3, 0.0015))


def test_the_name_of_a_directory_is_no_link(tmp_path):
    for name in ('javascript:alert(1)"><script>x', "b&b #1?"):
        save(plain(language_run(["bio"])), tmp_path / name)
    page = write_report([tmp_path], tmp_path / "out")
    links = [link for link in read(page).values("href") if not link.startswith(("#", "results.csv"))]
    assert links and all(re.fullmatch(r"reports/[\w.%-]+\.html", link) for link in links)
    assert all((page.parent / link).is_file() for link in links)
    for file in (page, *(page.parent / "reports").iterdir()):
        assert "<script" not in file.read_text(encoding="utf-8")


def test_the_ranking(tmp_path):
    """A row per configuration, the one that keeps most first, with a link for every seed."""
    for rate in (5e-4, 1e-3, 1.5e-3):
        for seed in (0, 1):
            run = language_run(["bio", "cs"], method="naive", learning_rate=rate, seed=seed)
            save(plain(run), tmp_path / f"{rate}-{seed}")
    for seed in (0, 1):
        run = plain(language_run(["bio", "cs"], learning_rate=1e-3, seed=seed))
        run.stages[-1]["scores"]["general"]["loss"] -= 0.1
        save(run, tmp_path / f"das-{seed}")
    page = read(write_report([tmp_path], tmp_path / "out"))
    header, *rows = page.tables[0]
    assert header == ["run", "seeds", "kept", "gain", "drift", "forgetting", "at equal gain"]
    assert [row[0] for row in rows] == [
        "1. naive learning_rate=0.0015",
        "2. das learning_rate=0.001",
        "3. naive learning_rate=0.001",
        "4. naive learning_rate=0.0005",
    ]
    assert [row[1] for row in rows] == ["0, 1"] * 4
    assert [float(row[2].split()[0]) for row in rows] == pytest.approx([3.6, 2.5, 2.4, 1.2], abs=1e-3)
    assert rows[0][-1] == "the reference"


def test_runs_that_cannot_be_compared_are_shown(tmp_path):
    for name in ("bio", "law"):
        save(plain(language_run([name])), tmp_path / "runs" / name)
    page = read(write_report([tmp_path / "runs"], tmp_path / "out"))
    assert page.of("p")[0].startswith("The runs are not compared: ")
    assert page.tables[0] == [["", "report"], ["bio", "open"], ["law", "open"]]
    assert "reports/2-law.html" in page.values("href") and (tmp_path / "out" / "reports" / "2-law.html").is_file()


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A classic benchmark of two methods over two seeds, and a run of its search."""
    directory = tmp_path_factory.mktemp("benchmark") / "odd_even"
    methods, names = ("naive", "ewc"), []
    for method in methods:
        for seed in (0, 1):
            names.append(f"runs/{method}-{seed}")
            run = small_run(method=method, seed=seed)
            if method == "naive":
                run.stages[-1]["scores"]["even"]["accuracy"] = 0.3 - 0.01 * seed
            save(run, directory / names[-1])
    save(small_run(method="ewc", seed=9), directory / "search" / "ewc-9")
    data = {
        "experiment": "odd_even",
        "parameters": {},
        "description": "even digits, then odd ones",
        "measure": "accuracy",
        "seeds": [0, 1],
        "search_seeds": [9],
        "runs": names,
        "methods": {method: {"chosen": {}, "tried": []} for method in methods},
    }
    (directory / "benchmark.json").write_text(json.dumps(data), encoding="utf-8")
    return directory


def test_a_benchmark_is_its_methods_over_seeds(benchmark, tmp_path):
    page = read(write_report([benchmark], tmp_path / "one"))
    assert page.of("h1") == ["das-lm: odd_even"]
    assert page.of("h3")[1:] == ["Final average of every method", "Every task over all epochs"]
    assert "Beats naive: ewc." in page.of("li")
    assert [row[0] for row in page.tables[0]] == ["method", "naive", "ewc"]
    assert page.tables[0][2][2].startswith("87.0")  # (0.8 + 0.93) / 2 and 0.01 more
    from_above = read(write_report([benchmark.parent], tmp_path / "two"))
    assert from_above.of("h1") == ["das-lm: odd_even"]
    single = read(write_report([benchmark / "runs" / "ewc-0"], tmp_path / "three"))
    assert single.of("h1") == ["das-lm: ewc-0"] and "Beats naive: ewc." not in single.of("li")


# ---- what it refuses --------------------------------------------------------------------------------------------


def test_a_benchmark_that_is_not_finished(benchmark, tmp_path):
    directory = tmp_path / "odd_even"
    shutil.copytree(benchmark, directory)
    (directory / "benchmark.json").write_text('{"experiment": "odd_even", "parameters": {}}', encoding="utf-8")
    with pytest.raises(UserError, match="not finished; the same das-lm classic command"):
        write_report([directory])
    assert not (directory / "report.html").exists()


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="no run is given"):
        write_report([])
    with pytest.raises(UserError, match="there is no such directory"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="there is no forgetting.json in it"):
        write_report([tmp_path])
    run = save(language_run(["bio"]), tmp_path / "run")
    data = json.loads((run / FILE_NAME).read_text(encoding="utf-8"))
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"stages": []}, "nothing was measured yet|not as das-lm writes it"),
        ({"stages": [{"name": "base", "scores": {"bio": {"loss": 1.0}}}]}, "not as das-lm writes it"),
        ({"domains": ["bio"]}, "not as das-lm writes it"),
    ):
        (run / FILE_NAME).write_text(json.dumps({**data, **change}), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            write_report([run])
    (run / FILE_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        write_report([run])
    assert sorted(file.name for file in run.iterdir()) == [FILE_NAME]


def test_command_line(tmp_path, capsys):
    run = save(plain(language_run(["bio"])), tmp_path / "run")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["report", str(run), "--output_dir", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "RUN" in capsys.readouterr().err
    assert main(["report", str(run), "--output_dir", str(tmp_path / "out"), "--title", "T"]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'out' / 'report.html'}\n"
    assert read(tmp_path / "out" / "report.html").of("h1") == ["T"]
