"""The pack as ComfyUI sees it: ids, sockets and texts, its weight on the start, how thin its nodes are.

Saved workflows name nodes by id and fill widgets by position, so the table below only ever grows at the end of a line.
"""

from __future__ import annotations

import ast
import statistics

import pytest
from inprocess import ROOT

# id: (inputs, outputs); "?" marks an input that a graph may lack.
FROZEN = {
    "DOPSD_LoadDataset": (
        "folder:COMBO resolution:INT? trigger:STRING? repeats:INT? caption_dropout:FLOAT? images:IMAGE? texts:STRING?"
        " resolutions:STRING?",
        "dataset:DOPSD_DATASET report:STRING",
    ),
    "DOPSD_CaptionImages": (
        "folder:COMBO clip:CLIP? aim:COMBO? class_word:STRING? trigger:STRING? instruction:STRING? language:COMBO?"
        " max_words:INT?",
        "image:IMAGE report:STRING",
    ),
    "DOPSD_BuildTeacherCondition": (
        "dataset:DOPSD_DATASET clip:CLIP vae:VAE mode:COMBO? preview_prompts:STRING? anchor_prompts:STRING?"
        " vision:DOPSD_VISION? teacher_image:COMBO? teacher_sentence:STRING? regularisation:DOPSD_DATASET?"
        " teacher_background:COMBO?",
        "conditions:DOPSD_CONDITIONS",
    ),
    "DOPSD_TeacherPreview": (
        "model:MODEL conditions:DOPSD_CONDITIONS vae:VAE seed:INT? steps:INT? pictures:INT?",
        "image:IMAGE",
    ),
    "DOPSD_TrainLoRA": (
        "model:MODEL conditions:DOPSD_CONDITIONS run_name:STRING? preset:COMBO? steps:INT? seed:INT? preview_every:INT?"
        " learning_rate:FLOAT? rank:INT? alpha:FLOAT? batch_size:INT? grad_accumulation:INT? warmup:INT?"
        " rollout_steps:INT? grad_steps:INT? loss:COMBO? teacher:COMBO? ema_decay:FLOAT? anchor_probability:FLOAT?"
        " objective:COMBO? schedule:COMBO? optimizer:COMBO? checkpoint_every:INT? probe_every:INT? memory:COMBO?"
        " vae:VAE? initial_lora:LORA_MODEL? targets:STRING? deterministic:BOOLEAN? settings:DOPSD_SETTINGS?",
        "lora:LORA_MODEL loss:LOSS_MAP run_folder:STRING previews:IMAGE best_lora:LORA_MODEL",
    ),
    "DOPSD_TrainingSettings": (
        "model_family:COMBO? preset:COMBO? objective:COMBO? grad_steps:INT? loss:COMBO? anchor_probability:FLOAT?"
        " sft_sigmas:COMBO? sft_shift:FLOAT? adapter:COMBO? targets:STRING? rank:INT? alpha:FLOAT? optimizer:COMBO?"
        " lr:FLOAT? weight_decay:FLOAT? schedule:COMBO? warmup:INT? teacher:COMBO? ema_decay:FLOAT? batch_size:INT?"
        " grad_accumulation:INT? max_grad_norm:FLOAT? rollout_steps:INT? checkpoint_every:INT? keep_checkpoints:INT?"
        " probe_every:INT? probe_pairs:INT? deterministic:BOOLEAN?"
        " states:COMBO? regression_target:COMBO? sft_anchor_probability:FLOAT?"
        " dreambooth_sigmas:COMBO? dreambooth_shift:FLOAT? dreambooth_prior_weight:FLOAT?"
        " dreambooth_class_images:INT? pso_form:COMBO? pso_beta:FLOAT? pso_loser_images:INT?"
        " factor:INT? muon_momentum:FLOAT? prodigy_lr:FLOAT? prodigy_weight_decay:FLOAT? prodigy_d_coef:FLOAT?"
        " prodigy_safeguard_warmup:BOOLEAN? custom_path:STRING? custom_options:STRING? custom_lr:FLOAT?"
        " save_every:INT? keep_loras:INT? stop_at_plateau:INT? small_first:INT? step_draw:COMBO?"
        " activation_offloading:BOOLEAN?",
        "settings:DOPSD_SETTINGS",
    ),
    "DOPSD_FewStepSampler": (
        "model:MODEL positive:CONDITIONING seed:INT? steps:INT? width:INT? height:INT? batch_size:INT? sampler:COMBO?",
        "latent:LATENT sigmas:SIGMAS",
    ),
    "DOPSD_SaveLoRA": (
        "lora:LORA_MODEL filename_prefix:STRING? dtype:COMBO? peft_folder:BOOLEAN? title:STRING? description:STRING?"
        " author:STRING? license:STRING? hub_folder:BOOLEAN? thumbnail:IMAGE?",
        "lora_path:STRING",
    ),
    "DOPSD_CompareLoRA": (
        "model:MODEL clip:CLIP vae:VAE prompts:STRING? strengths:STRING? seed:INT? steps:INT? width:INT? height:INT?"
        " lora_name:COMBO? lora:LORA_MODEL? reference:IMAGE? run_folder:STRING?",
        "image:IMAGE",
    ),
    "DOPSD_LoRAReportCard": (
        "model:MODEL clip:CLIP vae:VAE dataset:DOPSD_DATASET prompts:STRING? strengths:STRING? images_per_prompt:INT?"
        " seed:INT? steps:INT? resolution:INT? class_name:STRING? lora_name:COMBO? dino:COMBO? lpips:COMBO?"
        " clip_score:COMBO? judge_kind:COMBO? lora:LORA_MODEL? conditions:DOPSD_CONDITIONS? judge:CLIP?",
        "image:IMAGE report:STRING",
    ),
    "DOPSD_LoadLoRA": ("lora_name:COMBO", "lora:LORA_MODEL"),
    "DOPSD_LoadDemoModels": ("", "model:MODEL clip:CLIP vae:VAE vision:DOPSD_VISION"),
    "DOPSD_LoadTeacherVision": ("vision_name:COMBO", "vision:DOPSD_VISION"),
}
OUTPUT_NODES = {
    "DOPSD_LoadDataset",
    "DOPSD_CaptionImages",
    "DOPSD_TeacherPreview",
    "DOPSD_TrainLoRA",
    "DOPSD_SaveLoRA",
    "DOPSD_CompareLoRA",
    "DOPSD_LoRAReportCard",
}
HEAVY = {"transformers", "peft", "diffusers", "accelerate"}

each_node = pytest.mark.parametrize("name", FROZEN)


@pytest.fixture
def schema(comfyui, name):
    return comfyui.pack_nodes[name].GET_SCHEMA()


def test_the_nodes_are_these(comfyui):
    assert set(comfyui.pack_nodes) == set(FROZEN)


@each_node
def test_sockets_are_frozen(schema, name):
    inputs = [f"{i.id}:{i.get_io_type()}{'?' if i.optional else ''}" for i in schema.inputs]
    outputs = [f"{o.display_name}:{o.get_io_type()}" for o in schema.outputs]
    assert (" ".join(inputs), " ".join(outputs)) == FROZEN[name]
    assert schema.is_output_node == (name in OUTPUT_NODES)
    assert schema.is_input_list == (name == "DOPSD_LoadDataset")


@each_node
def test_every_text_is_there(schema):
    assert schema.category == "D-OPSD"
    assert schema.description and schema.description.endswith(".")
    said_nothing_about = [part.id for part in [*schema.inputs, *schema.outputs] if not part.tooltip]
    assert not said_nothing_about


def test_the_start_brings_nothing_heavy(comfyui):
    """transformers, which ComfyUI imports itself, would not show here; in the sources it does, see below."""
    assert "peft" not in comfyui.pack_imports and "diffusers" not in comfyui.pack_imports
    assert not [module for module in comfyui.pack_imports if ".dopsd_core.standalone" in module]
    assert [module for module in comfyui.pack_imports if module.endswith(".dopsd_core.config")], "it looks at the pack"


NODE_FILES = sorted((ROOT / "nodes").rglob("*.py"))


@pytest.mark.parametrize("path", NODE_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_node_files_import_nothing_heavy(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & {*HEAVY, "dopsd_core"}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").partition(".")[0] not in {*HEAVY, "dopsd_core"}


def test_a_node_has_the_file_of_its_name_and_none_imports_another():
    ids = {node_id.removeprefix("DOPSD_").lower() for node_id in FROZEN}
    files = {path.stem: path for path in (ROOT / "nodes").glob("*.py") if path.stem != "__init__"}
    assert {stem.replace("_", "") for stem in files} == ids
    for path in files.values():
        imports = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
        near = {(n.module or n.names[0].name).partition(".")[0] for n in imports if n.level == 1}
        assert near <= {"comfy_host"}, f"{path.name} imports {near}"


def test_nodes_are_thin():
    """`execute` parses, calls and wraps."""
    lengths = {}
    for path in (ROOT / "nodes").rglob("*.py"):
        classes = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
        for node in classes:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "execute" and method.end_lineno:
                    lengths[f"{path.name}:{node.name}"] = method.end_lineno - method.lineno + 1
    assert len(lengths) == len(FROZEN)
    assert max(lengths.values()) <= 25, lengths
    assert statistics.median(lengths.values()) <= 10, lengths
