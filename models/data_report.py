"""What a set of imported questions looks like: counts, answers, duplicates, and what is wrong or doubtful.

    python -c "from models.data_report import describe; from models.importing import scan_folder as s; \
        print(describe(s('data')))"
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from models.answers import normalise
from models.importing import Scan
from models.record_forms import SETS, TWO_SPLITS

SPLIT_NAMES = ("train", "validation", "test")
FEW = 100
"""Fewer test questions than this give intervals of ten points and more."""
ONE_SIDED = 0.9
"""A share of one answer above which a system that has not looked at the image seems good."""


@dataclass(frozen=True)
class Report:
    """counts: split -> set -> questions. answers: set -> most frequent test answers and their shares.

    repeated: questions asked again about the same images; contradicting: of those, with another answer.
    leaks: records whose image stands in two splits. tiny: images with a side below the limit. errors: what
    must be mended before the data can be used; warnings: what should be known.
    """

    rows: int
    images: int
    counts: dict[str, dict[str, int]]
    answers: dict[str, list[tuple[str, float]]]
    reasons: dict[str, int]
    repeated: int
    contradicting: int
    leaks: int
    tiny: int
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def questions(self) -> int:
        """Questions that can be used."""
        return sum(sum(sets.values()) for sets in self.counts.values())


def describe(scan: Scan, min_side_px: int = 32) -> Report:
    """A report of a scan; min_side_px: an image with a shorter side counts as tiny."""
    counts = {split: dict.fromkeys(SETS, 0) for split in SPLIT_NAMES}
    for question in scan.questions:
        counts[question.split][question.set] += 1
    repeated, contradicting = _repeats(scan)
    report = Report(
        rows=scan.rows,
        images=len(scan.images),
        counts=counts,
        answers={name: found for name in SETS if (found := _frequent_answers(scan, name))},
        reasons=scan.reasons(),
        repeated=repeated,
        contradicting=contradicting,
        leaks=scan.reasons().get(TWO_SPLITS, 0),
        tiny=sum(min(image.width, image.height) < min_side_px for image in scan.images.values()),
    )
    report.errors.extend(_errors(report))
    report.warnings.extend(_warnings(report, scan, min_side_px))
    return report


def _repeats(scan: Scan) -> tuple[int, int]:
    answers = defaultdict(list)
    for question in scan.questions:
        key = (tuple(question.images), normalise(question.question), tuple(question.choices or ()))
        answers[key].append(normalise(question.answer))
    repeated = sum(len(found) - 1 for found in answers.values())
    return repeated, sum(len(set(found)) - 1 for found in answers.values())


def _frequent_answers(scan: Scan, name: str, most: int = 5) -> list[tuple[str, float]]:
    found = Counter(q.answer for q in scan.questions if q.set == name and q.split == "test")
    return [(answer, count / found.total()) for answer, count in found.most_common(most)]


def _errors(report: Report) -> list[str]:
    errors = []
    if report.reasons:
        errors.append(f"{sum(report.reasons.values()):,} of {report.rows:,} records cannot be used")
    if not report.questions:
        errors.append("no question that can be used")
    else:
        errors += [f"no {split} questions" for split in SPLIT_NAMES if not sum(report.counts[split].values())]
    return errors


def _warnings(report: Report, scan: Scan, min_side_px: int) -> list[str]:
    warnings = []
    tests = report.counts["test"]
    for name in SETS:
        if report.questions and not tests[name]:
            warnings.append(f'no test questions in the set "{name}": nothing is measured there')
        elif 0 < tests[name] < FEW:
            warnings.append(f'only {tests[name]} test questions in the set "{name}": intervals will be wide')
    for name, found in report.answers.items():
        if found[0][1] >= ONE_SIDED:
            warnings.append(f'{found[0][1]:.0%} of the test answers in "{name}" are {found[0][0][:40]!r}')
    if report.repeated:
        warnings.append(f"{report.repeated:,} questions are asked again about the same images")
    if report.contradicting:
        warnings.append(f"{report.contradicting:,} of these have another answer")
    if report.tiny:
        warnings.append(f"{report.tiny:,} images have a side below {min_side_px} pixels")
    if scan.unknown:
        names = ", ".join(f"{name} ({count:,})" for name, count in scan.unknown.most_common(5))
        warnings.append(f"fields that are not used: {names}")
    return warnings
