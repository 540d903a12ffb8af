"""Every public function and method of the package says what it takes and returns."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "focal_plugin"


def public_functions(node, prefix=""):
    """(name, definition) of the functions, and of the methods of the classes, that have no underscore."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, f"{child.name}.")
        elif isinstance(child, ast.FunctionDef) and (child.name == "__init__" or not child.name.startswith("_")):
            yield prefix + child.name, child


def missing_hints(source):
    found = []
    for name, function in public_functions(ast.parse(source)):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
        bare += ["the result"] if function.returns is None and not name.endswith("__init__") else []
        found += [f"{name}: {', '.join(bare)}"] if bare else []
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_public_functions_have_type_hints(path):
    assert missing_hints(path.read_text(encoding="utf-8")) == []


def test_what_is_missing_is_found():
    source = "class A:\n    def f(self, x, *, y: int): ...\n    def _g(self, z): ...\ndef h() -> int: ...\n"
    assert missing_hints(source) == ["A.f: x, the result"]
