"""Imports point down, and each foreign library has one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hubpeer

PACKAGE = Path(hubpeer.__file__).parent

#: A module imports from lower numbers only. A package is one module here: inside it anything goes.
LAYERS = {
    "__init__": 0, "errors": 0,
    "wire": 1, "jobs": 1,
    "settings": 2, "agents": 2, "plan": 2, "contract": 2,
    "taxonomy": 3, "keywords": 3,
    "bus": 4, "model": 4, "documents": 4, "store": 4,
    "encoder": 5, "roster": 5, "deadletter": 5, "client": 5,
    "conduct": 6, "ingest": 6, "spoke": 6,
    "route": 7, "evaluate": 7,
    "operate": 8,
    "peer": 9,
    "cli": 10,
    "__main__": 11,
}  # fmt: skip

#: Foreign library -> the one module that may import it; two for what both kinds of model stand on. Others: nowhere.
OWNERS = {
    "nats": "bus",
    "lmdb": "store", "sqlite3": "store",
    "pypdf": "documents", "pypdfium2": "documents", "docx": "documents", "lxml": "documents",
    "torch": "model", "transformers": "model", "llguidance": "model", "safetensors": "model", "huggingface_hub": "model",
    "tokenizers": "model encoder", "numpy": "model encoder",
    "click": "cli", "rich": "cli",
}  # fmt: skip
EVERYWHERE = {"msgspec"}


def imports() -> list[tuple[str, str]]:
    """(importing file without suffix, dotted name) of every import under hubpeer/, those inside functions too."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        importer = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found += [(importer, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                if node.module == "hubpeer":
                    # `from hubpeer import wire` names a module, `from hubpeer import __version__` the package itself.
                    found += [(importer, f"hubpeer.{a.name if a.name in LAYERS else '__init__'}") for a in node.names]
                else:
                    found.append((importer, str(node.module)))
    return found


IMPORTS = imports()
OURS = [(importer, name) for importer, name in IMPORTS if name.split(".")[0] == "hubpeer"]
FOREIGN = [
    (i, n.split(".")[0]) for i, n in IMPORTS if n.split(".")[0] not in {"hubpeer", *(sys.stdlib_module_names - {"sqlite3"})}
]


def test_every_module_has_its_layer():
    modules = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert modules == set(LAYERS)


def test_imports_point_down():
    arrows = {(importer.split(".")[0], [*name.split("."), "__init__"][1]) for importer, name in OURS}
    assert ("peer", "bus") in arrows  # the imports were read at all
    assert sorted((a, b) for a, b in arrows if a != b and LAYERS[a] <= LAYERS[b]) == []


def test_each_foreign_library_has_one_owner():
    assert ("bus.link", "nats") in FOREIGN
    strangers = {(i, n) for i, n in FOREIGN if i.split(".")[0] not in OWNERS.get(n, "").split()}
    assert sorted((i, n) for i, n in strangers if n not in EVERYWHERE) == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("hubpeer.spoke", {*OWNERS} - {"nats"}),  # `pip install hubpeer` alone is enough for a spoke
        ("hubpeer.keywords, hubpeer.agents", {*OWNERS}),  # the pure core needs no bus
        ("hubpeer.peer", {"torch", "transformers", "llguidance", "click", "rich"}),  # torch only where an LLM is configured
    ],
)
def test_importing_loads_only_what_is_needed(module, heavy):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hubpeer" in loaded
    assert heavy & set(loaded) == set()
