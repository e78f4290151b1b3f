"""Reduces Qwen's byte-level BPE to the words of the demo world, with the real token ids.

Any text can still be tokenized (bytes are the fallback), and every word of the world has the same ids as in the full
tokenizer, so the same weights work with ComfyUI's tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer

from ...data.captions import PLACEHOLDER
from ...demo import names, world
from ...demo.model_files import TEACHER_TEMPLATE, TEXT_TEMPLATE

SPECIAL = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
    "<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655,
}  # fmt: skip


def texts_of_the_world() -> list[str]:
    """All words of the demo world with punctuation, and the prompt templates."""
    words = [*world.SHAPES, *world.COLOURS, *world.TEXTURES, *world.POSITIONS, *world.BACKGROUNDS]
    words += [*names.SUBJECTS.texts, *names.STYLES.texts, *names.UNBOUND, PLACEHOLDER]
    words += [world.NOUN, "with", "a", "center", "on", "background", "the", "an", "and"]
    phrases = [w + f for w in words for f in ("", ",", ".")] + [f" {w}{f}" for w in words for f in ("", ",", ".")]
    return [*phrases, TEXT_TEMPLATE.format(""), TEACHER_TEMPLATE.format("")]


def merges_used(piece: str, rank: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that BPE applies to one pre-tokenized piece (already in byte-level letters)."""
    parts, used = list(piece), set()
    while len(parts) > 1:
        pairs = [pair for pair in zip(parts, parts[1:], strict=False) if pair in rank]
        if not pairs:
            break
        best = min(pairs, key=rank.__getitem__)
        used.add(best)
        merged, i = [], 0
        while i < len(parts):
            if tuple(parts[i : i + 2]) == best:
                merged.append("".join(best))
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return used


def cut(full: Tokenizer) -> dict:
    """The reduced tokenizer as the JSON that `tokenizers` reads."""
    spec = json.loads(full.to_str())
    vocab: dict[str, int] = spec["model"]["vocab"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in spec["model"]["merges"]]
    rank = {pair: i for i, pair in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    for text in texts_of_the_world():
        for piece, _ in full.pre_tokenizer.pre_tokenize_str(full.normalizer.normalize_str(text)):
            used |= merges_used(piece, rank)
    kept = {token: i for token, i in vocab.items() if i < 256} | {a + b: vocab[a + b] for a, b in used} | SPECIAL
    spec["model"]["vocab"] = kept
    spec["model"]["merges"] = [list(pair) for pair in sorted(used, key=rank.__getitem__)]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    spec["truncation"] = spec["padding"] = None
    return spec


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("qwen", type=Path, help="folder with Qwen's vocab.json and merges.txt")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    from transformers import Qwen2Tokenizer

    full = Qwen2Tokenizer.from_pretrained(args.qwen).backend_tokenizer
    args.out.write_text(json.dumps(cut(full), ensure_ascii=False), encoding="utf-8")
    small = Tokenizer.from_str(args.out.read_text(encoding="utf-8"))
    for text in texts_of_the_world():
        assert small.encode(text).ids == full.encode(text).ids, text
    print(f"{args.out}: {small.get_vocab_size()} tokens")
