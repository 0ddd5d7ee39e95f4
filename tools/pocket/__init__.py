"""How the embedded base (`assets/pocket`) and its judge (`assets/pocket-clip`) are trained, from artwork to model card.

`python -m tools.pocket STAGE` runs one stage, `make pocket` all of them in order. What a stage makes stands in its
own folder below the work folder; a stage that was stopped goes on where it stopped.

    subjects.py     what is drawn: subjects, styles, colours, and what is held out
    artwork.py      eight icon sets from npm, as sprites
    scenes.py       sprites on a background, in named places
    captions.py     what is said of a scene
    muon.py         the optimizer that makes it a matter of hours
    training.py     the loop all trained stages share: schedule, moving average, checkpoints, log
    autoencoder.py  pictures of 128 px to latents of 16 × 16 × 4, and back
    tokenizer.py    words to numbers
    latents.py      scenes, encoded once
    denoiser.py     UNet and text encoder
    judge.py        a small CLIP that also tells one drawing from another, and a plain classifier to check it
    evaluate.py     every bar, on prompts and seeds fixed beforehand
    card.py         the model cards, with the measured numbers
"""
