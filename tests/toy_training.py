"""Trainings of a few steps on toy pipelines, and what tests compare of them."""

import torch

import fusion
from fusion.training.setup import named_parameters


def config(pictures, **settings):
    base = {
        "token": "<dog>",
        "noun": "dog",
        "instance_data_dir": pictures,
        "output_dir": pictures.parent / "out",
        "rank": 4,
        "max_train_steps": 3,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "text_encoder_lr": 1e-2,
        "token_lr": 1e-2,
        "checkpointing_steps": 0,
    }
    return fusion.TrainingConfig(**{**base, **settings})


def run(pipe, settings):
    steps = list(fusion.train(pipe, settings))
    return steps, parameters(steps[-1])


def parameters(step):
    return {name: p.detach().clone() for name, p in named_parameters(step.adapter).items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
