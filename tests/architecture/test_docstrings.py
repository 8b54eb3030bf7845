"""Docstrings of functions open with an imperative sentence, and name the errors that the function raises.

ruff's D401 finds verbs in a wrong form ("Returns the ..."), but not sentences without a verb ("The ..."), for which
there is the list below.
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


FILES = [
    file for folder in ("platform", "models", "jobs", "benchmarks") for file in (ROOT / folder).rglob("*.py")
]


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
    assert len(FILES) > 100
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}: {word!r}"
        for file in FILES
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


def unnamed_errors(code: str) -> list[tuple[str, int, str]]:
    """Return name, line and error of each public function that raises an error which its docstring does not name."""
    return _unnamed_errors(ast.parse(code))


def _unnamed_errors(scope: ast.Module | ast.ClassDef) -> list[tuple[str, int, str]]:
    found = []
    for node in scope.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += _unnamed_errors(node)
        # The docstrings of commands are their help texts
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not _is_command(node):
            docstring = ast.get_docstring(node) or ""
            raised = {
                name for each in ast.walk(node) if isinstance(each, ast.Raise) and (name := _error(each))
            }
            found += [(node.name, node.lineno, name) for name in sorted(raised) if name not in docstring]
    return found


def _is_command(function: ast.FunctionDef) -> bool:
    calls = [each for decorator in function.decorator_list for each in ast.walk(decorator)]
    return any(isinstance(each, ast.Attribute) and each.attr == "command" for each in calls)


def _error(statement: ast.Raise) -> str | None:
    """Return the class of the error in `raise Class(...)`, None for other statements."""
    call = statement.exc
    if not isinstance(call, ast.Call):
        return None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name if name.endswith("Error") else None


def test_docstrings_name_the_errors_that_a_function_raises() -> None:
    files = [file for file in FILES if ROOT / "benchmarks" not in file.parents]
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}: {error}"
        for file in files
        for name, line, error in unnamed_errors(file.read_text())
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('def f():\n    """Return 1."""\n    raise ValueError("a")', ["ValueError"]),
        (
            'def f():\n    """Return 1.\n\n    Raises:\n        ValueError: a.\n    """\n    raise ValueError("a")',
            [],
        ),
        (
            'class A:\n    def f(self):\n        """Return 1."""\n        raise b.OtherError("a")',
            ["OtherError"],
        ),
        ('class _A:\n    def f(self):\n        """Return 1."""\n        raise ValueError("a")', []),
        ('def f():\n    """Return 1."""\n    try:\n        g()\n    except KeyError:\n        raise', []),
        ('@app.command()\ndef f():\n    """Return 1."""\n    raise ValueError("a")', []),
        ('def _f():\n    raise ValueError("a")', []),
    ],
)
def test_which_errors_must_be_named(code: str, expected: list[str]) -> None:
    assert [error for _, _, error in unnamed_errors(code)] == expected
