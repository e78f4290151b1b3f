"""A digest of what a training set is encoded from, which is known before anything is encoded.

It changes with the files, captions, sizes and order of the images, with the encoder and with what the teacher sees. A
run that resumes compares it first: encoding a dataset that does not fit may take hours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from ..conditioning.encode import Encoder, pair_key
from ..conditioning.teachers import TeacherView
from ..data.dataset import Pair
from ..data.resolutions import Scale
from .shown_images import TeacherImage
from .training_set import plan_requests, require_fit


def digest_of_keys(keys: Iterable[str]) -> str:
    """A digest of the keys of pairs, in order."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{key}\n".encode())
    return digest.hexdigest()


def planned_digest(
    pairs: Sequence[Pair],
    encoder: Encoder,
    *,
    teacher: TeacherView,
    teacher_image: TeacherImage,
    trigger: str,
    caption_dropout: bool,
    scales: Sequence[Scale] = (),
) -> str:
    """The `digest_of_keys` of the training set that `build_training_set` makes of the same arguments.

    Reads the files of the images, and decodes none.

    Raises:
        ValueError: the pairs do not fit the teacher.
    """
    require_fit(pairs, teacher, teacher_image, empty_captions=caption_dropout, scales=scales)
    sizes = [scale.pairs for scale in scales] or [tuple(pairs)]
    plans = plan_requests(sizes, teacher, teacher_image, trigger, caption_dropout)
    return digest_of_keys(pair_key(request, encoder, teacher) for plan in plans for request in plan.requests)
