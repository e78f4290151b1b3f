"""The core stands alone: no ComfyUI anywhere in it, and the heavy libraries only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parent.parent / "dopsd_core"
FILES = sorted(CORE.rglob("*.py"))
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server", "utils"}
STANDALONE_ONLY = {"diffusers", "transformers", "accelerate"}
METRICS_ONLY = {"transformers", "torchvision", "torchmetrics", "torch_fidelity", "lpips", "open_clip", "timm", "hpsv3"}


def imports(path):
    """(top-level name, whether inside a function) of every absolute import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0], id(node) in lazy


def name_of(path):
    return path.relative_to(CORE).as_posix()


def test_the_lint_sees_the_core():
    assert {"adapters/adapter_set.py", "families/z_image.py", "adapters/lora_file.py"} <= {name_of(p) for p in FILES}
    assert ("peft", True) in set(imports(CORE / "adapters/lora_file.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_are_allowed(path):
    found = set(imports(path))
    names = {name for name, _ in found}
    assert not names & COMFYUI
    assert "dopsd_core" not in names, "the core is imported under other names inside ComfyUI: import relatively"
    in_metrics = name_of(path).startswith("metrics/")
    if not in_metrics:
        assert not names & (METRICS_ONLY - STANDALONE_ONLY)
    assert not {name for name, inside in found if name in METRICS_ONLY and not inside and in_metrics}
    if not name_of(path).startswith("standalone/"):
        lazily = {("transformers", True)} if name_of(path) == "optimizers/adafactor.py" else set()
        forbidden = STANDALONE_ONLY - METRICS_ONLY if in_metrics else STANDALONE_ONLY
        assert {entry for entry in found if entry[0] in forbidden} <= lazily
        allowed = {("peft", True)} if name_of(path) == "adapters/lora_file.py" else set()
        assert {entry for entry in found if entry[0] == "peft"} <= allowed


def test_importing_the_core_loads_none_of_them():
    modules = [
        "adapters.adapter_set",
        "adapters.lora_file",
        "conditioning.encode",
        "families",
        "objectives",
        "rollout",
        "sigmas",
    ]
    forbidden = sorted(STANDALONE_ONLY | COMFYUI | {"peft"})
    code = "\n".join(
        ["import sys", *(f"import dopsd_core.{m}" for m in modules), f"print(sys.modules.keys() & set({forbidden}))"]
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=CORE.parent, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr
