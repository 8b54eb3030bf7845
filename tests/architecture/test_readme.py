"""The annotated tree in README.md is the tree that is there."""

from __future__ import annotations

import os.path
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def listed(readme: str) -> list[str]:
    """The top-level entries of the tree under "## The repository".

    Raises:
        ValueError: there is no such section, no tree in it, or an entry without its note.
    """
    tree = re.search(r"^## The repository$.*?^```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if tree is None:
        raise ValueError('README.md has no section "## The repository" with a ```text block')
    entries = []
    for line in tree[1].splitlines():
        if line.startswith(" "):
            continue
        name, _, note = line.partition(" ")
        if not note.strip():
            raise ValueError(f"README.md: {name} has no note in the tree")
        entries.append(name.removesuffix("/"))
    return entries


def differences(entries: list[str], existing: set[str]) -> list[str]:
    """What the tree says too much, too little or twice."""
    missing = [f"{name}: not in README's tree" for name in sorted(existing - set(entries))]
    gone = [f"{name}: in README's tree, but not there" for name in sorted(set(entries) - existing)]
    twice = [f"{name}: twice in README's tree" for name in sorted(set(entries)) if entries.count(name) > 1]
    return missing + gone + twice


def tracked(root: Path) -> list[Path]:
    """The files under version control."""
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), "ls-files"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in output.splitlines()]


@pytest.fixture
def files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which entries belong to the repository is unknown")
    return tracked(ROOT)


def test_the_tree_lists_what_is_there(files: list[Path]) -> None:
    entries = listed((ROOT / "README.md").read_text())
    assert differences(entries, {file.parts[0] for file in files}) == []


def test_files_that_the_documents_name_are_there(files: list[Path]) -> None:
    known = {str(file) for file in files} | {str(parent) for file in files for parent in file.parents}
    documents = [file for file in files if file.suffix == ".md"]
    assert documents
    dead = [link for document in documents for link in _dead_links(document, known, ROOT)]
    assert dead == []


def _dead_links(document: Path, known: set[str], root: Path) -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)", (root / document).read_text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    return [f"{document}: {link}" for link in local if os.path.normpath(document.parent / link) not in known]


def test_entries_too_many_too_few_and_twice_are_found() -> None:
    tree = "Makefile  verbs\nmodels/   library\n  detrs/\nMakefile  verbs\n"
    readme = f"# x\n\n## The repository\n\n```text\n{tree}```\n"
    assert listed(readme) == ["Makefile", "models", "Makefile"]
    assert differences(listed(readme), {"Makefile", "platform"}) == [
        "platform: not in README's tree",
        "models: in README's tree, but not there",
        "Makefile: twice in README's tree",
    ]


@pytest.mark.parametrize(
    ("readme", "message"),
    [("# x\n", "no section"), ("## The repository\n\n```text\nMakefile\n```\n", "Makefile has no note")],
)
def test_a_readme_without_a_tree_is_refused(readme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(readme)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("[read](../README.md) [b](b.md#part) [c](https://example.org/c)")
    assert _dead_links(Path("docs/a.md"), {"README.md", "docs/a.md"}, tmp_path) == ["docs/a.md: b.md"]
