"""LoRAs that are bound to words: they act at their word, and a prompt without it is the base's to the bit."""

import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fusion
import tiny
from fusion.cli import main
from fusion.errors import BaseMismatch, ConfigError
from fusion.generation.region_pictures import region_mask
from fusion.models.binding import bound_words, token_of, with_bound_words
from fusion.models.layer_sites import all_sites, matrix
from fusion.models.targets import UNGATED_TARGETS, resolve

CONVOLUTIONS = ["unet.down_blocks.0.resnets.0.conv1", "unet.conv_out", "unet.down_blocks.0.downsamplers.0.conv"]


def lora_file(folder, name, pipe, *, layers=None, seed=0):
    """A plain LoRA by another program: attention of UNet and text encoder, and convolutions."""
    table, generator = all_sites(pipe), torch.Generator().manual_seed(seed)
    names = layers or [
        *resolve(UNGATED_TARGETS[:1], table),
        *resolve(["unet.attn1", "unet.attn2"], table),
        *CONVOLUTIONS,
    ]
    tensors = {}
    for layer in names:
        shape = table[layer].module.weight.shape
        text = layer.startswith("text_encoder")
        stem = (
            layer.replace("text_encoder.", "lora_te_text_model_") if text else layer.replace("unet.", "lora_unet_", 1)
        )
        stem, (O, I) = stem.replace(".", "_"), matrix(table[layer]).shape  # noqa: E741
        tensors[f"{stem}.lora_down.weight"] = (torch.randn(2, I, generator=generator) * 0.2).view(2, *shape[1:])
        up = torch.randn(O, 2, generator=generator) * 0.2
        tensors[f"{stem}.lora_up.weight"] = up.view(O, 2, *(1 for _ in shape[2:]))
    save_file(tensors, folder / f"{name}.safetensors", {"ss_base_model_version": "sd_v1"})
    return folder / f"{name}.safetensors"


def drawn(pipe, prompt, *adapters, **settings):
    config = fusion.GenerationConfig(prompt=prompt, num_inference_steps=4, **settings)
    (picture,) = fusion.generate(pipe, config, adapters)
    return picture


def pixels(picture):
    return np.asarray(picture.image)


@pytest.mark.parametrize("word", ["<rex>", "the dog"])
def test_a_prompt_without_the_word_is_the_bases_and_one_with_it_is_not(word, tmp_path):
    pipe = tiny.pipeline("sd1")
    bound = fusion.bind(pipe, fusion.load(lora_file(tmp_path, "rex", pipe)), word)
    style = fusion.load(lora_file(tmp_path, "style", pipe, seed=1))
    with_word, without = f"a photo of {word} in snow", "a photo of a cat in the snow"
    base = [pixels(drawn(pipe, without)), pixels(drawn(pipe, without, style))]
    assert np.array_equal(pixels(drawn(pipe, without, bound)), base[0])
    assert np.array_equal(pixels(drawn(pipe, without, style, bound)), base[1])  # under an ordinary LoRA
    picture = drawn(pipe, with_word, bound)
    silent = fusion.generate(pipe, picture.recipe.config, [bound], strengths=[0.0])[0]
    assert not np.array_equal(pixels(picture), pixels(silent))
    fusion.save(bound, tmp_path / "bound.safetensors", "float32")
    half = fusion.load(tmp_path / "bound.safetensors").tokens[token_of(word)]["text_encoder"]
    assert torch.equal(half, half.half().float())  # exact in a file of any precision
    again = fusion.load(tmp_path / "bound.safetensors")
    assert np.array_equal(pixels(drawn(pipe, with_word, again)), pixels(picture))
    assert picture.recipe.config.prompt == f"a photo of {token_of(word)} in snow"
    assert (picture.recipe.adapters[0].word, picture.recipe.config.regions) == (word, ())


def test_in_layers_that_see_tokens_it_acts_at_the_words_positions_alone(tmp_path):
    pipe, layer = tiny.pipeline("sd1"), "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    bound = fusion.bind(pipe, fusion.load(lora_file(tmp_path, "rex", pipe, layers=[layer])), "the dog")
    assert bound.info.concepts[0].vectors == 2
    outputs = []
    with fusion.attach(pipe, bound):
        module = all_sites(pipe)[layer].module
        module.register_forward_hook(lambda m, args, y: outputs.append(y - m.base(args[0])))
        pipe("a photo of <the-dog> in snow", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    changed = outputs[0][0].abs().sum(dim=-1) > 1e-6  # (T,)
    assert changed.nonzero().flatten().tolist() == [4, 5]  # after the start, "a photo of"


def test_several_get_regions_where_some_layers_see_no_tokens(tmp_path, caplog):
    pipe = tiny.pipeline("sd1")
    rex, tom = (
        fusion.bind(pipe, fusion.load(lora_file(tmp_path, name, pipe, seed=seed)), word)
        for seed, (name, word) in enumerate([("rex", "the dog"), ("tom", "<tom>")])
    )
    for size in ({}, {"width": 32, "height": 24}):
        picture, again = (drawn(pipe, "the dog beside <tom>", rex, tom, **size) for _ in range(2))
        regions = picture.recipe.config.regions
        assert regions and regions == again.recipe.config.regions
        masks = [fusion.Region(part.prompt, mask=region_mask(part, picture.image.size)) for part in regions]
        back = drawn(pipe, "the dog beside <tom>", rex, tom, regions=tuple(masks), **size)
        assert np.array_equal(pixels(picture), pixels(again)) and np.array_equal(pixels(picture), pixels(back))
    assert "<the-dog> and <tom> change layers that see no tokens" in caplog.text
    halves = (fusion.Region("the dog", (0, 0, 0.5, 1)), fusion.Region("<tom>", (0.5, 0, 1, 1)))
    parts = drawn(pipe, "the dog beside <tom>", rex, tom, regions=halves).recipe.config.regions
    assert [part.prompt for part in parts] == ["<the-dog> beside tom", "the dog beside <tom>"]


def test_in_a_prompt_with_one_of_the_words_the_other_lora_changes_no_bit(tmp_path):
    pipe = tiny.pipeline("sd1")
    words = ("the dog", "<tom>")
    rex, tom = (
        fusion.bind(pipe, fusion.load(lora_file(tmp_path, f"{seed}", pipe, seed=seed)), word)
        for seed, word in enumerate(words)
    )
    both = fusion.fuse([rex, tom])
    for word, alone, size in zip(words, (rex, tom), ({}, {"width": 32, "height": 24}), strict=True):
        prompt = f"a photo of {word} in snow"
        expected = pixels(drawn(pipe, prompt, alone, **size))
        assert np.array_equal(pixels(drawn(pipe, prompt, tom, rex, **size)), expected)
        assert np.array_equal(pixels(drawn(pipe, prompt, both, **size)), expected)
        assert not np.array_equal(pixels(drawn(pipe, f"a photo of {words[0]} beside <tom>", both, **size)), expected)


def test_phrases_are_found_as_words(tmp_path):
    pipe = tiny.pipeline("sd1")
    lora = fusion.load(lora_file(tmp_path, "rex", pipe, layers=["unet.conv_out"]))
    bound = [fusion.bind(pipe, lora, word) for word in ("the dog", "dog")]
    assert with_bound_words("The  dog, a dog, dogs and <dog>", bound) == "<the-dog>, a <dog>, dogs and <dog>"
    with pytest.raises(BaseMismatch, match=r"'rex' does not fit this base: .* Open its own base \(--base\)"):
        fusion.bind(tiny.pipeline("sd2"), fusion.load(lora_file(tmp_path, "rex", pipe)), "the dog")
    for wrong in ("", "!?", "<two words>"):
        with pytest.raises(ConfigError, match="cannot bind"):
            fusion.bind(pipe, lora, wrong)


def test_fused_and_renamed_they_keep_their_words(tmp_path, caplog):
    pipe = tiny.pipeline("sd1")
    rex, tom = (
        fusion.bind(pipe, fusion.load(lora_file(tmp_path, name, pipe, seed=seed)), word)
        for seed, (name, word) in enumerate([("rex", "the dog"), ("tom", "<tom>")])
    )
    both = fusion.fuse([rex, tom])
    assert bound_words(both) == {"<the-dog>": "the dog", "<tom>": "<tom>"}
    assert bound_words(both.renamed({"<the-dog>": "<rex>", "<tom>": "<tim>"})) == {"<rex>": "the dog", "<tim>": "<tim>"}
    prompt = "the dog beside <tom>"
    apart, together = drawn(pipe, prompt, rex, tom), drawn(pipe, prompt, both)
    assert np.array_equal(pixels(apart), pixels(together)) and together.recipe.config.regions
    caplog.clear()
    drawn(pipe, "the dog", both)
    assert not caplog.messages  # one of its words is enough
    drawn(pipe, "a cat", both)
    assert caplog.messages == ["The prompt does not have the dog or <tom>, so what is bound to it does nothing."]


def test_bind_on_the_command_line_and_its_recipe(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.pipeline("sd1")
    pipe.save_pretrained(tmp_path / "base")
    lora_file(tmp_path, "rex", pipe)
    words = ["--base", "base", "--steps", "2", "--device", "cpu"]
    assert main(["generate", "--bind", "the dog=rex.safetensors", "--prompt", "the dog", *words, "-o", "a.png"]) == 0
    assert main(["generate", "--from", "a.png", "--base", "base", "--device", "cpu", "-o", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main(["generate", "--bind", "the cat=rex.safetensors", "--prompt", "the dog", *words, "-o", "c.png"]) == 0
    assert main(["generate", "--prompt", "the dog", *words, "-o", "base.png"]) == 0
    assert "The prompt does not have the cat" in caplog.text and "the dog" not in capsys.readouterr().err
    base, silent = (np.asarray(Image.open(tmp_path / name)) for name in ("base.png", "c.png"))
    assert np.array_equal(base, silent)
    assert not np.array_equal(base, np.asarray(Image.open(tmp_path / "a.png")))
    fuse = ["fuse", "--bind", "the dog=rex.safetensors", "--base", "base", "--device", "cpu", "--dtype", "float32"]
    assert main([*fuse, "-o", "bound.safetensors"]) == 0
    assert "next: fusion generate bound.safetensors --base base" in capsys.readouterr().out
    assert main(["generate", "bound.safetensors", "--prompt", "the dog", *words, "-o", "d.png"]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "d.png")), np.asarray(Image.open(tmp_path / "a.png")))
    both = ["generate", "bound.safetensors", "--bind", "a cat=rex.safetensors", "--prompt", "the dog, a cat", *words]
    both += ["--width", "32", "--height", "32"]
    assert main([*both, "-o", "e.png", "--save_regions", "regions"]) == 0
    regions = shlex.split(capsys.readouterr().out.partition("to give them back: ")[2].partition("\n")[0])
    assert (tmp_path / "regions" / "0-regions.png").is_file() and regions[0] == "--region"
    assert main([*both, "-o", "f.png", *regions]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "e.png")), np.asarray(Image.open(tmp_path / "f.png")))
    assert main(["generate", "--bind", "rex.safetensors", "--prompt", "the dog", *words]) == 2
    assert main(["fuse", "-o", "none.safetensors"]) == 2
