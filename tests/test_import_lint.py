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


def forbidden(file, found):
    """Of the imports `found` in a file of the core, those that it must not have; "dopsd_core" since the core has other
    names inside ComfyUI.
    """
    in_metrics, allowed = file.startswith("metrics/"), set()
    if in_metrics or file == "optimizers/adafactor.py":
        allowed.add(("transformers", True))
    if in_metrics:
        allowed |= {(name, True) for name in METRICS_ONLY}
    if file.startswith("standalone/"):
        allowed |= {(name, inside) for name in STANDALONE_ONLY for inside in (False, True)}
    if file == "adapters/lora_file.py":
        allowed.add(("peft", True))
    nowhere = COMFYUI | STANDALONE_ONLY | METRICS_ONLY | {"dopsd_core", "peft"}
    return {entry for entry in found if entry[0] in nowhere} - allowed


@pytest.mark.parametrize(
    ("file", "name", "inside", "wrong"),
    [
        ("rollout.py", "comfy", True, True),
        ("standalone/cli.py", "comfy", True, True),
        ("rollout.py", "dopsd_core", False, True),
        ("rollout.py", "transformers", True, True),
        ("standalone/cli.py", "transformers", False, False),
        ("standalone/cli.py", "lpips", True, True),
        ("metrics/fid.py", "torchmetrics", True, False),
        ("metrics/fid.py", "torchmetrics", False, True),
        ("metrics/fid.py", "diffusers", True, True),
        ("optimizers/adafactor.py", "transformers", False, True),
        ("adapters/lora_file.py", "peft", True, False),
        ("adapters/lora_weights.py", "peft", True, True),
        ("rollout.py", "torch", False, False),
    ],
)
def test_what_is_forbidden(file, name, inside, wrong):
    assert bool(forbidden(file, {(name, inside)})) == wrong


def test_imports_are_allowed():
    found = {name_of(path): forbidden(name_of(path), set(imports(path))) for path in FILES}
    assert not {file: imported for file, imported in found.items() if imported}


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
