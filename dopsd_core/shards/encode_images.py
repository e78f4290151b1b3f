"""Encodes the images of a shard, as `build_training_set` encodes a dataset whose teacher sees each pair's own image."""

from __future__ import annotations

from collections.abc import Sequence

from ..conditioning.encode import Encoder, OnEncoded, encode_dataset
from ..conditioning.teachers import TeacherView
from ..data.dataset import Pair
from ..data.encoding_plan import plan_encoding
from ..training.anchors import encode_anchors, own_anchors
from ..training.shown_images import encode_request
from ..training.training_set import require_fit
from .encoding import Encoding
from .writer import EncodedImages


def encode_images(
    pairs: Sequence[Pair],
    encoder: Encoder,
    view: TeacherView,
    encoding: Encoding,
    *,
    is_first: bool,
    on_encoded: OnEncoded | None = None,
) -> EncodedImages:
    """Encodes pairs, captions without the concept's name and, in the first shard, the held-out pair.

    Raises:
        ValueError: the pairs do not fit the teacher, the held-out caption is among theirs, or the encoder returns
            invalid values.
        ImageError: an image was changed or damaged after it was checked.
    """
    if not pairs:
        return EncodedImages()
    require_fit(pairs, view, empty_captions=encoding.empty_captions)
    plan = plan_encoding(pairs, trigger=encoding.trigger, caption_dropout=encoding.empty_captions)
    if encoding.heldout and any(text == encoding.heldout for _, text in plan.requests):
        raise ValueError(f"the held-out caption {encoding.heldout!r} is in the dataset; use one that is not trained on")
    wanted = [*plan.requests, *([(pairs[0], encoding.heldout)] if encoding.heldout and is_first else [])]
    requests = [encode_request(pair, text, pair, view.background) for pair, text in wanted]
    encoded = encode_dataset(requests, encoder, None, on_encoded, view)
    own = own_anchors([plan])
    anchors = encode_anchors(own, encoder, None)
    count = len(plan.requests)
    return EncodedImages(
        encoded[:count],
        plan.examples,
        tuple(zip([anchor.key for anchor in own], anchors, strict=True)),
        (*encoded[count:], None)[0],
    )
