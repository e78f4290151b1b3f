"""Real ComfyUI inside the test process: its loading of custom nodes, its validation, its executor; no sockets."""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.metadata
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from runs import Event, Run, status_of, text_event

ROOT = Path(__file__).resolve().parents[2]
PACK = "ComfyUI-DOPSD"
CHECKOUT = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
ON_CPU = os.environ.get("DOPSD_TEST_GPU", "") in ("", "0")
ON_CARD = not ON_CPU and "PRETEND_CUDA" not in os.environ
"""On a real GPU, where attention adds up its gradients in any order: no bits are the same twice."""
FLAGS = (*(["--cpu"] if ON_CPU else []), *os.environ.get("DOPSD_TEST_FLAGS", "").split())
"""Of ComfyUI, here and for servers."""

# ComfyUI starts without these; the light environment of the tests leaves them out.
NOT_NEEDED = re.compile(r"comfyui-workflow-templates.*|comfyui-embedded-docs.*|comfy-angle|pyopengl.*", re.IGNORECASE)


def why_not() -> str:
    """Why nothing here can run, in one line that says what to do; "" when all is there."""
    if not (CHECKOUT / "main.py").exists():
        return f"THE PACK WAS NOT TESTED: no ComfyUI at {CHECKOUT}, set COMFYUI_PATH to a checkout of it"
    if missing := missing_needs():
        names = ", ".join(missing)
        return f"THE PACK WAS NOT TESTED: this Python lacks what ComfyUI needs ({names}), run `make comfyui`"
    return ""


def missing_needs() -> list[str]:
    """The lines of its requirements that are not installed, or in another version than the exact one they ask for."""
    lines = (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [m for line in lines if (m := re.match(r"([\w.-]+)(?:==([\w.]+))?", line))]
    return [m.group() for m in found if not NOT_NEEDED.fullmatch(m[1]) and not is_installed(m[1], m[2])]


def is_installed(name: str, version: str | None) -> bool:
    try:
        return importlib.metadata.version(name) == (version or importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def put_first_on_path() -> None:
    """ComfyUI's checkout before everything, ours nowhere: its `nodes` is a module, ours a folder beside it."""
    ours = {"", ".", str(ROOT), os.getcwd()} - {str(CHECKOUT)}
    sys.path[:] = [str(CHECKOUT), *(p for p in sys.path if p not in ours and p != str(CHECKOUT))]


def new_base(folder: Path) -> Path:
    """A base directory of ComfyUI's with this checkout as its only custom node."""
    for name in ("custom_nodes", "input", "output", "temp", "models", "user/default"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "custom_nodes" / PACK
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(ROOT, link, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "runs"))
    return folder


class ComfyUI:
    """The `comfyui` fixture. One per process: ComfyUI keeps its state in modules."""

    def __init__(self, base: Path) -> None:
        self.base, self.input, self.output, self.temp = base, base / "input", base / "output", base / "temp"
        self.root = ROOT
        # A thread of its own as in the server (inference mode is per thread), and free of playwright's event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompt_worker")
        self._thread.submit(self._boot).result()

    def _boot(self) -> None:
        importlib.import_module("comfy.options")
        cli = importlib.import_module("comfy.cli_args")
        args = cli.args
        plain, chosen = (vars(cli.parser.parse_args(flags)) for flags in ((), FLAGS))
        vars(args).update({name: value for name, value in chosen.items() if value != plain[name]})
        args.base_directory, args.database_url = str(self.base), "sqlite:///:memory:"
        args.disable_api_nodes = True
        importlib.import_module("torch").set_num_threads(1)
        if is_dynamic := not ON_CPU and cli.enables_dynamic_vram():
            importlib.import_module("comfy_aimdo.control").init()  # its other modules take the library at their import
        # server first: loading custom nodes puts comfy/ on sys.path, where comfy/utils.py hides the utils package
        server = importlib.import_module("server")
        self.nodes = importlib.import_module("nodes")
        self.execution = importlib.import_module("execution")
        paths = importlib.import_module("folder_paths")
        paths.add_model_folder_path("loras", str(self.output / "loras"))  # as main.py does
        if is_dynamic:
            _begin_dynamic_vram()
        _read_tokenizers_once()
        self.server = self._recording(server.PromptServer)(asyncio.new_event_loop())
        self.server.sockets_metadata["tests"] = {"feature_flags": {"supports_preview_metadata": True}}
        importlib.import_module("comfy.utils").set_progress_bar_global_hook(self._on_progress_bar)
        self._load_nodes()
        self._executor: Any = None
        self._events: list[Event] = []
        self._on_event: Callable[[Event], None] | None = None

    def _load_nodes(self) -> None:
        asyncio.run(self.nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        handler, before, started = _Lines(), set(sys.modules), time.perf_counter()
        logging.getLogger().addHandler(handler)
        asyncio.run(self.nodes.init_external_custom_nodes())
        logging.getLogger().removeHandler(handler)
        self.pack_seconds = time.perf_counter() - started
        self.pack_imports = set(sys.modules) - before  # names of all modules that came with the pack
        if not self.pack_nodes:
            raise RuntimeError("ComfyUI did not load the pack:\n" + "\n".join(handler.lines[-20:]))

    @property
    def pack_nodes(self) -> dict[str, Any]:
        """Our node classes by id, as ComfyUI registered them."""
        ours = f"custom_nodes.{PACK}"
        mappings = self.nodes.NODE_CLASS_MAPPINGS
        return {key: node for key, node in mappings.items() if getattr(node, "RELATIVE_PYTHON_MODULE", "") == ours}

    def module(self, name: str) -> ModuleType:
        """A module of the pack under the name ComfyUI gave it: module("nodes.comfy_host.denoiser")."""
        package = str(self.base / "custom_nodes" / PACK).replace(".", "_x_")
        return importlib.import_module(f"{package}.{name}" if name else package)

    def core(self, name: str) -> ModuleType:
        """The core as the pack sees it: core("families"). Do not import a second copy beside it."""
        return self.module(f"dopsd_core.{name}")

    def execute(
        self,
        graph: dict,
        *,
        on_event: Callable[[Event], None] | None = None,
        extra: dict | None = None,
        keep_cache: bool = False,
    ) -> Run:
        """Validate and run an API graph. `keep_cache` leaves what earlier runs computed, as a server would.

        `on_event` is called in the executor's thread, while the node waits.
        """
        return self._thread.submit(self._execute, graph, on_event, extra or {}, keep_cache).result()

    def call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """A plain call in the executor's thread."""
        return self._thread.submit(function, *args, **kwargs).result()

    def interrupt(self) -> None:
        """What POST /interrupt does."""
        self.nodes.interrupt_processing()

    def _execute(self, graph: dict, on_event: Any, extra: dict, keep_cache: bool) -> Run:
        prompt_id = str(uuid.uuid4())
        valid, error, wanted, node_errors = asyncio.run(self.execution.validate_prompt(prompt_id, graph, None))
        if not valid:
            return Run(prompt_id, "refused", refusal={"error": error, "node_errors": node_errors})
        if self._executor is None or not keep_cache:
            kind, no_limits = self.execution.CacheType.CLASSIC, {"lru": 0, "ram": 0, "ram_inactive": 0}
            self._executor = self.execution.PromptExecutor(self.server, cache_type=kind, cache_args=no_limits)
        self._events, self._on_event = [], on_event
        self.server.last_prompt_id = prompt_id
        executor = self._executor
        executor.execute(graph, prompt_id, {"client_id": "tests", **extra}, wanted)
        messages = executor.status_messages
        return Run(
            prompt_id,
            status_of(executor.success, messages),
            executor.history_result["outputs"],
            messages,
            self._events,
            values=asyncio.run(self._values(list(graph))),
        )

    async def _values(self, nodes: list[str]) -> dict[str, list[list]]:
        entries = {node: await self._executor.caches.outputs.get(node) for node in nodes}
        return {node: entry.outputs for node, entry in entries.items() if entry is not None}

    def _recording(self, prompt_server: type) -> type:
        """The real PromptServer, which tells us instead of a socket."""

        def send_sync(server: Any, event: Any, data: Any, sid: str | None = None) -> None:
            self._tell(event, data)

        return type("PromptServer", (prompt_server,), {"send_sync": send_sync})

    def _tell(self, event: Any, data: Any) -> None:
        if event == 3:  # a text
            sent = text_event(data)
        elif event == 4:  # an image and its node
            sent = Event("preview", {**data[1], "image": data[0][1]}, time.monotonic())
        else:
            sent = Event(event, data, time.monotonic())
        self._events.append(sent)
        if self._on_event is not None:
            self._on_event(sent)

    def _on_progress_bar(self, value: float, total: float, preview: Any, prompt_id: Any = None, node_id: Any = None):
        """main.py's hook of comfy.utils.ProgressBar, which checks for an interrupt."""
        importlib.import_module("comfy.model_management").throw_exception_if_processing_interrupted()
        context = importlib.import_module("comfy_execution.utils").get_executing_context()
        prompt_id, node_id = prompt_id or context.prompt_id, node_id or context.node_id
        progress = importlib.import_module("comfy_execution.progress").get_progress_state()
        progress.update_progress(node_id, value, total, preview)
        self._tell("progress", {"value": value, "max": total, "prompt_id": prompt_id, "node": node_id})

    def close(self) -> None:
        self._thread.shutdown()


def _begin_dynamic_vram() -> None:
    """As main.py does on NVIDIA's cards."""
    control = importlib.import_module("comfy_aimdo.control")
    devices = importlib.import_module("comfy.model_management").get_all_torch_devices()
    if not (control.init() and control.init_devices([device.index for device in devices])):
        raise RuntimeError("comfy-aimdo does not start here; set DOPSD_TEST_FLAGS=--disable-dynamic-vram")
    patcher: Any = importlib.import_module("comfy.model_patcher")
    memory: Any = importlib.import_module("comfy.memory_management")
    patcher.CoreModelPatcher, memory.aimdo_enabled = patcher.ModelPatcherDynamic, True


def _read_tokenizers_once() -> None:
    """Qwen's vocabulary of 152k tokens takes a second for every text encoder, a quarter of the time of these tests.

    Each encoder still has an object of its own; what they share, the vocabulary and the merges, nobody writes to.
    """
    tokenizer: Any = importlib.import_module("transformers").Qwen2Tokenizer
    from_pretrained, read = tokenizer.from_pretrained, {}

    def from_memory(path: str, **kwargs: Any) -> Any:
        key = (str(path), repr(kwargs))
        if key not in read:
            read[key] = from_pretrained(path, **kwargs)
            vocabulary = read[key].get_vocab()
            read[key].get_vocab = lambda: vocabulary
        return copy.copy(read[key])

    tokenizer.from_pretrained = from_memory


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
