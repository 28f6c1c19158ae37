"""The tree keeps what it promises a newcomer: imports that point one way, no cycles, and a size that only goes down."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.refresh.kafka_clusters import Tansu

REPOSITORY = Path(__file__).parents[1]
LAYERS = (
    ("vista",),
    ("vista.cli",),
    ("vista.doctor",),
    ("vista.sweep",),
    ("vista.training", "vista.export", "vista.explore", "vista.report"),
    ("vista.evaluation", "vista.serve"),
    ("vista.refresh", "vista.scorer", "vista.planning"),
    ("vista.examples", "vista.model", "vista.store", "vista.simulation"),
    ("vista.counters",),
    ("vista.log",),
    ("vista.device", "vista.ranks", "vista.runs"),
    ("vista.config", "vista.logistic_regression", "vista.threads"),
    ("vista.arrays",),
    ("vista.files", "vista.installation", "vista.machine", "vista.progress_bar", "vista.text_table"),
    ("vista.errors", "vista_kernels"),
)
"""A module imports from its own package and from the layers below it. `vista` only lists the public names."""
SAME_LAYER = {("vista.model", "vista.examples")}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return name.removeprefix("kernels.").removesuffix(".__init__")


MODULES = {module_of(path): path for path in sources("vista", "kernels")}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(above: ast.AST) -> Iterator[ast.AST]:
    """All statements below a module or statement, except for type checking alone."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        if name == "body" and isinstance(above, ast.If) and "TYPE_CHECKING" in ast.dump(above.test):
            continue
        for node in getattr(above, name, ()):
            if isinstance(node, ast.AST):
                yield node
                yield from statements(node)


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Modules of the project that a file imports, at the top or in a function, except for type checking alone."""
    found = []
    for node in statements(tree_of(path)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                found.append((name, node.lineno))
    return found


def package_of(module: str) -> str:
    return ".".join(module.split(".")[: 1 if module.startswith("vista_kernels") else 2])


def test_imports_point_one_way() -> None:
    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    wrong = []
    for module, path in MODULES.items():
        for target, line in imports(path):
            here, there = package_of(module), package_of(target)
            allowed = here == there or level[there] > level[here] or (here, there) in SAME_LAYER
            if not allowed:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too: a lazy import may spare start-up time, but must not hide a cycle."""
    graph = {module: {target for target, _ in imports(path)} - {module} for module, path in MODULES.items()}
    done: set[str] = set()
    trail: list[str] = []

    def visit(module: str) -> None:
        if module in done:
            return
        assert module not in trail, "cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        trail.append(module)
        for target in sorted(graph[module]):
            # A package's __init__ may name its own modules for the public API.
            if not (MODULES[module].name == "__init__.py" and target.startswith(module + ".")):
                visit(target)
        trail.pop()
        done.add(module)

    for module in graph:
        visit(module)


def public_classes() -> list[tuple[str, Path]]:
    return [
        (node.name, path)
        for path in sources("vista", "kernels", "scripts")
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]


def test_a_class_name_stands_for_one_thing() -> None:
    places = defaultdict(list)
    for name, path in public_classes():
        places[name].append(str(path.relative_to(REPOSITORY)))
    shared = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert not shared, shared


FOLDER_MAKERS = ("vista/files.py", "vista/store/layout.py")
STAGING_FOLDERS = {
    "vista/log/ingest/prepare.py": {"folder", "scratch"},
    "vista/log/segment_writer.py": {"folder", "segment.folder / prefix", "segment.folder / owner.folder"},
    "vista/training/checkpoint.py": {"temporary"},
}
"""Folders that other modules make inside of a temporary folder, which is synced as a whole before it gets its name."""


def test_folders_are_made_durably() -> None:
    """By `make_folders`, or by `make_folder` in a store: after a power cut, a folder's name must be on the disk."""
    wrong = []
    for path in sources("vista"):
        place = str(path.relative_to(REPOSITORY))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr in ("mkdir", "makedirs") and place not in FOLDER_MAKERS:
                folder = ast.unparse(node.value)
                if folder not in STAGING_FOLDERS.get(place, ()):
                    wrong.append(f"{place}:{node.lineno} makes {folder}")
    assert not wrong, "\n".join(wrong)


def test_modules_can_be_read_at_once() -> None:
    """A module is a subject that a reader takes in from top to bottom: at most 700 lines."""
    long = [
        f"{path.relative_to(REPOSITORY)}: {lines} lines"
        for path in sources("vista", "kernels", "scripts", "tests")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 700
    ]
    assert not long, "\n".join(long)


def test_make_test_leaves_out_all_groups_with_a_target_of_their_own() -> None:
    markers = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    groups = re.search("^SLOW_GROUPS := (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert groups is not None
    assert sorted(groups[1].split(" or ")) == sorted(line.split(":")[0] for line in markers if "; `make " in line)


MOST = {"vista": (209, 67_766), "tests": (220, 60_381)}
"""Files and lines of each folder. Whoever removes some lowers the numbers in the same commit. Raise them only for
something that users can do afterwards, and not for the sake of structure."""


@pytest.mark.parametrize("folder", MOST)
def test_the_tree_does_not_grow(folder: str) -> None:
    paths = sources(folder)
    size = len(paths), sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    assert size <= MOST[folder] and size[1] <= MOST[folder][1], f"{folder}: {size} files and lines"


@pytest.mark.parametrize("in_ci", [True, False])
def test_tests_without_their_programs_fail_in_continuous_integration(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, in_ci: bool
) -> None:
    for name in ("CI", "VISTA_RECTOOLS_VENV", "TANSU_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    if in_ci:
        monkeypatch.setenv("CI", "true")
    for need in (Tansu, lambda: request.getfixturevalue("rectools")):
        with pytest.raises(pytest.fail.Exception if in_ci else pytest.skip.Exception):
            need()
