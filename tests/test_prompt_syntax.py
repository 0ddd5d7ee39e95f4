"""Prompt weights as A1111 and compel write them. The values are those of their own parsers."""

import pytest

from fusion.prompt_syntax import parse_prompt, unknown_syntax

A1111 = {
    "a dog": [("a dog", 1)],
    "a (dog) there": [("a ", 1), ("dog", 1.1), (" there", 1)],
    "((dog))": [("dog", 1.21)],
    "(dog:1.3), [cat]": [("dog", 1.3), (", ", 1), ("cat", 1 / 1.1)],
    "(a (red:2) dog: 1.5 )": [("a ", 1.5), ("red", 3), (" dog", 1.5)],
    r"a \(b\) (c\):1.2) \\": [("a (b) ", 1), ("c)", 1.2), (" \\", 1)],
    "[[a] b]": [("a", 1 / 1.21), (" b", 1 / 1.1)],
    "[(x:1.1)] y": [("x y", 1)],
    "(open [ended": [("open ", 1.1), ("ended", 1)],
    "closed) and] smile :)": [("closed) and] smile :)", 1)],
    "(a:b:1.2) (a:1.2.3)": [("a:b", 1.2), (" ", 1), ("a:1.2.3", 1.1)],
    "(<robot>:1.2) <dog>": [("<robot>", 1.2), (" <dog>", 1)],
    "": [("", 1)],
    "()": [("", 1)],
}
COMPEL = {
    "a dog": [("a dog", 1)],
    "a dog+ there": [("a ", 1), ("dog", 1.1), (" there", 1)],
    "dog++, cat-": [("dog", 1.21), (", ", 1), ("cat", 0.9)],
    "(a b)-- (c)1.3": [("a b", 0.81), (" ", 1), ("c", 1.3)],
    "(a (b)++ c)0.5": [("a ", 0.5), ("b", 0.605), (" c", 0.5)],
    r"C\+\+ \(a\)": [("C++ (a)", 1)],
    "man-made well-known+ a - b + c": [("man-made ", 1), ("well-known", 1.1), (" a - b + c", 1)],
    "<my-dog>+ (<a> <b>)++": [("<my-dog>", 1.1), (" ", 1), ("<a> <b>", 1.21)],
    "(plain) text": [("plain text", 1)],
    "(open": [("(open", 1)],
    "closed)": [("closed)", 1)],
    "": [("", 1)],
}


@pytest.mark.parametrize("weighting", ["a1111", "compel", "none"])
def test_weights_of_a_prompt(weighting):
    table = {"a1111": A1111, "compel": COMPEL, "none": {text: [(text, 1)] for text in [*A1111, *COMPEL, "a BREAK b"]}}
    for prompt, expected in table[weighting].items():
        (parts,) = parse_prompt(prompt, weighting)
        assert [part.text for part in parts] == [text for text, _ in expected], prompt
        assert [part.weight for part in parts] == pytest.approx([weight for _, weight in expected]), prompt


def test_break_begins_a_section_inside_of_brackets_too():
    for weighting, prompt in {"a1111": "a (b BREAK c:1.2) d", "compel": "a (b BREAK c)1.2 d"}.items():
        texts = [[(part.text, part.weight) for part in section] for section in parse_prompt(prompt, weighting)]
        assert texts == [[("a ", 1), ("b", 1.2)], [("c", 1.2), (" d", 1)]]
    assert len(parse_prompt("BREAKFAST break", "a1111")) == 1


def test_no_text_takes_long_or_fails():
    for text in ("(" * 10_000, "(a" * 1000, ")" * 10_000, "a" + "+" * 9999, "a" + "-" * 9999, "(a)" + "9" * 9000):
        for weighting in ("a1111", "compel", "none"):
            assert parse_prompt(text, weighting)


def test_syntax_of_other_programs_is_named():
    prompt = "embedding:x [a|b] [a:b:0.5] [a::3] __color__ {a|b} <hypernet:q:1> a AND b, <robot> (a:1.2) [b] [(c:1.2)]"
    expected = ["embedding:x", "[a|b]", "[a:b:0.5]", "[a::3]", "__color__", "{a|b}", "<hypernet:q:1>", "AND"]
    assert unknown_syntax(prompt, "a1111") == expected
    assert unknown_syntax('("a", "b").blend(1, 1) "a b"++ <robot>+ [b]', "compel") == [".blend(", '"a b"+']
    assert not unknown_syntax(prompt, "none")
    pasted = "1girl, stairs\nNegative prompt: lowres\nSteps: 28, Sampler: Euler a, CFG scale: 5, Seed: 1"
    assert unknown_syntax(pasted, "a1111") == ["Negative prompt:", "Steps: 28"]
    assert unknown_syntax("a <robot> <lora:my style:0.8>, <lora:b>", "none") == ["<lora:my style:0.8>", "<lora:b>"]
