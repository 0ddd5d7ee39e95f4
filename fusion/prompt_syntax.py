"""What prompts are written in: weights as A1111 and Forge, or compel, read them, and BREAK, which begins a new chunk.

a1111    (word) 1.1, ((word)) 1.21, (word:1.3), [word] 1/1.1; \\( \\) \\[ \\] are brackets of the text itself
compel   word+ 1.1, word++ 1.21, word- 0.9, (two words)++, (two words)1.3; \\( \\) \\+ \\- are letters
none     everything is text, BREAK too
"""

import re
from typing import Literal, NamedTuple

PromptWeighting = Literal["a1111", "compel", "none"]

_A1111_FACTOR = 1.1  # of a bracket
_COMPEL_FACTORS = {"+": 1.1, "-": 0.9}  # of a sign
_A1111 = re.compile(r"\\[()\[\]\\]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^()\[\]\\:]+|.", re.DOTALL)
_COMPEL = re.compile(
    r"""\\[()"+.,=\\-]
    | \)(?P<group>\++|-+|\d*\.?\d+|)
    | (?P<word>(?:[^\s()"\\.,=+-]|[+-](?![\s()".,=+-]|$))++)(?P<signs>\++|-+)
    | [^\s()"\\.,=+-]+ | \s+ | .""",
    re.DOTALL | re.VERBOSE,
)
_LORA = re.compile(r"\s*<lora:(?P<name>[^<>:]+)(?::(?P<strength>[+-]?(?:\d+\.?\d*|\.\d+)))?>", re.IGNORECASE)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What other programs understand and this one does not.
_UNKNOWN_TO_BOTH = (
    r"\bNegative prompt:|\bSteps: \d+(?=,)|<\w+:[^<>]*>|\bembedding:[\w.\\/-]+|__[\w/*-]+__|\{[^{}]*\|[^{}]*\}"
)
_UNKNOWN = {
    "a1111": re.compile(rf"{_UNKNOWN_TO_BOTH}|(?<!\\)\[[^\[\]]*[|:][^\[\]]*\]|\bAND\b"),
    "compel": re.compile(
        rf'{_UNKNOWN_TO_BOTH}|\.(?:swap|blend|and|add|attend)\(|\b(?:with|use)Lora\(|"[^"]*"(?:[+-]|\d)'
    ),
}


class PromptPart(NamedTuple):
    """A stretch of a prompt with one weight."""

    text: str
    weight: float = 1.0


def parse_prompt(prompt: str, weighting: PromptWeighting) -> list[list[PromptPart]]:
    """The parts of a prompt, by the sections that BREAK divides it into. No text is an error: it has no weight then."""
    if weighting == "none":
        return [[PromptPart(prompt)]]
    sections: list[list[PromptPart]] = [[]]
    for text, weight in _joined(_a1111_parts(prompt) if weighting == "a1111" else _compel_parts(prompt)):
        first, *others = _BREAK.split(text)
        sections[-1].append(PromptPart(first, weight))
        sections += [[PromptPart(text, weight)] for text in others]
    return [[part for part in section if part.text] or [PromptPart("")] for section in sections]


def unknown_syntax(prompt: str, weighting: PromptWeighting) -> list[str]:
    """What of a prompt other programs would not encode as text: alternation, scheduling, wildcards, embeddings.

    Also the parameters of a picture, which A1111 takes out of a pasted prompt.
    """
    if weighting == "none":  # all of it is text, but nobody writes a LoRA's name as text
        return [match[0].strip() for match in _LORA.finditer(prompt)]
    plain = re.sub(r":\s*[+-]?[\d.]+\s*\)", ")", prompt)  # a weight inside [ ] is no schedule
    return list(dict.fromkeys(match[0] for match in _UNKNOWN[weighting].finditer(plain)))


def split_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without its <lora:NAME:0.8>, and their names and strengths, as in A1111; without a number, 1."""
    loras = [(match["name"].strip(), float(match["strength"] or 1)) for match in _LORA.finditer(prompt)]
    return _LORA.sub("", prompt).strip() if loras else prompt, loras


def _a1111_parts(prompt: str) -> list[PromptPart]:
    parts = list[PromptPart]()
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the number of parts before each bracket that is open

    def close(bracket: str, weight: float) -> bool:
        """Weigh what is behind the last bracket of this kind, if one is open."""
        if opened[bracket]:
            _weigh(parts, opened[bracket].pop(), weight)
            return True
        return False

    for match in _A1111.finditer(prompt):
        text, weight = match[0], match["weight"]
        if text in opened:
            opened[text].append(len(parts))
        elif not (
            (weight and close("(", float(weight)))
            or (text == ")" and close("(", _A1111_FACTOR))
            or (text == "]" and close("[", 1 / _A1111_FACTOR))
        ):
            parts.append(PromptPart(text[1:] if text[0] == "\\" and len(text) == 2 else text))
    while close("(", _A1111_FACTOR) or close("[", 1 / _A1111_FACTOR):  # what is not closed reaches to the end
        pass
    return parts


def _compel_parts(prompt: str) -> list[PromptPart]:
    parts, opened = list[PromptPart](), list[int]()
    for match in _COMPEL.finditer(prompt):
        text = match[0]
        if text == "(":
            opened.append(len(parts))
            parts.append(PromptPart(text))  # until it is closed
        elif text[0] == ")" and opened:
            start = opened.pop()
            parts[start] = PromptPart("")
            _weigh(parts, start, _compel_weight(match["group"]))
        elif match["word"]:
            parts.append(PromptPart(match["word"], _compel_weight(match["signs"])))
        else:
            parts.append(PromptPart(text[1:] if text[0] == "\\" and len(text) == 2 else text))
    return parts


def _compel_weight(text: str) -> float:
    """The weight of signs or a number behind a word or a group; 1 where there is nothing."""
    if text and text[0] in _COMPEL_FACTORS:
        return _COMPEL_FACTORS[text[0]] ** min(len(text), 1000)  # more would be no float
    return float(text or 1)


def _weigh(parts: list[PromptPart], start: int, weight: float) -> None:
    parts[start:] = [PromptPart(text, before * weight) for text, before in parts[start:]]


def _joined(parts: list[PromptPart]) -> list[PromptPart]:
    """The parts with neighbours of one weight as one."""
    joined: list[PromptPart] = []
    for part in parts:
        if joined and abs(joined[-1].weight - part.weight) < 1e-9:
            joined[-1] = PromptPart(joined[-1].text + part.text, joined[-1].weight)
        elif part.text:
            joined.append(part)
    return joined
