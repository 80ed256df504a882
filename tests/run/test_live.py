"""The page of a run that goes on."""

import re

import pytest

from das_lm.measure.results import FILE_NAME, Results
from das_lm.report.page import stop_reloading, write_running
from das_lm.run import live
from das_lm.run.walk import continual_pretrain
from das_lm.signals import Interrupted
from tests.report.full_runs import language_run, plain

REFRESH = 'http-equiv="refresh"'
