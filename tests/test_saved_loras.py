"""LoRA files along the way: which are written and kept, what is in them, and which step is the best."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd_core.adapters.lora_file import read_safetensors
from dopsd_core.config import changes_that_forbid_resuming
from dopsd_core.files import disk
from dopsd_core.files.disk import DiskError
from dopsd_core.training.log import StepReport
from dopsd_core.training.run_folder import LORA_NAME, RunFolder, check_run_folder
from dopsd_core.training.saved_loras import lora_of_step, most_files, saved_loras, superfluous
from dopsd_core.training.trainer import NoCallbacks, TrainResult, train
from dopsd_core.training.unseen_gap import NO_BETTER, BestStep, best_step, measured
from tests.tiny import TinyDenoiser, make_config, make_data, make_pair


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class StopAt(NoCallbacks):
    """Stops after a step; remembers what was the best on the way."""

    def __init__(self, step: int = 10**9) -> None:
        self.last, self.step, self.best = step, 0, list[BestStep]()

    def on_step(self, report: StepReport) -> None:
        self.step = report.step

    def on_best(self, best: BestStep) -> None:
        assert best.path is None or best.path.exists()
        self.best.append(best)

    def should_stop(self) -> bool:
        return self.step >= self.last


def trained(
    folder: Path, callbacks: NoCallbacks | None = None, heldout: int | None = 99, **options: Any
) -> TrainResult:
    data = make_data(3, heldout=None if heldout is None else make_pair(heldout))
    return train(make_config(**options), TinyDenoiser(), data, folder, callbacks)


def steps_in(folder: Path) -> list[int]:
    return [saved.step for saved in saved_loras(folder)]


# -- which files -------------------------------------------------------------------------------------------------------


def test_one_per_so_many_steps_and_one_of_the_last(tmp_path: Path) -> None:
    trained(tmp_path, save_every=5)
    assert sorted(path.name for path in (tmp_path / "loras").iterdir()) == [
        "step-000005.safetensors", "step-000010.safetensors", "step-000012.safetensors",
    ]  # fmt: skip


def test_none_unless_asked_for(tmp_path: Path) -> None:
    trained(tmp_path)
    assert not (tmp_path / "loras").exists() and saved_loras(tmp_path) == []


@pytest.mark.parametrize(
    ("steps", "keep", "best", "gone"),
    [
        ([1, 2, 3, 4], 0, set(), set()),
        ([1, 2, 3, 4], 2, set(), {1, 2}),
        ([1, 2, 3, 4], 2, {1}, {2}),
        ([1, 2, 3, 4], 1, {1, 3}, {2}),
        ([1, 2, 3, 4], 2, {4}, {1, 2}),
        ([1, 2], 5, set(), set()),
        ([], 1, set(), set()),
    ],
)
def test_the_newest_and_the_best_stay(steps: list[int], keep: int, best: set[int], gone: set[int]) -> None:
    assert superfluous(steps, keep, best) == gone


def test_only_so_many_are_kept_in_a_run(tmp_path: Path) -> None:
    trained(tmp_path, save_every=2, keep_loras=2, heldout=None)
    assert steps_in(tmp_path) == [10, 12]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = {4: 0.5, 6: 0.7, 8: 0.8, 10: 0.9, 12: 0.95}
    seen = StopAt()
    monkeypatch.setattr("dopsd_core.training.run.Gaps.relative_to", lambda now, start: (0.5, gaps.get(seen.step + 1)))
    result = trained(tmp_path, seen, save_every=2, keep_loras=2, probe_every=4)
    assert steps_in(tmp_path) == [4, 10, 12]
    assert result.best == BestStep(4, 0.5, lora_of_step(tmp_path, 4)) and seen.best == [result.best]


def test_the_best_by_an_earlier_unseen_prompt_stays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = {2: 0.7, 4: 0.5, 6: 0.6, 8: 0.8, 10: 0.7, 12: 0.9, 14: 0.9, 16: 0.9}
    seen = StopAt()
    monkeypatch.setattr("dopsd_core.training.run.Gaps.relative_to", lambda now, start: (0.5, gaps.get(seen.step + 1)))
    trained(tmp_path, seen, steps=8, save_every=2, keep_loras=1, probe_every=2)
    assert steps_in(tmp_path) == [4, 8]
    trained(tmp_path, seen, steps=16, save_every=2, keep_loras=1, probe_every=2, heldout=77)
    assert steps_in(tmp_path) == [4, 10, 16]


def test_it_is_said_that_none_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path / "without", steps=1, keep_loras=3)
    assert caplog.messages.count("keep_loras 3 is not used: save_every is 0") == 1
    caplog.clear()
    trained(tmp_path / "with", steps=1, keep_loras=3, save_every=1)
    assert not [message for message in caplog.messages if "keep_loras" in message]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    trained(tmp_path, save_every=4, keep_loras=1)
    own = tmp_path / "loras" / "step-000008 (mine).safetensors"
    own.write_bytes(b"x")
    trained(tmp_path, save_every=4, keep_loras=1, steps=16)
    assert own.exists() and steps_in(tmp_path)[-1] == 16


@pytest.mark.parametrize(
    ("options", "done", "files"),
    [
        ({"steps": 12, "save_every": 0}, 0, 0),
        ({"steps": 12, "save_every": 5}, 0, 3),
        ({"steps": 12, "save_every": 5}, 6, 2),
        ({"steps": 12, "save_every": 5}, 12, 0),
        ({"steps": 12, "save_every": 1, "keep_loras": 3}, 0, 5),
    ],
)
def test_the_need_of_disk_space_counts_them(options: dict[str, int], done: int, files: int) -> None:
    assert most_files(make_config(**options), done) == files


def test_too_small_a_disk_is_refused_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = []
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0)
    for every in (0, 1):
        with pytest.raises(DiskError) as error:
            check_run_folder(make_config(save_every=every, steps=1000), TinyDenoiser(), tmp_path)
        needs.append(str(error.value))
    assert needs[0] != needs[1]


# -- what is in them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "dora", "lokr"])
def test_each_is_the_lora_of_its_step_with_the_header_of_save_lora(tmp_path: Path, adapter: str) -> None:
    trained(tmp_path / "whole", adapter=adapter, save_every=5)
    trained(tmp_path / "cut", StopAt(5), adapter=adapter)
    tensors, header = read_safetensors(lora_of_step(tmp_path / "whole", 5))
    wanted, _ = read_safetensors(tmp_path / "cut" / LORA_NAME)
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[key], wanted[key]) for key in tensors)
    assert header["dopsd_step"] == "5" and header["modelspec.title"] == "whole, step 5"
    assert header["modelspec.sai_model_spec"] == "1.0.1" and header["modelspec.implementation"] == "diffusers"
    assert header["modelspec.hash_sha256"].startswith("0x")


def test_the_gap_of_every_saved_step_is_measured(tmp_path: Path) -> None:
    trained(tmp_path, save_every=5, probe_every=4)
    from dopsd_core.training.log import LOG_NAME, read_log

    assert [step for step, _ in measured(read_log(tmp_path / LOG_NAME))] == [4, 5, 8, 10, 12]


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_run_resumes_with_other_settings_for_them(tmp_path: Path) -> None:
    trained(tmp_path, StopAt(4))
    assert changes_that_forbid_resuming(make_config(), make_config(save_every=3, keep_loras=1)) == ()
    assert make_config().identity() == make_config(save_every=3, keep_loras=1).identity()
    trained(tmp_path, save_every=3)
    assert steps_in(tmp_path) == [6, 9, 12]


def test_files_of_steps_that_are_done_again_are_written_again(tmp_path: Path) -> None:
    """The process was killed after step 5, whose file is there; the newest checkpoint is of step 3."""
    trained(tmp_path / "whole", save_every=5)
    trained(tmp_path / "cut", StopAt(3), save_every=5)
    for step in (5, 11):
        (tmp_path / "cut" / "loras").mkdir(exist_ok=True)
        lora_of_step(tmp_path / "cut", step).write_bytes(b"of a process that was killed")
    trained(tmp_path / "cut", save_every=5)
    assert steps_in(tmp_path / "cut") == [5, 10, 12]
    for step in (5, 10, 12):
        one, other = (read_safetensors(lora_of_step(tmp_path / name, step))[0] for name in ("whole", "cut"))
        assert all(torch.equal(one[key], other[key]) for key in one)


# -- the best step -----------------------------------------------------------------------------------------------------


def reports(**gaps: float) -> list[StepReport]:
    """s5=0.4: step 5 with that gap on the unseen prompt."""
    return [StepReport(step=int(name[1:]), heldout_relative_gap=gap) for name, gap in gaps.items()]


def test_the_best_step_is_the_first_of_the_smallest() -> None:
    series = [*reports(s0=1.0, s5=0.4, s10=0.3), StepReport(step=11), *reports(s15=0.3, s20=0.5)]
    assert best_step(series) == (10, 0.3)
    assert best_step(series, among=(5, 20)) == (5, 0.4)
    assert best_step(series, after=15) == (20, 0.5)
    assert best_step(series, among=()) is None and best_step([]) is None


def test_before_training_is_no_step() -> None:
    assert best_step(reports(s0=1.0, s5=1.2)) == (5, 1.2)


@pytest.mark.parametrize(
    ("best", "line"),
    [
        (BestStep(4, 0.5, Path("x")), "smallest gap on the unseen prompt: 0.500 at step 4; FILE"),
        (BestStep(4, 0.5), "smallest gap on the unseen prompt: 0.500 at step 4; no LoRA of that step is kept: HINT"),
        (BestStep(6, 0.5, Path("x")), "smallest gap on the unseen prompt: 0.500 at step 6; FILE"),
        (BestStep(6, 0.5), ""),
        (BestStep(4, 1.0, Path("x")), f"smallest gap on the unseen prompt: 1.000 at step 4; {NO_BETTER}"),
        (BestStep(6, 1.3), f"smallest gap on the unseen prompt: 1.300 at step 6; {NO_BETTER}"),
    ],
)
def test_the_best_step_is_only_offered_where_it_is_better_than_none(best: BestStep, line: str) -> None:
    assert best.sentence(6, "FILE" if best.path else "", "HINT") == line


def test_a_step_without_a_file_counts_where_those_with_one_are_worse_than_none(tmp_path: Path) -> None:
    folder = RunFolder.__new__(RunFolder)
    folder.path = tmp_path
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "step-000010.safetensors").write_bytes(b"")
    for unseen, step in (((0.4, 1.2), 5), ((1.3, 1.2), 10), ((0.4, 0.5), 10)):
        folder.reports = lambda unseen=unseen: reports(s5=unseen[0], s10=unseen[1])
        best = folder.best()
        assert best is not None and best.step == step and (best.path is not None) == (step == 10)


def test_a_run_says_its_best_step_whether_or_not_a_lora_is_kept(tmp_path: Path) -> None:
    without = trained(tmp_path / "without").best
    assert without is not None and without.path is None
    with_files = trained(tmp_path / "with", save_every=4).best
    assert with_files is not None and with_files.path == lora_of_step(tmp_path / "with", with_files.step)
    assert trained(tmp_path / "unmeasured", heldout=None, save_every=4).best is None


def test_a_run_that_is_complete_says_its_best_step_again(tmp_path: Path) -> None:
    first, seen = trained(tmp_path, save_every=4), StopAt()
    assert trained(tmp_path, seen, save_every=4).best == first.best and seen.best == [first.best]


def test_gaps_of_another_unseen_prompt_do_not_count(tmp_path: Path) -> None:
    trained(tmp_path, StopAt(8), save_every=2, heldout=99)
    result = trained(tmp_path, StopAt(10), save_every=2, heldout=98)
    assert result.best is not None and result.best.step == 10
    assert trained(tmp_path, StopAt(10), heldout=98).best == result.best
