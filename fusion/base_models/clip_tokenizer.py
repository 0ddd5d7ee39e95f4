"""CLIP's tokenizer for bases whose files have none: a single-file checkpoint holds weights alone.

All Stable Diffusion families share one vocabulary, which follows from its merges: 256 bytes, 256 bytes that end a word,
what each merge makes, and the start and end of a text, 49,408 words in all.
"""

import gzip
from importlib.resources import files
from typing import Any

from transformers import CLIPTokenizer

_MERGES = "configs/clip_merges.txt.gz"  # from OpenAI's bpe_simple_vocab_16e6.txt, its first 48,894 lines: see NOTICE
_LENGTH = 77  # text positions of every CLIP text encoder


def make_clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of CLIP ViT-L; OpenCLIP's (SD 2.x, the second of XL) pads with "!"."""
    text = gzip.decompress((files("fusion.base_models") / _MERGES).read_bytes()).decode()
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in text.splitlines())]
    # A letter for each byte: the printable ones as they are, then letters from 256 on for the 68 others.
    alphabet = [chr(number) for number in (*range(33, 127), *range(161, 173), *range(174, 324))]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(first + second for first, second in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    options: Any = {"vocab": vocabulary, "merges": merges}  # annotated as text; the pairs are what is read
    return CLIPTokenizer(**options, pad_token=pad, model_max_length=_LENGTH)
