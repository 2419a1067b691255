"""The structure: which room may import which, no import circle, files and functions of a readable size."""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "reverie_jax"
# Rooms from the lowest to the highest, each with the rooms it may import beside itself. `__init__` names the public API.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "files": {"errors"},
    "models": {"errors", "files"},
    "data": {"errors", "files", "models"},
    "beam": {"errors", "data"},
    "hub": {"errors", "files", "data"},
    "train": {"errors", "progress", "files", "models", "data"},
    "hosted": {"errors", "files", "data"},
    "eval": {"errors", "files", "models", "data", "hub", "hosted"},
    "serve": {"errors", "files", "models", "data", "eval"},
    "chat": {"errors", "files", "data", "serve"},
    "review": {"errors", "files", "data"},
    "annotate": {"errors", "files", "data", "hosted"},
    "loading": {"errors", "files", "models", "data", "train"},
    "convert": {"errors", "files", "models", "data", "hub", "loading", "__init__"},
    "comparison": {"errors", "progress", "files", "models", "data", "train", "eval", "loading"},
    "evaluators": {"errors", "data", "train", "eval"},
    "scenes": {"errors", "files", "models", "data", "train", "hosted", "eval", "annotate", "loading", "__init__"},
}
ALLOWED["cli"] = {*ALLOWED, "__init__"}
LONGEST_FILE = 470
LONGEST_FUNCTION = 80


def module(path: Path, package: Path) -> str:
    """The dotted name below the package: `data.tree`; `data` for its `__init__.py`."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, package: Path, modules: set[str]) -> Iterator[str]:
    """Every module of the package that a file imports, at its top or inside a function; not for type checking alone."""
    tree = ast.parse(path.read_text("utf-8"))
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    root = package.name
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}".removeprefix(f"{root}.") in modules
                else node.module
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name == root:
                yield "__init__"
            elif name.startswith(f"{root}."):
                yield name.removeprefix(f"{root}.")


@functools.cache
def graph(package: Path) -> dict[str, set[str]]:
    """The modules that each module imports."""
    files = {module(path, package): path for path in sorted(package.rglob("*.py"))}
    return {name: set(imports(path, package, set(files))) - {name} for name, path in files.items()}


def circle(package: Path) -> list[str]:
    """Modules that import themselves through others; none where there is no such circle."""
    try:
        graphlib.TopologicalSorter(graph(package)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_room_is_known():
    assert {name.partition(".")[0] for name in graph(PACKAGE)} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    wrong = [
        f"{name} imports {other}"
        for name, others in graph(PACKAGE).items()
        for other in others
        if name.partition(".")[0] == room and other.partition(".")[0] not in ALLOWED[room] | {room}
    ]
    assert wrong == []


def test_rooms_are_in_order():
    rooms = list(ALLOWED)
    assert [room for n, room in enumerate(rooms) if not ALLOWED[room] <= {"__init__", *rooms[:n]}] == []


def test_no_module_imports_itself_through_others():
    assert circle(PACKAGE) == []


@pytest.mark.parametrize("late", [False, True])
def test_a_planted_circle_is_found(tmp_path, late):
    package = tmp_path / "planted"
    (package / "a").mkdir(parents=True)
    for folder in (package, package / "a"):
        (folder / "__init__.py").touch()
    (package / "a" / "one.py").write_text("from planted.b import two\n")
    (package / "b.py").write_text("def later():\n    from planted.a import one\n" if late else "import planted.a.one\n")
    assert set(circle(package)) == {"a.one", "b"}


def test_only_checkpoints_touch_files_in_models():
    wrong = [
        path.name
        for path in (PACKAGE / "models").glob("*.py")
        if any(word in path.read_text("utf-8") for word in ("open(", "Path(", "import os", "pathlib"))
    ]
    assert wrong == []


def test_files_can_be_read_in_one_sitting():
    lengths = {module(path, PACKAGE): len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_can_be_read_at_once():
    long = {
        f"{module(path, PACKAGE)}.{node.name}": length
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert long == {}
