"""What was measured, as the tables of the model cards. Shares are in percent; in brackets, of real pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

SCENES = {
    "alone": "one thing",
    "beside": "two, side by side",
    "stacked": "two, one above the other",
    "row": "three in a row",
    "three": "three in corners",
    "four": "four in corners",
}
WITNESSES = {"clip": "pocket-clip", "classifier": "classifier"}
ASKED = {"subject": "subject", "style": "style", "whole": "all in place"}
ARTWORK = {
    "trained": "of its own subjects",
    "held_out": "of the subjects held out for teaching",
    "untouched": "of the untouched subjects",
    "outline": "in the held-out style",
}


def of_pocket(results: Mapping[str, Any]) -> str:
    speed, distance = results["speed"], results["distance"]
    rows = [(f"autoencoder, unseen scenes {ARTWORK[of]}", f"{dB} dB") for of, dB in results["autoencoder"].items()]
    rows += [
        (f"Fréchet distance in pocket-clip's features, {distance['pictures']} pictures", distance["drawn"]),
        ("the same, of real pictures", distance["real"]),
        ("one picture, two CPU cores", f"{speed['picture_seconds']} s"),
        ("loading the pipeline", f"{speed['load_seconds']} s"),
        ("with pocket-clip, on disk", f"{speed['megabytes']} MB"),
    ]
    return "\n\n".join([drawn(results["pocket"]), taught(results["teachable"]), table(("what", "measured"), rows)])


def of_judge(results: Mapping[str, Any]) -> str:
    judges = results["judges"]
    rows = [
        (f"{asked}, by {who}", percent(judges[witness][key]))
        for witness, who in WITNESSES.items()
        for key, asked in (("subject", "subject"), ("style", "style"))
    ]
    identity = judges["identity"]
    rows += [
        (f"identity, among {identity['candidates']}, held-out subjects", percent(identity["held_out"])),
        (f"identity, among {identity['candidates']}, untouched subjects", percent(identity["untouched"])),
    ]
    return table(("right on real, unseen pictures", "%"), rows)


def drawn(results: Mapping[str, Any]) -> str:
    """A row a kind of scene, two columns a question: one for each witness."""
    columns = [(key, witness) for key in ASKED for witness in WITNESSES]
    head = ("scene", "pictures", "background", *(f"{ASKED[key]}: {WITNESSES[w]}" for key, w in columns))
    rows = []
    for kind, name in SCENES.items():
        row = results[kind]
        shares = [f"{percent(row[w][key])} ({percent(row[f'{w}_on_real'][key])})" for key, w in columns]
        rows.append((name, row["pictures"], percent(row["background"]), *shares))
    return table(head, rows)


def taught(results: Mapping[str, Any]) -> str:
    """A row a concept."""
    before = percent(results["known_before"])
    head = ("concept, by a plain LoRA", "base", "taught", f"known (before: {before})", "seconds")
    rows = [
        (name, percent(one["base"]), percent(one["taught"]), percent(one["known_after"]), one["seconds"])
        for name, one in results.items()
        if name != "known_before"
    ]
    return table(head, rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
