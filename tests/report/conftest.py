"""A run that holds all a run can hold, and its page."""

import pytest

from das_lm.report.page import write_report
from tests.report.full_runs import language_run, save
from tests.report.helpers import SCRIPT


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return save(language_run(["bio", SCRIPT]), tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def path(run):
    return write_report([run])
