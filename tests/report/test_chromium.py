"""The page as Chromium sees it."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from tests.report.helpers import FIGURES, SCRIPT, Page


@pytest.fixture
def chromium(tmp_path):
    """Opens a page with options; gives stdout and what was said on the console."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")

    def open_page(path, *options):
        command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,2400"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
        command += ["--disable-background-networking", "--no-first-run"]  # its own requests
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*command, *options, path.absolute().as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


def test_chromium_opens_it_without_a_word(chromium, path, tmp_path):
    """With its policy, every attempt to load something would be an error on the console, as the second page shows."""
    dom, console = chromium(path, "--dump-dom")
    assert console == []
    page = Page(dom)
    assert page.tags.count("svg") == len(FIGURES) and "script" not in page.tags
    assert page.of("h3")[-1] == f"Importance after {SCRIPT}"
    other = tmp_path / "other.html"
    image = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "changed"</script></body>'
    other.write_text(path.read_text(encoding="utf-8").replace("</body>", image), encoding="utf-8")
    dom, console = chromium(other, "--dump-dom")
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert "changed" not in Page(dom).of("title")


def test_chromium_light_and_dark(chromium, path, tmp_path):
    """Dark paper and light ink where that is preferred; the colours of the figures stay."""
    shots = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        file = tmp_path / f"{name}.png"
        chromium(path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={file}")
        shots[name] = imread(file)[..., :3]
    assert shots["light"].shape == shots["dark"].shape == (2400, 1000, 3)
    paper = {name: shot[2, 2] for name, shot in shots.items()}
    assert paper["light"].min() > 0.95 and paper["dark"].max() < 0.15
    for name, shot in shots.items():
        ink = np.abs(shot.mean(-1) - paper[name].mean())
        assert 0.01 < (ink > 0.6).mean() < 0.2
        assert ((shot[..., 2] - shot[..., 0]) > 0.2).mean() > 0.001  # blue tiles of the result matrix


def test_chromium_prints_it(chromium, path, tmp_path):
    file = tmp_path / "page.pdf"
    chromium(path, f"--print-to-pdf={file}", "--no-pdf-header-footer")
    data = file.read_bytes()
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", data)) > 2
