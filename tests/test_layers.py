"""The layers of the package: a folder imports from those before it, and nothing in a circle."""

import ast
from pathlib import Path

import oal_jax

PACKAGE = Path(oal_jax.__file__).parent
# `runtime` and `config` serve all; the doors, the modules at the package's root, come last.
LAYERS = (
    *("errors", "runtime", "config", "data", "models", "pretrained", "generator", "outliers"),
    *("methods", "scores", "training", "generative", "evaluation", "report", "stages"),
    *("detection", "aot", "doors"),
)


def layer(module: str) -> str:
    """The folder of a module `oal_jax.FOLDER.NAME`; "doors" for those at the root."""
    name = module.split(".")[1] if "." in module else "doors"
    return name if (PACKAGE / name).is_dir() or name == "errors" else "doors"


def imports(path: Path) -> list[str]:
    """The modules of the package that a file imports, within functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [n if exists(n) else node.module for n in names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        found += [m for m in modules if m.split(".")[0] == "oal_jax"]
    return found


def exists(module: str) -> bool:
    path = PACKAGE.parent / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def graph() -> dict[str, set[str]]:
    """Module to the modules of the package that it imports."""
    edges = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        edges[module] = set(imports(path)) - {module}
    return edges


def test_a_folder_imports_only_from_the_layers_before_it():
    upward = [
        f"{module} -> {target}"
        for module, targets in graph().items()
        for target in targets
        if module != "oal_jax" and LAYERS.index(layer(target)) > LAYERS.index(layer(module))
    ]
    assert sorted(upward) == []


def test_no_module_imports_itself_through_others():
    edges = graph()
    # A package's own file names its modules for its users, and no module needs it.
    edges = {
        m: {t for t in ts if not (PACKAGE.parent / t.replace(".", "/")).is_dir()}
        for m, ts in edges.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module in done:
            return
        for target in edges.get(module, ()):
            visit(target, (*way, module))
        done.add(module)

    for module in edges:
        visit(module, ())
