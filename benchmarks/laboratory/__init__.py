"""The fusion laboratory: every way to use several concepts together, on equal footing, judged in pictures.

    store.py      results by the hash of what they were made from: a rerun makes only what changed
    concepts.py   sixteen concepts, eight nouns by two hands each
    recipes.py    ways to train one concept
    teaching.py   a concept by a recipe becomes an adapter
    arms.py       ways to use N adapters together, of which each gets a row
    rivals.py     those that work while a picture is drawn: switch and composite
    drawing.py    prompts and seeds become pictures
    scoring.py    pictures become numbers
    prediction.py what could be known before anything was drawn
    figures.py, report.py   numbers become docs/fusion-bench.md

`make bench-fusion` runs it all, for hours, on the embedded base; `--quick` in minutes, `--arms` some rows of it.
Several processes may run at once and share the work.
"""
