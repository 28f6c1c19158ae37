"""Docs, docstrings, comments and messages use the field's words, not the phrases that lost readers before."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("vista", "kernels", "scripts", "conf", "docs", "tests", ".ci")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml", "pyproject.toml")
SUFFIXES = {".py", ".md", ".yaml", ".ipynb", ".toml", ".sh", ""}
UNITS = "events|tokens|bytes|rows|seconds|ms|KB|KiB|MB|MiB|GB|GiB|items|labels|negatives|records|requests|users|passes"
EACH = (
    "user|row|request|thread|batch|second|minute|hour|day|item|event|pass|step|core|worker|head|chunk|window|store|part"
)
PHRASES = {
    r"\banew\b": "again",
    r"\bwhence\b": "from which",
    r"\bon wish\b": "optional",
    r"\bbeside\b": "alongside, next to, besides",
    r"\b(?:go|goes|going|went) on (?!to\b)": "resume, continue",
    r"\brivals?\b": "baseline",
    r"\bwhole[- ](?:life|lives)\b|\b(?:long|user's|users'|lifelong|a|each) (?:life|lives)\b(?! in\b)": "history",
    r"\bthe truth\b": "the oracle",
    r"\bfloors\b|\b(?:the|its|a) floor\b": "counting baseline; roofline, lower bound",
    r"(?<!there )(?<!There )\b(?:is|are) no (?!longer\b|more\b)\w": "is not a, are not",
    r"\b(?:is|are) none of\b|\bnone of those\b": "is not one of",
    r"\bknows? no limit\b": "use None for no limit",
    r"\bwhole or not at all\b": "atomically",
    r"\bserved on\b": "stays in service",
    r"\bha(?:s|ve) seen\b": "covers, contains: the events that the summary covers",
    r"\bneeds? a training\b": "retrain",
    r"\bin the same bits\b": "the result is bit-identical",
    r"\b(?:an? row|a record|a token) an? (?:item|user|event)\b": "one row per item",
    r"^ *# .*-{4,} *$": "no banner: files of one subject need no headings",
    rf"\b(?:{UNITS}) an? (?:{EACH})\b": "per user, per row, ...",
}
"""Pattern -> what to write instead."""


def texts() -> list[Path]:
    listed = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.suffix in SUFFIXES]
    listed = [path for path in listed if path.is_file() and path != Path(__file__)]
    return [*sorted(listed), *(REPOSITORY / name for name in FILES)]


def test_no_phrase_that_loses_readers() -> None:
    hits = [
        f"{path.relative_to(REPOSITORY)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: write {better!r}"
        for path in texts()
        for text in [path.read_text(encoding="utf-8")]
        for pattern, better in PHRASES.items()
        for match in re.finditer(pattern, text, re.MULTILINE)
    ]
    assert not hits, "\n".join(hits)
