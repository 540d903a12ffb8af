"""Every public function and method of the package says what it takes and returns; ruff cannot leave the others out."""

import ast
from pathlib import Path


def missing_hints(node, prefix=""):
    """Yield what has no type hint, of functions without an underscore and such methods of classes without one."""
    for child in node.body:
        public = not getattr(child, "name", "_").startswith("_")
        if isinstance(child, ast.ClassDef) and public:
            yield from missing_hints(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and (public or child.name == "__init__"):
            named = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            missing = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
            missing += ["the result"] if public and child.returns is None else []
            yield from (f"{prefix}{child.name}: {name}" for name in missing)


def test_public_functions_have_type_hints():
    package = Path(__file__).resolve().parent.parent / "focal_plugin"
    paths = sorted(package.rglob("*.py"))
    assert not [m for path in paths for m in missing_hints(ast.parse(path.read_text("utf-8")), f"{path.name}: ")]


def test_what_is_missing_is_found():
    source = "class A:\n    def f(self, x, *, y: int): ...\n    def _g(self, z): ...\ndef h() -> int: ...\n"
    assert list(missing_hints(ast.parse(source))) == ["A.f: x", "A.f: the result"]
