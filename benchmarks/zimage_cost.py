"""Cost of a D-OPSD step on Z-Image at its real size with random weights: time, peak memory, FLOPs.

    python -m benchmarks.zimage_cost                                            on CUDA: everything, about 6 minutes
    python -m benchmarks.zimage_cost --device cpu --layers 2 --heads 8 --rollout-steps 2 --resolutions 256 --steps 1
                                                                                reduced in size, a minute or two

Variants: ours with no block recomputing, with all of them, and (ComfyUI only) under each memory preset; and a plain
re-statement of the authors' loop: the graphs of all K steps alive until one backward, all blocks recomputing, two
language models and a vision tower of the real shapes resident and run in every step. Their VAE is left out, which is
in their favour. Network: ComfyUI's own class behind our node's denoiser where $COMFYUI_PATH (or ~/comfy/ComfyUI) is a
checkout, else diffusers'. On a CPU the peak is that of tensors, counted op by op, and FLOPs are counted too.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import StepCost, pass_cost
from benchmarks.counters import LiveBytes
from dopsd_core.adapters import AdapterSet
from dopsd_core.checkpointing import checkpointed
from dopsd_core.conditioning import Condition, DualCondition
from dopsd_core.config import TrainConfig
from dopsd_core.families import Z_IMAGE
from dopsd_core.objectives import DOPSD, ObjectiveInputs, self_distillation_loss
from dopsd_core.optimizer import make_optimizer
from dopsd_core.rollout import rollout

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
GB = 1e9
STUDENT_TOKENS = 64
TARGETS = {
    ("none", 1024): "H200: <= 1.5 s",
    ("all", 1024): "H200: <= 2.0 s; steps/s >= 1.5 x the authors', peak <= half of theirs",
    ("24 GB", 1024): "< 20 GB",
    ("16 GB", 1024): "< 15 GB",
    ("12 GB", 768): "< 11.5 GB",
    ("8 GB", 512): "< 7.6 GB",
}
PRESET_RUNS = (("24 GB", 1024, 64, False), ("16 GB", 1024, 64, True), ("12 GB", 768, 32, True), ("8 GB", 512, 16, True))
"""Preset, resolution, rank, and whether the base is in fp8, as docs/cost.md plans them."""


@dataclass
class Row:
    """One line of the table. peak_gb: weights included. utilisation: model FLOPs (no recompute) per second over the
    rate of a large bf16 (on a CPU: fp32) matrix product measured in this run. counted: FLOPs by torch's counter over
    those of the cost model."""

    variant: str
    resolution: int
    rank: int
    seconds: float
    peak_gb: float
    recompute: int
    tflop: float
    utilisation: float
    counted: float | None = None
    planned_gb: float | None = None
    note: str = ""
    target: str = ""


def attention_flop(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Scores and values, from the shapes [B, H, L, D]."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def attention_backward_flop(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    """Five products where the forward has two."""
    return 5 * attention_flop(query, key) // 2


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}
"""torch's own counter leaves these two out."""


# -- the network ------------------------------------------------------------------------------------------------------


def fill(module: nn.Module) -> nn.Module:
    """Random values in place, of a size that keeps activations near 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dtype == torch.float8_e4m3fn:
                parameter.copy_(torch.randn(parameter.shape, device=parameter.device).mul_(parameter.shape[1] ** -0.5))
            elif parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0)
    return module


class Network:
    """A random Z-Image of `layers` main blocks and width 128 * `heads` behind a Denoiser."""

    denoiser: Any
    memory: Any = None
    title: str

    def trainable(self, shape: Sequence[int], reserve: int = 0) -> AbstractContextManager[Any]:
        """Ready for gradients, inside the `with`."""
        return nullcontext()

    @property
    def weight_bytes(self) -> int:
        """Of the network."""
        return sum(p.numel() * p.itemsize for p in self.parameters())

    def parameters(self) -> list[Tensor]:
        """Of the network."""
        raise NotImplementedError


class ComfyNetwork(Network):
    """ComfyUI's class and the denoiser of our training node."""

    title = "ComfyUI"

    def __init__(self, layers: int, heads: int, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> None:
        pack = comfyui_pack(device)
        supported, patcher = (importlib.import_module(f"comfy.{n}") for n in ("supported_models", "model_patcher"))
        config = supported.ZImage(
            {
                "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 128 * heads, "cap_feat_dim": 2560,
                "n_layers": layers, "n_refiner_layers": 2, "qk_norm": True, "n_heads": heads, "n_kv_heads": heads,
                "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
                "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
                "pad_tokens_multiple": 32,
            }
        )  # fmt: skip
        config.set_inference_dtype(torch.float8_e4m3fn if fp8 else dtype, dtype if fp8 else None)
        with torch.inference_mode():  # as a loader node does it
            model = config.get_model({}, "", device=torch.device("cpu") if fp8 else device)
            fill(model.diffusion_model)
        self.model = patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
        self.denoiser = pack("host").ComfyDenoiser(self.model)
        try:
            self.memory = pack("memory")
        except ImportError as error:
            sys.stderr.write(f"presets are left out: {error}\n")

    def trainable(self, shape: Sequence[int], reserve: int = 0) -> AbstractContextManager[Any]:
        return self.denoiser.trainable(shape, reserve)

    def parameters(self) -> list[Tensor]:
        return list(self.model.model.diffusion_model.parameters())


class DiffusersNetwork(Network):
    """diffusers' class, for where there is no ComfyUI."""

    title = "diffusers"

    def __init__(self, layers: int, heads: int, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

        from dopsd_core.standalone.host import StandaloneDenoiser

        class InDtype(StandaloneDenoiser):
            def predict_x0(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
                t = torch.full((len(x),), 1.0 - sigma, device=x.device)
                features = [c.features.to(x.device, dtype) for c in conditions]
                out = self.transformer(list(x.to(dtype).unsqueeze(2).unbind(0)), t, features, return_dict=False)[0]
                return x + sigma * torch.stack(list(out)).squeeze(2).float()

        with torch.device(device):
            net = ZImageTransformer2DModel(n_layers=layers, dim=128 * heads, n_heads=heads, n_kv_heads=heads)
        nn.Module.to(net, dtype)
        fill(net)
        self.denoiser = InDtype(net)

    def parameters(self) -> list[Tensor]:
        return list(self.denoiser.transformer.parameters())


def comfyui_pack(device: torch.device) -> Callable[[str], Any]:
    """name -> module of our `nodes` folder, without ComfyUI's server and without registering any node."""
    if "dopsd_pack" not in sys.modules:
        sys.path.insert(0, str(COMFYUI))
        importlib.import_module("comfy.options")
        args = importlib.import_module("comfy.cli_args").args
        args.cpu = device.type == "cpu"
        sys.modules.setdefault("server", types.SimpleNamespace(PromptServer=None))  # type: ignore[arg-type]
        for name, path in (("dopsd_pack", ROOT), ("dopsd_pack.nodes", ROOT / "nodes")):
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
    return lambda name: importlib.import_module(f"dopsd_pack.nodes.{name}")


# -- what the authors keep beside it ----------------------------------------------------------------------------------


class EncoderBlock(nn.Module):
    """A block of a language model or of a vision tower: attention with shared keys, gated MLP."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int, head: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head, self.causal = heads, kv_heads, head, causal
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head, bias=False)
        self.out = nn.Linear(heads * head, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> the same shape."""
        h = F.rms_norm(x, x.shape[-1:])
        parts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(h).unflatten(-1, (-1, self.head)).transpose(1, 2).split(parts, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, value = self.up(F.rms_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class AuthorsEncoders(nn.Module):
    """Qwen3-4B twice (prompt; prompt and image, under swapped weights) and Qwen3-VL's vision tower, by shape."""

    def __init__(self, device: torch.device, dtype: torch.dtype, layers: int) -> None:
        super().__init__()
        with torch.device(device):
            words = 151_936 if layers == 36 else 1000
            self.embed = nn.ModuleList(nn.Embedding(words, 2560) for _ in range(2)).to(dtype)
            language = [[EncoderBlock(2560, 32, 8, 9728, 128, True).to(dtype) for _ in range(layers)] for _ in range(2)]
            tower = [EncoderBlock(1024, 16, 16, 2731, 64, False).to(dtype) for _ in range(24 * layers // 36)]
        self.language = nn.ModuleList(nn.Sequential(*blocks) for blocks in language)
        self.tower = nn.Sequential(*tower)
        fill(self).requires_grad_(False)

    @torch.no_grad()
    def forward(self, image_tokens: int, text_tokens: int) -> tuple[Tensor, Tensor]:
        """Features [64, 2560] of the prompt, and [L, 2560] of prompt and image. Patches are 4 to an image token."""
        first = next(self.embed.parameters())
        ids = torch.arange(text_tokens, device=first.device) % len(first)
        student = self.language[0](self.embed[0](ids)[None])[0]
        seen = self.tower(torch.randn(1, 4 * image_tokens, 1024, device=first.device, dtype=first.dtype))
        seen = seen[0, ::4].repeat(1, 3)[:, :2560]
        both = torch.cat([seen, self.embed[1](ids)])
        return student.float(), self.language[1](both[None])[0].float()


# -- steps ------------------------------------------------------------------------------------------------------------


class Bench:
    """A network with a LoRA, one pair of a resolution, and the two kinds of step."""

    def __init__(self, network: Network, resolution: int, rank: int, config: TrainConfig, device: torch.device) -> None:
        self.network, self.config, self.device = network, config, device
        self.resolution, self.rank = resolution, rank
        self.shape = (1, *Z_IMAGE.latent_shape(resolution, resolution))
        side = min(max(resolution, 512), 768) // 32  # what the vision tower sees
        self.vision_tokens = side * side
        self.teacher_tokens = self.vision_tokens + STUDENT_TOKENS + 6
        generator = torch.Generator().manual_seed(0)
        lengths = (STUDENT_TOKENS, self.teacher_tokens)
        student, teacher = (Condition(torch.randn(n, 2560, generator=generator).to(device)) for n in lengths)
        self.pair = DualCondition(student, teacher, torch.zeros(self.shape[1:]), "caption", "key")
        self.noise = torch.randn(self.shape, generator=generator).to(device)
        self.sigmas = Z_IMAGE.sigmas(config.rollout_steps, resolution, resolution)
        self.adapters = AdapterSet(
            network.denoiser.sites(), config.lora, device=device, teacher=config.teacher, ema_decay=config.ema_decay
        )
        self.optimizer = make_optimizer(config, self.adapters.parameters())

    def inputs(self, pair: DualCondition) -> ObjectiveInputs:
        generator = torch.Generator().manual_seed(0)
        return ObjectiveInputs(self.network.denoiser, self.adapters, [pair], self.noise, self.sigmas, generator)

    def ours(self) -> None:
        """As run.py makes it, its checks and log aside."""
        self.optimizer.zero_grad(set_to_none=True)
        DOPSD(grad_steps=self.config.grad_steps).backward(self.inputs(self.pair))
        self.finish()

    def authors(self, encoders: AuthorsEncoders) -> None:
        """Encode, K student and teacher forwards, one backward over the mean."""
        self.optimizer.zero_grad(set_to_none=True)
        denoiser, adapters = self.network.denoiser, self.adapters
        student, teacher = (Condition(f) for f in encoders(self.vision_tokens, STUDENT_TOKENS))
        losses = []
        predict = lambda x, sigma: denoiser.predict_x0(x, sigma, [student])  # noqa: E731
        for state in rollout(predict, self.noise, self.sigmas, grad_steps=range(len(self.sigmas))):
            with adapters.use("teacher"), torch.no_grad():
                target = denoiser.predict_x0(state.x, state.sigma, [teacher])
            losses.append(self_distillation_loss(state.x0, target, state.sigma))
        torch.stack(losses).mean().backward()
        self.finish()

    def finish(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
        self.optimizer.step()
        self.adapters.update_teacher()

    def cost(self, checkpoint_blocks: int) -> StepCost:
        image = Z_IMAGE.image_tokens(*self.shape[2:])
        student, teacher = (
            pass_cost(self.network.denoiser, Z_IMAGE, self.config.lora, image, n)
            for n in (STUDENT_TOKENS, self.teacher_tokens)
        )
        k = self.config.rollout_steps
        m = self.config.grad_steps or k
        return StepCost(student, teacher, k, m, checkpoint_blocks, self.config.teacher == "ema")

    def measure(
        self,
        variant: str,
        count: int,
        steps: int,
        rate: float,
        step: Callable[[], None],
        reserve: int = 0,
        beside: int = 0,
    ) -> Row:
        """Median of `steps` after one that is not counted; peak over all of them. beside: bytes that are resident."""
        cost, seconds = self.cost(count), []
        row = Row(variant, self.resolution, self.rank, 0.0, 0.0, count, cost.flops / 1e12, 0.0)
        row.target = TARGETS.get((variant, self.resolution), "")
        blocks = self.network.denoiser.blocks()
        on_gpu = self.device.type == "cuda"
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self.network.trainable(self.shape, reserve),
            self.adapters.attached(),
            checkpointed(blocks, count),
        ):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                step()  # warm-up
            else:
                row.peak_gb, row.counted = self.count(step, cost, beside)
            for _ in range(steps):
                began = time.perf_counter()
                step()
                if on_gpu:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            if on_gpu:
                row.peak_gb = torch.cuda.max_memory_allocated() / GB
        row.seconds = sorted(seconds)[len(seconds) // 2]
        row.utilisation = cost.model_flops / row.seconds / rate
        return row

    def count(self, step: Callable[[], None], cost: StepCost, beside: int) -> tuple[float, float]:
        """(peak GB, FLOPs over the model's) of the first two steps, with what was there before added."""
        with LiveBytes() as live:
            step()
        owned = [*self.adapters.parameters(), *self.adapters.state("teacher").values()]  # the moments are new
        there = beside + self.network.weight_bytes + sum(tensor.numel() * tensor.itemsize for tensor in owned)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            step()
        return (live.peak + there) / GB, counter.get_total_flops() / cost.flops


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product of random numbers."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


# -- the run ----------------------------------------------------------------------------------------------------------


class Session:
    """Device, options and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rate = matmul_rate(self.device, self.dtype)
        self.rows: list[Row] = []
        lora = Z_IMAGE.lora_config(args.rank)
        self.config = TrainConfig(lora=lora, rollout_steps=args.rollout_steps, anchor_probability=0.0)

    def add(self, make: Callable[[], Row], variant: str, side: int, rank: int) -> None:
        """Makes a row and prints it; running out of memory is a row too."""
        try:
            row = make()
        except torch.OutOfMemoryError:
            row = Row(variant, side, rank, 0, 0, 0, 0, 0, note="out of memory", target=TARGETS.get((variant, side), ""))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        say(line(row))

    def new_network(self, fp8: bool = False) -> Network:
        wanted = self.args.host
        if wanted == "comfyui" or (wanted == "auto" and (COMFYUI / "main.py").exists()):
            return ComfyNetwork(self.args.layers, self.args.heads, self.device, self.dtype, fp8)
        return DiffusersNetwork(self.args.layers, self.args.heads, self.device, self.dtype)

    def ours(self, network: Network, variant: str, count: int, side: int) -> Row:
        bench = Bench(network, side, self.args.rank, self.config, self.device)
        return bench.measure(variant, count, self.args.steps, self.rate, bench.ours)

    def authors(self, network: Network, encoders: AuthorsEncoders, side: int) -> Row:
        bench = Bench(network, side, self.args.rank, self.config, self.device)
        size = sum(p.numel() * p.itemsize for p in encoders.parameters())
        blocks = len(network.denoiser.blocks())
        row = bench.measure("authors", blocks, self.args.steps, self.rate, lambda: bench.authors(encoders), beside=size)
        row.counted = None  # their encoders are not in the cost model
        return row

    def preset(self, name: str, side: int, rank: int, fp8: bool) -> Row:
        """Planned by the node's own planner, on a card that it takes to be as large as this one."""
        network = self.new_network(fp8)
        memory: Any = network.memory
        config = replace(self.config, lora=Z_IMAGE.lora_config(rank))
        bench = Bench(network, side, rank, config, torch.device("cpu"))
        data = types.SimpleNamespace(pairs=[bench.pair], anchors=())
        conditions = types.SimpleNamespace(data=data, family=Z_IMAGE)
        free = torch.cuda.mem_get_info()[0]
        budget = memory.MEMORY_PRESETS[name].budget
        plan = memory.make_plan(name, network.denoiser, conditions, config, budget, free)
        bench = Bench(network, side, rank, plan.config, self.device)
        reserve = plan.reserve
        count, steps = plan.checkpoint_blocks, self.args.steps
        row = bench.measure(name, count, steps, self.rate, bench.ours, reserve=reserve)
        row.planned_gb, row.note = plan.peak / GB, f"; {'fp8' if fp8 else 'bf16'} base"
        return row


def run(args: argparse.Namespace) -> list[Row]:
    session = Session(args)
    describe(session)
    network = session.new_network()
    blocks = len(network.denoiser.blocks())
    say(f"network: {network.title}'s, {network.weight_bytes / GB:.2f} GB of weights, {blocks} blocks\n\n")
    say("| variant | side | rank | s/step | peak GB | recompute | TFLOP | utilisation | counted | target |\n")
    say("|---|---|---|---|---|---|---|---|---|---|\n")
    for side in args.resolutions:
        for variant, count in (("none", 0), ("all", blocks)):
            session.add(partial(session.ours, network, variant, count, side), variant, side, args.rank)
    if args.baseline:
        encoders = AuthorsEncoders(session.device, session.dtype, args.encoder_layers)
        for side in args.resolutions:
            session.add(partial(session.authors, network, encoders, side), "authors", side, args.rank)
        del encoders
        compare(session.rows)
    presets = args.presets and session.device.type == "cuda" and network.memory is not None
    del network
    gc.collect()
    if presets:
        for name, side, rank, fp8 in PRESET_RUNS:
            session.add(partial(session.preset, name, side, rank, fp8), name, side, rank)
    return session.rows


def describe(session: Session) -> None:
    """Date, machine, versions and options."""
    name = platform.processor() or platform.machine()
    if session.device.type == "cuda":
        name = torch.cuda.get_device_name()
    args = session.args
    say(f"{date.today()}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {session.dtype}\n")
    say(f"{args.layers} layers of 30, width {128 * args.heads} of 3840, K = {args.rollout_steps}, batch 1, ")
    say(f"{args.steps} steps timed; ")
    say(f"matrix products run at {session.rate / 1e12:.2f} TFLOP/s\n")


def compare(rows: Sequence[Row]) -> None:
    """The authors' loop over ours, per resolution."""
    timed = {(row.variant, row.resolution): row for row in rows if row.seconds}
    say("\n")
    for (variant, side), theirs in timed.items():
        for name in ("none", "all"):
            ours = timed.get((name, side))
            if variant == "authors" and ours is not None:
                say(f"{side}, {name} recomputing: {theirs.seconds / ours.seconds:.2f} x the authors' steps/s, ")
                say(f"{ours.peak_gb / theirs.peak_gb:.2f} of their peak memory\n")
    say("\n")


def line(row: Row) -> str:
    if row.note == "out of memory":
        return f"| {row.variant} | {row.resolution} | {row.rank} | out of memory | | | | | | {row.target} |\n"
    counted = "" if row.counted is None else f"{row.counted:.3f}"
    planned = "" if row.planned_gb is None else f" (planned {row.planned_gb:.1f})"
    return (
        f"| {row.variant} | {row.resolution} | {row.rank} | {row.seconds:.3f} | {row.peak_gb:.2f}{planned} | "
        f"{row.recompute} | {row.tflop:.2f} | {row.utilisation:.0%} | {counted} | {row.target}{row.note} |\n"
    )


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--host", default="auto", choices=("auto", "comfyui", "diffusers"))
    parser.add_argument("--layers", type=int, default=30, help="main blocks; the real model has 30")
    parser.add_argument("--heads", type=int, default=30, help="of 128; the real model has 30")
    parser.add_argument("--encoder-layers", type=int, help="of the authors' language models, 36 (with --layers 30)")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rollout-steps", type=int, default=4, help="K")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True, help="the authors' loop")
    parser.add_argument("--presets", action=argparse.BooleanOptionalAction, default=True, help="memory presets (CUDA)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows for a program")
    args = parser.parse_args()
    args.encoder_layers = args.encoder_layers or max(1, 36 * args.layers // 30)
    rows = run(args)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
