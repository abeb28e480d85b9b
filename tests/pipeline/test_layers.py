"""Which folder may import which (pipeline/README.md), read from the imports themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

FORBIDDEN = {
    "storage": {"pipeline", "torch", "transformers", "vllm", "datasets"},
    "pipeline.teacher": {"pipeline.training", "pipeline.evaluation", "pipeline.study"},
    "pipeline.dump": {"pipeline.training", "pipeline.evaluation", "pipeline.study"},
    "pipeline.training": {"pipeline.teacher", "pipeline.dump", "pipeline.study"},
    "pipeline.evaluation": {"pipeline.training", "pipeline.teacher", "pipeline.dump"},
    "pipeline.models": {"pipeline.data", "pipeline.training", "pipeline.evaluation"},
    "pipeline.data": {"pipeline.training", "pipeline.evaluation", "pipeline.teacher"},
}
"""What a package must not import, in any of its modules and also inside functions."""

BASE = (
    "errors", "types", "config", "cli", "agreement", "engine_args", "recorded", "json_files",
    "outside", "passed", "places", "progress", "ranges", "signals", "foreign", "script_files",
    "onset", "positions", "file_digests", "devices",
)  # fmt: skip
"""Files of `pipeline` that every folder may import, and that import no folder themselves."""


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for package in ("storage", "pipeline")
        for file in sorted((ROOT / package).rglob("*.py"))
    }


def imports_of(module: str, file: Path) -> Iterator[str]:
    """Dotted names that a file imports, late imports included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()
IMPORTS = {module: set(imports_of(module, file)) for module, file in MODULES.items()}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(imports: dict[str, set[str]]) -> list[str]:
    """Each import that a layer forbids."""
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        for package, forbidden in FORBIDDEN.items()
        for name in sorted(names)
        if inside(module, package) and any(inside(name, other) for other in forbidden)
    ]


def test_no_layer_imports_what_is_above_it() -> None:
    assert violations(IMPORTS) == []


def test_a_forbidden_import_is_found() -> None:
    changed = IMPORTS | {"pipeline.dump.plan": {"pipeline.training.train"}}
    assert violations(changed) == ["pipeline.dump.plan imports pipeline.training.train"]


def test_only_the_teacher_imports_vllm() -> None:
    users = {module for module, names in IMPORTS.items() if any(inside(n, "vllm") for n in names)}
    assert users
    assert all(inside(module, "pipeline.teacher") for module in users)


@pytest.mark.parametrize("name", BASE)
def test_the_base_imports_no_folder(name: str) -> None:
    own = {n for n in IMPORTS[f"pipeline.{name}"] if inside(n, "pipeline") and n in MODULES}
    assert own - {"pipeline"} <= {f"pipeline.{other}" for other in BASE}


def test_no_circular_imports() -> None:
    """Depth first over the imports among the modules of both packages."""
    graph = {
        module: {name for name in names if name in MODULES and name != module}
        for module, names in IMPORTS.items()
    }
    packages = {module for module in graph if MODULES[module].name == "__init__.py"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in graph[module] - packages:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert len(done) == len(graph)


def test_init_files_of_the_pipeline_are_empty() -> None:
    """vLLM's processes load the plug-in, and must not load `datasets` with it."""
    files = sorted((ROOT / "pipeline").rglob("__init__.py"))
    assert len(files) > 8
    assert [str(file) for file in files if file.read_text()] == []


def loaded_by(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_settings_are_read_without_torch() -> None:
    """So a refusal takes no seconds."""
    loaded = loaded_by("import pipeline.cli, pipeline.recorded, pipeline.training.lock")
    assert "pipeline.cli" in loaded
    assert not {"torch", "transformers", "datasets", "vllm"} & loaded


def test_the_plugin_loads_no_corpus() -> None:
    pytest.importorskip("vllm")
    loaded = loaded_by("import pipeline.teacher.topk_model")
    assert not {"datasets", "pipeline.corpus"} & loaded
