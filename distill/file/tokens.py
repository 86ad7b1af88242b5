"""Metadata -> the tokenizers library's Tokenizer, proven on two prompts before anything is built on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..header import CheckpointError
from .metadata import CURE, Metadata

PROBE = "a large Red ring, 3 \u2603s; on"
"""Words that any tokenizer has to do something with, and one that none knows."""


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
    try:
        tokenizer = Tokenizer.from_str(json.dumps(getattr(meta, part)["tokenizer"]))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        empty, probe = (tokenizer.encode(text).ids for text in ("", PROBE))
        ids = [*tokenizer.get_vocab().values(), *empty, *probe, padding(meta, part)]
    except BaseException as e:  # the library's own errors are plain Exceptions; its panics not even that
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path}: metadata {part!r} has no sound tokenizer ({' '.join(str(e).split())[:200]}). {CURE}"
        ) from None
    framed = empty == [i for i in (start, end) if i is not None] and probe[:1] + probe[-1:] == empty[:1] + empty[-1:]
    if not framed or len(probe) > 20 * len(PROBE) or max(ids) >= vocabulary:
        rule = f"ids below {vocabulary} from the start {start} to the end {end}"
        raise CheckpointError(f"{path}: metadata {part!r} has a tokenizer that does not give {rule}. {CURE}")
    return tokenizer
