"""Docstrings of functions open with an imperative sentence, as ruff's D401 and this list have it.

D401 knows verbs in a wrong form ("Returns the ..."); it lets sentences pass that have no verb at all ("The ...").
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NOT_IMPERATIVE = frozenset(
    [
        *(
            "a",
            "all",
            "an",
            "and",
            "any",
            "are",
            "as",
            "at",
            "both",
            "by",
            "each",
            "every",
            "few",
            "for",
            "from",
        ),
        *("here", "how", "if", "in", "is", "it", "its", "likewise", "many", "most", "never", "no", "none"),
        *(
            "nothing",
            "of",
            "on",
            "one",
            "only",
            "or",
            "our",
            "same",
            "several",
            "some",
            "that",
            "the",
            "their",
        ),
        *("them", "these", "they", "this", "those", "three", "to", "two", "what", "when", "where", "whether"),
        *("which", "who", "whose", "with", "without"),
    ]
)


def openings(code: str) -> list[tuple[str, int, str]]:
    """Return name, line and first word of each docstring of a function or method that is no property."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and not any(_is_property(each) for each in node.decorator_list):
            words = (ast.get_docstring(node) or "").split()
            if words:
                found.append((node.name, node.lineno, words[0].strip("`*(\"'").lower()))
    return found


def _is_property(decorator: ast.expr) -> bool:
    names = [
        part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "")
        for part in ast.walk(decorator)
    ]
    return any(name in ("property", "cached_property") for name in names)


def test_docstrings_open_with_a_verb() -> None:
    files = [
        file
        for folder in ("platform", "models", "jobs", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 100
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}: {word!r}"
        for file in files
        for name, line, word in openings(file.read_text())
        if word in NOT_IMPERATIVE or not word[:1].isalpha()
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('def f():\n    """The size."""', "the"),
        ('class A:\n    def f(self):\n        """Return the size."""', "return"),
        ('def f():\n    """`a` as b."""', "a"),
        ('class A:\n    @property\n    def f(self):\n        """The size."""', None),
        ('class A:\n    @functools.cached_property\n    def f(self):\n        """The size."""', None),
        ("def f():\n    return 1", None),
    ],
)
def test_what_is_read_as_an_opening(code: str, expected: str | None) -> None:
    assert [word for _, _, word in openings(code)] == ([] if expected is None else [expected])
