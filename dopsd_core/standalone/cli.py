"""The command demo: trains the embedded demo model on an unseen concept."""

from __future__ import annotations

import argparse
import math
import time

from tqdm import tqdm

from ..demo.concept import make_concept, write_dataset
from ..demo.model_files import JUDGE_FILE, WEIGHTS
from ..demo.settings import demo_config
from ..demo.world import TRIGGER
from ..text import printable
from .compare import compare, draw_teacher_sheet, plan, table, write_results
from .evaluate import Samples
from .jobs import JobRunner
from .judge import load_judge
from .memory import peak_rss_mb
from .texts import for_console, say

_BAR = "{percentage:3.0f}% {bar} {elapsed} < {remaining}  {postfix}"


def run_demo(args: argparse.Namespace) -> int:
    """Trains on an unseen concept, compares with SFT and DreamBooth, and writes the results to `args.output`."""
    began = time.perf_counter()
    concept, judge = make_concept(args.concept_seed), load_judge(WEIGHTS / JUDGE_FILE)
    config = demo_config() if args.steps is None else demo_config(steps=args.steps)
    say(f"Concept {concept.seed}: {concept.words}. The model knows the words, but has never seen this combination.")
    say(f"It will learn it as {TRIGGER} from four images in {args.output / 'dataset'}, without those words.")
    write_dataset(concept, args.output / "dataset")
    jobs = plan(config, args.seeds)
    work = sum(job.work for job in jobs) + (args.seeds - 1) * jobs[-1].work

    def show_teacher(base: Samples, teacher: Samples) -> None:
        draw_teacher_sheet(concept, base, teacher).save(args.output / "teacher.png")
        tqdm.write(printable(f"Its teacher's images, the limit of what can be learned: {args.output / 'teacher.png'}"))

    with tqdm(total=math.ceil(work), unit="", bar_format=_BAR) as bar:

        def show_progress(what: str, done: float) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(done)

        with JobRunner(concept.seed, args.output, args.jobs, show_progress) as runner:
            result = compare(runner, config, args.seeds, show_teacher)
    peak = peak_rss_mb() + result.peak_rss_mb
    report = write_results(args.output, concept, judge, result, time.perf_counter() - began, peak)
    say("\n" + for_console(table(report)))
    names = ("overview.png", "contact_sheet.png", "curves.png", "report.json", "lora.safetensors")
    say("\n" + "\n".join(str(args.output / name) for name in names))
    return 0
