"""The demo's runs in processes of their own."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from dopsd_core.config import ConfigError
from dopsd_core.data.dataset import DatasetError, DatasetReport
from dopsd_core.demo.settings import demo_config
from dopsd_core.standalone.compare import SFT_RATES, plan
from dopsd_core.standalone.jobs import Job, JobRunner
from dopsd_core.training.nonfinite import NonFiniteError


def test_plan_gives_every_method_the_same_budget() -> None:
    jobs = plan(demo_config(steps=50), 3)
    untouched, dreambooth, dopsd, sft = jobs[:3], jobs[3:6], jobs[6:9], jobs[9:]
    assert [job.seed for job in untouched] == [job.seed for job in dopsd] == [job.seed for job in dreambooth]
    assert [job.seed for job in untouched] == [0, 1, 2] and {job.seed for job in sft} == {0}
    assert len({job.name for job in jobs}) == len(jobs) == 9 + len(SFT_RATES) and len(SFT_RATES) >= 2
    assert [job.method for job in (untouched[0], dreambooth[0], dopsd[0])] == ["untouched", "dreambooth", "dopsd"]
    for job, own in [*((job, dopsd[0]) for job in sft), *zip(dreambooth, dopsd, strict=True)]:
        assert job.config is not None and own.config is not None
        assert job.config.replace(objective=own.config.objective, optimizer=own.config.optimizer) == own.config


@pytest.mark.parametrize(
    "error", [ConfigError(("a", "b")), NonFiniteError(7, "loss", 1e400), DatasetError(DatasetReport(Path("x"), (), ()))]
)
def test_errors_survive_the_way_out_of_a_process(error: Exception) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error)


@pytest.mark.long
def test_an_error_in_a_job_is_reported_with_its_reason(tmp_path: Path) -> None:
    with (  # nobody has written the concept's images there
        JobRunner(0, tmp_path / "empty", 1, lambda what, work: None) as runner,
        pytest.raises(ValueError, match="empty"),
    ):
        next(runner.run([Job(0)]))
