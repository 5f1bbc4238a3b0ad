"""Byte-level tokenizer directories: id of byte b is b, special tokens behind.

from helpers.tiny_tokenizer import write_tokenizer

write_tokenizer(path, specials=("<bos>", "<eos>"), chat_template="...")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIALS = ("<bos>", "<eos>", "<|user|>", "<|assistant|>")


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_tokenizer(
    path: Path, specials: tuple[str, ...] = SPECIALS, chat_template: str | None = None
) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and, if given, chat_template.jinja.

    The first special token is bos and is put before every text; the second is eos.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(_tokenizer(specials)))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[0],
        "eos_token": specials[1],
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template)
    return path


def _tokenizer(specials: tuple[str, ...]) -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    bos = specials[0]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + i, "content": name, **flags, "special": True}
            for i, name in enumerate(specials)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [256], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }
