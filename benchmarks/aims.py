"""What a preset for an aim may set, measured on the demo model: subjects (and characters) and styles.

    python -m benchmarks.aims --concepts 3 --steps 30

Each variant differs in one thing from the demo's settings: the steps of the rollout that are learned from, the share
of prior anchors, the kind of anchors, or which image the teacher sees. A character is a subject among others that have
names: its figure is *names wrong*, the damage to those. Edits have a benchmark of their own, `benchmarks/edits.py`.
Variants that are in --output already are not run again; a variant takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import RESULTS, ROOT, WORK, measured_here, record
from benchmarks.varied_demo import Place, Variant, plain_demo, run_variants, sections, sheet, small_concept
from dopsd_core.standalone.comparison.experiment import Outcomes, Plan
from dopsd_core.standalone.comparison.methods import DOPSD, REFERENCES, Method

USUAL = Variant(DOPSD)

FEWER = Variant(Method("anchors25", "anchors on 1/4 of the batches", {"anchor_probability": 0.25}))
MORE = Variant(Method("anchors75", "anchors on 3/4", {"anchor_probability": 0.75}))
CAPTIONS = Variant(Method("captions", "anchors: captions alone"), anchors="captions")
OTHER = Variant(Method("other", "teacher sees other images"), teacher_image="other")


def variants_of(aim: str, steps: int) -> tuple[Variant, ...]:
    """The variants of an aim; steps: of all but two, which have more: as many on images, or about the same time."""
    long = Method("anchors75long", "anchors on 3/4, twice the steps", {"anchor_probability": 0.75, "steps": 2 * steps})
    one = {"grad_steps": 1, "step_draw": "gap", "steps": steps * 3 // 2}
    by_gap = Variant(Method("by_gap", "one rollout step by gap, 1.5 times the steps", one))
    return (USUAL, by_gap, FEWER) if aim == "style" else (USUAL, by_gap, FEWER, MORE, Variant(long), CAPTIONS, OTHER)


AIMS = ("subject", "style")


def measured(aim: str, concepts: Sequence[int], steps: int, output: Path) -> tuple[Plan, Outcomes]:
    """The outcomes of an aim's variants."""
    is_style, variants = aim == "style", variants_of(aim, steps)
    references = [Variant(method) for method in REFERENCES]
    found = run_variants(references, variants, concepts, steps, output / aim, plain_demo(is_style))
    methods = tuple(variant.method for variant in variants)
    plan = Plan(methods=methods, concepts=tuple(concepts), seeds=(0,), style=is_style, steps=steps, regimes=("steps",))
    return plan, found


def place_of(aim: str) -> Place:
    """Where an aim's figures stand."""
    title = {"subject": "Aims: subject and character", "style": "Aims: style"}[aim]
    about = (f"![The same prompts and noise in each row](aims_{aim}.png)",)
    return Place(f"aims-{aim}", title, "D-OPSD", about)


def main() -> None:
    """Trains the variants of both aims and records their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK.parent / "aims")
    parser.add_argument("--aims", nargs="+", choices=AIMS, default=list(AIMS))
    parser.add_argument("--concepts", type=int, default=3, help="number of concepts")
    parser.add_argument("--first-concept", type=int, default=20, help="seed of the first")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    args = parser.parse_args()
    concepts = range(args.first_concept, args.first_concept + args.concepts)
    command = f"python -m benchmarks.aims --concepts {args.concepts} --steps {args.steps}"
    for aim in args.aims:
        plan, found = measured(aim, concepts, args.steps, args.output)
        drawn = sheet(
            [*map(Variant, REFERENCES), *variants_of(aim, args.steps)], small_concept(concepts[0], aim == "style"),
            args.steps, args.output / aim, f"{aim}, {args.steps} steps", {"trigger": 5, "named": 3},
        )  # fmt: skip
        drawn.save(ROOT / "docs" / f"aims_{aim}.png")
        for section in sections(place_of(aim), plan, found, command):
            record(measured_here(section), RESULTS)
            print(section.to_markdown())


if __name__ == "__main__":
    main()
