"""The blind naming test: can a person name the object that was painted, out of four, without its exemplar?

Every object has a number, an image and four names in a drawn order: its own and three of other test objects.
The sheets show no more; which name is right stands in a key that the judge does not get.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import binomtest

from pbe.data.randomness import generator
from pbe.data.toy.scenes import ToyWorld
from pbe.errors import UserError
from pbe.evaluation.benchmark.toy import SPLIT, ToyCase
from pbe.evaluation.metrics.bootstrap import LEVEL, Estimate
from pbe.evaluation.report import at_side
from pbe.files import write_output

LETTERS = "abcd"
OBJECTS = 48
TILE = 320  # side of an image on a sheet, pixels
COLUMNS, ROWS = 4, 3
GAP, LINE, FONT = 20, 21, 16
PAPER, INK, FAINT = (255, 255, 255), (25, 25, 25), (120, 120, 120)
ANSWERS, KEY = "answers.csv", "key.csv"
# Objects whose name in the archive is a code point, by what the code point stands for.
UNNAMED = {
    "u+1f6dc": "wireless sign",
    "u+1fa76": "grey heart",
    "u+1fa88": "flute",
    "u+1faad": "folding hand fan",
    "u+1faaf": "khanda (Sikh emblem)",
}


@dataclass(frozen=True)
class Question:
    """One image to be named.

    Attributes:
        number: from 1, as on the sheet.
        key: file stem of the object.
        names: four, in the order of :data:`LETTERS`.
        right: the letter of the object's own name.
    """

    number: int
    key: str
    names: tuple[str, ...]
    right: str


def readable(name: str) -> str:
    """Return an object's name, or what its code point stands for where the archive has no name."""
    return UNNAMED.get(name, name)


def make_questions(world: ToyWorld, cases: Sequence[ToyCase], seed: int = 0) -> list[Question]:
    """Draw three further names for each case from those of all other test objects, and an order of the four.

    The draw belongs to seed and object, so edits, true images and other models get the same questions.
    """
    names = [readable(toy.name) for toy in world.objects(SPLIT)]
    questions = []
    for number, case in enumerate(cases, 1):
        rng = generator(seed, "naming", case.index)
        own = names[case.index]
        others = [name for name in names if name != own]
        four = [own, *(others[i] for i in rng.choice(len(others), len(LETTERS) - 1, replace=False))]
        order = rng.permutation(len(four))
        right = LETTERS[int(np.argmin(order))]  # where 0, the own name, has come to stand
        questions.append(Question(number, case.key, tuple(four[i] for i in order), right))
    return questions


def naming_sheets(questions: Sequence[Question], images: np.ndarray) -> list[Image.Image]:
    """Draw the sheets: images enlarged by Lanczos' filter, each above its number and four names.

    Args:
        questions: one an image.
        images: uint8 ``n s s 3``.
    """
    size = COLUMNS * ROWS
    pairs = list(zip(questions, images, strict=True))
    return [_sheet(pairs[start : start + size]) for start in range(0, len(pairs), size)]


def _sheet(pairs: Sequence[tuple[Question, np.ndarray]]) -> Image.Image:
    cell_width, cell_height = TILE + GAP, TILE + GAP + (len(LETTERS) + 1) * LINE
    rows = -(-len(pairs) // COLUMNS)
    page = Image.new("RGB", (GAP + COLUMNS * cell_width, GAP + rows * cell_height), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    for place, (question, image) in enumerate(pairs):
        x, y = GAP + place % COLUMNS * cell_width, GAP + place // COLUMNS * cell_height
        page.paste(Image.fromarray(at_side(image, TILE)), (x, y))
        draw.text((x, y + TILE + 2), f"{question.number}", fill=FAINT, font=font)
        for line, (letter, name) in enumerate(zip(LETTERS, question.names, strict=True)):
            text = _fitted(draw, f"{letter}  {name}", font)
            draw.text((x + 36, y + TILE + 2 + line * LINE), text, fill=INK, font=font)
    return page


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a text that is wider than its image."""
    while draw.textlength(text, font=font) > TILE - 36:
        text = text.removesuffix("…")[:-1].rstrip() + "…"
    return text


def write_key(path: Path, questions: Sequence[Question], shown: str) -> None:
    """Write the key: number, file stem, right letter and name, and what the sheets show."""
    rows = [[q.number, q.key, q.right, q.names[LETTERS.index(q.right)], shown] for q in questions]
    _write_rows(path, [["number", "object", "right", "name", "shown"], *rows])


def write_form(path: Path, questions: Sequence[Question]) -> None:
    """Write the answer sheet: number, an empty answer, and the four names."""
    _write_rows(path, [["number", "answer", *LETTERS], *([q.number, "", *q.names] for q in questions)])


def _write_rows(path: Path, rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_output(path, text.getvalue())


@dataclass(frozen=True)
class NamingResult:
    """What came of one answer sheet.

    Attributes:
        right: number of right answers.
        count: of questions; what was left blank is not right.
        blank: left unanswered.
        share: right ones, with the exact (Clopper-Pearson) binomial interval.
        shown: what the sheets showed.
    """

    right: int
    count: int
    blank: int
    share: Estimate
    shown: str

    def __str__(self) -> str:
        """Say it in a line."""
        share, blank = self.share, f", {self.blank} left blank" if self.blank else ""
        return (
            f"{self.shown}: {self.right} of {self.count} right{blank}: {100 * share.value:.0f} % "
            f"({100 * share.low:.0f} to {100 * share.high:.0f}, {LEVEL:.0%} exact binomial interval); "
            f"chance is {100 / len(LETTERS):.0f} %"
        )


def score_answers(answers: Path, key: Path) -> NamingResult:
    """Compare an answer sheet with its key."""
    rights = _column(key, "right")
    given = _column(answers, "answer")
    if set(given) != set(rights):
        odd = sorted(set(given) ^ set(rights))
        raise UserError(
            f"'{answers}' and '{key}' do not belong together: question {odd[0]} is in one of them only"
        )
    letters = {number: answer.strip().lower() for number, answer in given.items()}
    for number, letter in letters.items():
        if letter and letter not in tuple(LETTERS):
            raise UserError(f"'{answers}', question {number}: '{letter}' is not one of {', '.join(LETTERS)}")
    right = sum(letters[number] == rights[number] for number in rights)
    shown = next(iter(_column(key, "shown").values()))
    blank = sum(not letter for letter in letters.values())
    return NamingResult(right, len(rights), blank, exact_share(right, len(rights)), shown)


def exact_share(right: int, count: int) -> Estimate:
    """Return a share with its exact (Clopper-Pearson) binomial interval."""
    interval = binomtest(right, count).proportion_ci(LEVEL, method="exact")
    return Estimate(right / count, float(interval.low), float(interval.high))


def _column(path: Path, name: str) -> dict[int, str]:
    """Read one column of a CSV file by the numbers of its questions."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not rows or not {"number", name} <= set(rows[0]):
        raise UserError(f"'{path}' has no rows with the columns number and {name}")
    try:
        found = {int(row["number"]): row[name] or "" for row in rows}
    except (TypeError, ValueError) as error:
        raise UserError(f"'{path}': the column number holds something else than whole numbers") from error
    if len(found) < len(rows):
        raise UserError(f"'{path}' has a question twice")
    return found
