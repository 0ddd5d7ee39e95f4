"""The fusion laboratory: every way to use several concepts together, under equal conditions, judged in pictures.

    store.py      results by the hash of their inputs: a rerun computes only what changed
    concepts.py   sixteen concepts, eight nouns by two artists each
    recipes.py    ways to train one concept
    plain_loras.py  trains plain LoRAs by PEFT, as people share them
    trainer.py    trains a concept by a recipe
    arms.py       ways to use N adapters together, one row of the tables each
    distilling.py gated concepts into plain LoRAs
    multi_lora.py ways without fusion: switch and composite
    drawing.py    pictures of prompts and seeds
    scoring.py    scores of pictures
    prediction.py predictions of what pictures lose
    plan.py, schedule.py    which arms on which concepts, and in which order
    figures.py, report.py   docs/fusion-bench.md

`make bench-fusion` runs it all, for hours, on the embedded base; `--quick` in minutes, `--arms` some rows of it.
Several processes may run at once and share the work.
"""
