"""Metadata -> the tokenizers library's Tokenizer, proven on two prompts before anything is built on it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..header import CheckpointError
from .metadata import CURE, Metadata

PROBE = "a large Red ring, 3 \u2603s; on"
"""Words that any tokenizer has to do something with, and one that none knows."""
GROWTH = 64
"""How many times longer a tokenizer's steps may make a text: CLIP's make it twice as long, T5's less than this. Steps
that double the letter z forty times would pass PROBE, and fill the memory at the first prompt with a z."""


def start_and_end(meta: Metadata, part: str = "text_encoder") -> tuple[int | None, int]:
    """The ids that a prompt begins and ends with: the tokenizer's; where those are not given, the configuration's."""
    config, tokens = meta.architecture[part], getattr(meta, part)
    return tokens.get("start", config["bos_token_id"]), tokens.get("end", config["eos_token_id"])


def padding(meta: Metadata, part: str = "text_encoder") -> int:
    """The id that fills a prompt up to its length: the tokenizer's own, or the end."""
    return getattr(meta, part).get("pad", start_and_end(meta, part)[1])


def parse(path: str | Path, meta: Metadata, part: str = "text_encoder") -> Any:
    """A text encoder's Tokenizer, without padding and truncation. Raises CheckpointError where it cannot be read, gives
    ids that the text encoder does not have, or leaves out the start or the end."""
    from tokenizers import Tokenizer

    vocabulary, (start, end) = meta.architecture[part]["vocab_size"], start_and_end(meta, part)
    held = getattr(meta, part)["tokenizer"]
    try:
        with no_panic(path, part):
            if growth([held.get("normalizer"), held.get("pre_tokenizer")]) > GROWTH:
                raise ValueError(f"its steps make a text more than {GROWTH} times as long")
            tokenizer = Tokenizer.from_str(json.dumps(held))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            empty, probe = (tokenizer.encode(text).ids for text in ("", PROBE))
            ids = [*tokenizer.get_vocab().values(), *empty, *probe, padding(meta, part)]
    except CheckpointError:
        raise
    except Exception as e:  # the library's errors are of no other kind
        raise _unsound(path, part, e) from None
    framed = empty == [i for i in (start, end) if i is not None] and probe[:1] + probe[-1:] == empty[:1] + empty[-1:]
    if not framed or len(probe) > 20 * len(PROBE) or max(ids) >= vocabulary:
        rule = f"ids below {vocabulary} from the start {start} to the end {end}"
        raise CheckpointError(f"{path}: metadata {part!r} has a tokenizer that does not give {rule}. {CURE}")
    return tokenizer


def growth(steps: Any) -> int:
    """How many times longer the steps of a tokenizer (JSON) make a text, at most."""
    if isinstance(steps, list):
        return math.prod(map(growth, steps))
    if not isinstance(steps, dict):
        return 1
    own = {"Replace": len(str(steps.get("content"))), "Prepend": 1 + len(str(steps.get("prepend")))}
    own |= {"ByteLevel": 2, "Precompiled": 32}
    return max(1, own.get(steps.get("type"), 1)) * growth(list(steps.values()))


@contextmanager
def no_panic(path: str | Path, part: str = "text_encoder") -> Iterator[None]:
    """A panic of the tokenizers library, as by a pattern that never comes to an end, becomes CheckpointError: it is no
    Exception, so that it would end the thread that ComfyUI runs prompts in."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise _unsound(path, part, e) from None


def _unsound(path: str | Path, part: str, e: BaseException) -> CheckpointError:
    said = " ".join(str(e).split())[:200]
    return CheckpointError(f"{path}: metadata {part!r} has no sound tokenizer ({said}). {CURE}")
