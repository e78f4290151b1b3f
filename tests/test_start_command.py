"""`train --initial-lora`: starts from a LoRA file, refused before anything is encoded where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dopsd_core.__main__ import main
from dopsd_core.adapters.lora_file import read_safetensors
from dopsd_core.demo.concept import make_concept, write_dataset
from dopsd_core.training import training_set

SHORT = ("--warmup", "0", "--probe-every", "0", "--batch-size", "1", "--track", "none", "--preview-every", "0")


def words(place: Path, output: str, *more: str) -> list[str]:
    return ["train", str(place / "photos"), "--output", str(place / output), "--trigger", "[V7]", *SHORT, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, and run/ of a step on them with rank 2."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    write_dataset(make_concept(0), folder / "photos")
    assert main(words(folder, "run", "--steps", "3", "--rank", "2", "--anchor-probability", "0")) == 0
    return folder


def test_a_run_starts_from_the_file_and_resumes_only_with_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a learning rate of next to nothing the second LoRA is the first, filled up to its own rank."""
    file = place / "run" / "lora.safetensors"
    rest = ("--steps", "1", "--rank", "4", "--lr", "1e-12", "--trigger", "[E6]")
    capsys.readouterr()
    assert main([*words(place, "second", *rest), "--initial-lora", str(file)]) == 0
    assert "initial_lora was trained with the trigger '[V7]', the dataset's is '[E6]'" in capsys.readouterr().out
    first, second = read_safetensors(file)[0], read_safetensors(place / "second" / "lora.safetensors")[0]

    def effect(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()

    names = [key.removesuffix(".lora_A.weight") for key in first if key.endswith(".lora_A.weight")]
    assert any(effect(first, name).any() for name in names)
    for name in names:
        torch.testing.assert_close(effect(second, name), effect(first, name), rtol=1e-2, atol=1e-6)
    assert main(words(place, "second", *rest)) == 1
    assert "undo what changed: the LoRA that it started from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("adapter", "file", "message"),
    [
        ("lora", "nothing.safetensors", "nothing.safetensors does not exist: give the LoRA file"),
        ("lora", "photos/target_1.png", "target_1.png"),
        (
            "lora --rank 1",
            "run/lora.safetensors",
            "the LoRA to start from has rank 2, the run has rank 1; set rank to 2",
        ),
        ("dora", "run/lora.safetensors", "run/lora.safetensors: the LoRA to start from"),
        ("lokr", "run/lora.safetensors", "run/lora.safetensors: the LoRA to start from"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_encoding(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
    file: str,
    message: str,
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the dataset was encoded")

    monkeypatch.setattr(training_set, "encode_dataset", refuse)
    given = ("--steps", "1", "--adapter", *adapter.split(), "--initial-lora", str(place / file))
    assert main(words(place, "third", *given)) == 1
    assert message in capsys.readouterr().err and not (place / "third").exists()
