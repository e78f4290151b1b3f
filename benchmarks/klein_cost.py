"""Cost of a D-OPSD step on FLUX.2-klein at its real size with random weights: time, peak memory, FLOPs.

    python -m benchmarks.klein_cost                                             on CUDA: the 4B; the 9B by formula
    python -m benchmarks.klein_cost --9b                                        the 9B
    python -m benchmarks.klein_cost --device meta                               counted at full size, without a GPU
    python -m benchmarks.klein_cost --device cpu --double 1 --single 2 --heads 2 --encoder-layers 1 --rollout-steps 2 \
--resolutions 256 --steps 1                                                     reduced in size, a minute

The teacher is the editing branch, which sees the image as a reference, unless --teacher says otherwise; an edit has
one source. What is measured and how: benchmarks/real_size.py.
"""

from __future__ import annotations

import torch

from benchmarks import networks, real_size
from benchmarks.real_size import Session, say
from benchmarks.real_step import GB, Row, Subject
from benchmarks.zimage_cost import vision_tokens
from dopsd_core.families import FLUX2_KLEIN

TARGETS = {
    ("offloaded", 1024): "peak <= half of the authors'",
    ("24 GB", 1024): "< 20 GB",
    ("16 GB", 1024): "< 15 GB",
    ("12 GB", 768): "< 11.5 GB",
    ("8 GB", 512): "< 7.6 GB",
}
PRESETS_4B = (
    ("24 GB", 1024, 64, False),
    ("16 GB", 1024, 64, False),
    ("12 GB", 768, 32, False),
    ("8 GB", 512, 16, True),
)
PRESETS_9B = (("24 GB", 1024, 64, True), ("16 GB", 1024, 64, True), ("12 GB", 768, 32, True), ("8 GB", 512, 16, True))
SIZES = {"4B": (5, 20, 24, 7680), "9B": (8, 24, 32, 12288)}
"""Double-stream blocks, single-stream blocks, heads of 128, width of the text features: three layers of the encoder."""
REFERENCES = {"edit": (0, 1), "vlm": (0, 0), "edit_target": (1, 2)}
TEXT = 512


def subject(name: str = "4B", teacher: str = "edit", **sizes: int | None) -> Subject:
    """klein 4B or 9B; `sizes` (double, single, heads) where they are not the real ones."""
    real, sees = SIZES[name], teacher == "vlm"
    double, single, heads = (sizes.get(key) or real[i] for i, key in enumerate(("double", "single", "heads")))

    def denoiser():
        from dopsd_core.standalone.hosts.klein import klein

        return klein(double, single, heads, real[3])

    return Subject(
        family=FLUX2_KLEIN,
        size=f"klein {name}, {double} + {single} blocks of {real[0]} + {real[1]}, "
        f"width {128 * heads} of {128 * real[2]}, teacher {teacher}",
        comfyui=networks.klein(double, single, heads, real[3]),
        diffusers=denoiser,
        context=real[3],
        texts=lambda side: (TEXT, max(TEXT, vision_tokens(side) + 70) if sees else TEXT),
        vision=vision_tokens if sees else None,
        references=REFERENCES[teacher],
        encoder=real[3] // 3,
        targets=TARGETS if name == "4B" else {},
        presets=PRESETS_4B if name == "4B" else PRESETS_9B,
    )


def by_formula(session: Session, larger: Subject) -> None:
    """The rows of a model that was not run: its FLOPs at the utilisation seen, its peak by the memory formula."""
    say(f"{larger.size}: by formula, at the utilisation above\n\n{real_size.HEAD}")
    meta = torch.device("meta")
    made = Session(larger, session.args, meta)
    network = made.new_network()
    for row in session.rows:
        if row.variant in real_size.VARIANTS and not row.note:
            bench = made.bench(network, row.side, made.config)
            footprint = bench.footprint().casting_each_time()
            checkpointing = real_size.known_checkpointing(row.variant, footprint)
            cost, peak = bench.cost(checkpointing), footprint.total(checkpointing) / GB
            seconds = cost.model_flops / (session.rate * row.utilisation) if row.utilisation else None
            count, repeated, tflop = checkpointing.count, cost.repeated, cost.flops / 1e12
            say(Row(row.variant, row.side, row.rank, seconds, peak, count, repeated, tflop).line())


def main() -> None:
    """Measures the model that the arguments describe."""
    parser = real_size.parser(__doc__)
    parser.add_argument("--9b", action="store_true", dest="nine", help="the 9B instead of the 4B")
    parser.add_argument("--teacher", default="edit", choices=REFERENCES)
    parser.add_argument("--double", type=int, help="double-stream blocks, fewer than the real model has")
    parser.add_argument("--single", type=int, help="single-stream blocks")
    parser.add_argument("--heads", type=int, help="of 128")
    args = parser.parse_args()
    sizes = {"double": args.double, "single": args.single, "heads": args.heads}
    session = real_size.run(subject("9B" if args.nine else "4B", args.teacher, **sizes), args)
    if not args.nine and not any(sizes.values()):
        by_formula(session, subject("9B", args.teacher))


if __name__ == "__main__":
    main()
