"""The nodes in a real ComfyUI against `fusion.attach` in diffusers: every prompt and every call of the UNet."""

import gc
from dataclasses import replace

import pytest
import torch
from comfy_checks import CLOSE, check, check_calls, encode, error, loaded

import fusion
from fusion.adapters import ADAPTERS
from fusion.models.binding import bind, with_bound_words
from trained import attached, everywhere, trained_adapter

pytestmark = pytest.mark.filterwarnings("default")
FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_concepts_act_as_in_diffusers(comfyui, spectral, folders, toys, family):
    toy = toys(family)
    rex = trained_adapter(toy.pipe, "<rex>", vectors=2, scale=0.2)
    tom = trained_adapter(toy.pipe, "<tom>", kind="lora", k=1, scale=0.2)
    model, clip = loaded(spectral, folders, toy, rex, tom)
    texts = ["<tom> beside a <rex> and a <rex> in the snow", "blurry <Tom>"]
    conds = [encode(comfyui, clip, text) for text in texts]
    latent, calls = toy.draw(model, *conds, batch=2)
    check(toy, conds, [[text] for text in texts], calls, (rex, tom))
    assert error(latent, toy.draw(toy.model, *[encode(comfyui, toy.clip, text) for text in texts], batch=2)[0]) > 0.01


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_adapter_type(comfyui, spectral, folders, toys, kind, gated):
    toy = toys("sd1")
    targets = None if gated else everywhere(toy.pipe)
    adapter = trained_adapter(toy.pipe, "<rex>", kind=kind, gated=gated, targets=targets, scale=0.1)
    strong = replace(adapter, branches=tuple(replace(b, strength=0.7) for b in adapter.branches))
    model, clip = loaded(spectral, folders, toy, adapter, strength=0.7)
    texts = ["a photo of a <rex>", "a photo of a cat"]
    conds = [encode(comfyui, clip, text) for text in texts]
    check(toy, conds, [[text] for text in texts], toy.draw(model, *conds)[1], (strong,))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_without_the_concept_are_the_bases_to_the_bit(comfyui, spectral, folders, toys, family):
    toy = toys(family)
    model, clip = loaded(spectral, folders, toy, trained_adapter(toy.pipe, "<rex>"))
    pictures = []
    for m, c in ((toy.model, toy.clip), (model, clip), (toy.model, toy.clip)):
        positive, negative = encode(comfyui, c, "a (photo:1.3) of a dog"), encode(comfyui, c, "blurry")
        pictures.append((positive[0][0], toy.draw(m, positive, negative, batch=2)[0]))
    for prompt, latent in pictures[1:]:
        assert torch.equal(prompt, pictures[0][0])
        assert torch.equal(latent, pictures[0][1])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_weights_and_prompts_of_several_chunks(comfyui, spectral, folders, toys, family):
    toy = toys(family)
    rex = trained_adapter(toy.pipe, "<rex>", vectors=2, scale=0.2)
    model, clip = loaded(spectral, folders, toy, rex)
    words = "a photo of a dog in the snow ," + " a photo of a dog in the snow ," * 9  # 9 tokens each
    head, rest = words.split()[:75], words.split()[75:]  # ComfyUI fills the first chunk with 75
    conds = [encode(comfyui, clip, "a (<rex>:1.4) beside a cat"), encode(comfyui, clip, f"{words} (<rex>:1.0)")]
    assert conds[1][0][0].shape[1] == 2 * 77
    _, calls = toy.draw(model, *conds)
    with attached(toy.pipe, rex), torch.no_grad():
        empty, plain = toy.encoded(""), toy.encoded("a <rex> beside a cat")
        weighted = plain.clone()
        weighted[:, 2:4] = (plain[:, 2:4] - empty[:, 2:4]) * 1.4 + empty[:, 2:4]
        assert error(conds[0][0][0], weighted) < CLOSE
        chunks = torch.cat([toy.encoded(" ".join(head)), toy.encoded(" ".join(rest) + " <rex>")], dim=1)
        assert error(conds[1][0][0], chunks) < CLOSE
        check_calls(toy, calls, [(conds[0][0][0], weighted), (conds[1][0][0], chunks)])


def test_combined_joined_and_empty_prompts(comfyui, spectral, folders, toys):
    toy = toys("sd1")
    rex = trained_adapter(toy.pipe, "<rex>", scale=0.2)
    model, clip = loaded(spectral, folders, toy, rex)
    a, b = encode(comfyui, clip, "a <rex>"), encode(comfyui, clip, "a cat")
    nothing = comfyui.ConditioningZeroOut().zero_out(b)[0]
    both = comfyui.ConditioningConcat().concat(b, a)[0]
    combined = comfyui.ConditioningCombine().combine(a, b)[0]
    area = comfyui.ConditioningSetArea().append(a, 32, 64, 32, 0, 1.0)[0]
    masked = comfyui.ConditioningSetMask().append(b, torch.ones(1, 64, 64), "default", 0.5)[0]
    pictures = [toy.draw(model, *conds)[1] for conds in (([*combined, *both], nothing), ([*area, *masked], b))]
    with attached(toy.pipe, rex), torch.no_grad():
        rex_, cat = toy.encoded("a <rex>"), toy.encoded("a cat")
        prompts = [(a[0][0], rex_), (b[0][0], cat), (both[0][0], torch.cat([cat, rex_], dim=1))]
        prompts.append((nothing[0][0], torch.zeros_like(cat)))
        for calls in pictures:
            check_calls(toy, calls, prompts)


def test_unrecognised_prompts_are_refused(comfyui, spectral, folders, toys):
    toy = toys("sd1")
    rex, tom = trained_adapter(toy.pipe, "<rex>"), trained_adapter(toy.pipe, "<tom>", k=1)
    model, clip = loaded(spectral, folders, toy, rex)
    other = loaded(spectral, folders, toy, tom)[1]
    a, b = encode(comfyui, clip, "a <rex>"), encode(comfyui, clip, "a bird of another kind")
    average = comfyui.ConditioningAverage().addWeighted(a, b, 0.5)[0]
    with pytest.raises(Exception, match="Average"):
        toy.draw(model, average, b)
    with pytest.raises(Exception, match="Connect both outputs"):
        toy.draw(model, encode(comfyui, toy.clip, "a prompt of a CLIP without the adapter"), b)
    with pytest.raises(Exception, match="<tom> of an adapter that this MODEL lacks"):
        toy.draw(model, encode(comfyui, other, "a <tom>"), b)


def test_two_workflows_in_turn(comfyui, spectral, folders, toys):
    """Each draws as it did at first, after the other, after clones have gone, and after models were unloaded."""
    import comfy.model_management

    toy = toys("sd1")
    rex, tom = trained_adapter(toy.pipe, "<rex>", scale=0.2), trained_adapter(toy.pipe, "<tom>", k=1, scale=0.2)
    one, two, three = (loaded(spectral, folders, toy, *adapters) for adapters in ([rex], [tom], [rex, tom]))
    texts = {"a <rex>": (one, three), "a <tom>": (two, three), "a dog": (one, two, three, (toy.model, toy.clip))}

    def picture(models, text):
        model, clip = models
        return toy.draw(model, encode(comfyui, clip, text), encode(comfyui, clip, "blurry"))[0]

    first = {text: picture(models[0], text) for text, models in texts.items()}
    assert error(first["a <rex>"], first["a <tom>"]) > 0.01
    for _ in range(2):
        for text, workflows in texts.items():
            for models in workflows:
                clones = models[0].clone(), models[1].clone()
                del clones
                gc.collect()
                assert torch.equal(picture(models, text), first[text])
        comfy.model_management.unload_all_models()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_loras_before_and_after(comfyui, spectral, folders, toys, family):
    """ComfyUI's LoraLoader changes the weights; the base is recognised and the adapter acts all the same."""
    import folder_paths

    toy = toys(family)
    rex = trained_adapter(toy.pipe, "<rex>", scale=0.2)
    lora = trained_adapter(toy.pipe, "<style>", kind="lora", k=1, gated=False, scale=0.1)
    fusion.save(rex, folders / "rex.safetensors", dtype="float32")
    fusion.export(lora, folders / "style.safetensors", "kohya", dtype="float32")
    folder_paths.folder_names_and_paths["loras"] = ([str(folders)], {".safetensors"})
    load = spectral["LoadSpectralAdapter"]().load
    texts = ["a <rex>", "a cat"]
    for before in (True, False):
        model, clip = toy.model, toy.clip
        if before:
            model, clip = comfyui.LoraLoader().load_lora(model, clip, "style.safetensors", 0.8, 0.8)
            toy.draw(model, encode(comfyui, clip, "a"), encode(comfyui, clip, "b"))  # the LoRA is in the weights now
        model, clip = load(model, clip, "rex.safetensors", 1.0, 1.0)
        if not before:
            model, clip = comfyui.LoraLoader().load_lora(model, clip, "style.safetensors", 0.8, 0.8)
        conds = [encode(comfyui, clip, text) for text in texts]
        weaker = replace(lora, branches=tuple(replace(b, strength=0.8) for b in lora.branches))
        check(toy, conds, [[text] for text in texts], toy.draw(model, *conds)[1], (rex, weaker))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("word", ["<alice>", "the knight"])
def test_a_bound_lora_acts_as_on_the_command_line(comfyui, spectral, folders, toys, family, word):
    toy = toys(family)
    lora = trained_adapter(toy.pipe, "<x>", kind="lora", gated=False, targets=everywhere(toy.pipe), scale=0.1)
    lora = replace(lora, tokens={}, info=replace(lora.info, concepts=()))
    fusion.save(lora, folders / "lora.safetensors", dtype="float32")
    bound = bind(toy.pipe, lora, word)
    model, clip = spectral["BindLoraToWord"]().bind(toy.model, toy.clip, "lora.safetensors", word, 1.0, 1.0)
    texts = [f"a photo of {word} in the snow", "a photo of a cat"]
    conds = [encode(comfyui, clip, text) for text in texts]
    references = [[with_bound_words(text, [bound])] for text in texts]
    check(toy, conds, references, toy.draw(model, *conds, batch=2)[1], (bound,))


def test_a_mask_keeps_a_bound_lora_in_its_cells(comfyui, spectral, folders, toys):
    """Of a picture's layers, as regions do; whole, half and empty masks, and a second sampler at another size."""
    toy = toys("sd1")
    targets = ["unet.attn1.to_q"]
    lora = trained_adapter(toy.pipe, "<x>", kind="lora", gated=False, targets=targets, scale=0.5)
    lora = replace(lora, tokens={}, info=replace(lora.info, concepts=()))
    fusion.save(lora, folders / "lora.safetensors", dtype="float32")
    load = spectral["BindLoraToWord"]().bind
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    masks = {"none": None, "whole": torch.ones(1, 64, 64), "left": left, "empty": torch.zeros(1, 64, 64)}
    outputs, queries = {}, []

    def first_queries(toy, model, conds):
        """Of the first layer with the LoRA, (prompts, 8, 8, C)."""
        unet = model.model.diffusion_model
        layer = unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q
        calls, hooks = [], []

        def start(*_):  # behind the hooks of the adapters
            hooks.append(layer.register_forward_hook(lambda _m, _a, out: calls.append(out.clone())))

        hooks.append(unet.register_forward_pre_hook(start))
        toy.draw(model, *conds, steps=1)
        for hook in hooks:
            hook.remove()
        return calls[0].unflatten(1, (8, 8))

    for name, mask in masks.items():
        model, clip = load(toy.model, toy.clip, "lora.safetensors", "the knight", 1.0, 1.0, mask)
        conds = [encode(comfyui, clip, text) for text in ("the knight", "a cat")]
        outputs[name] = [toy.draw(model, *conds, steps=1, size=size)[0] for size in (8, 12)]
        queries.append(first_queries(toy, model, conds))
    none, whole, half, empty = queries
    plain = toy.draw(toy.model, *conds, steps=1)[0]
    assert torch.equal(whole, none) and all(map(torch.equal, outputs["none"], outputs["whole"]))
    assert torch.equal(half[:, :, :4], none[:, :, :4]) and torch.equal(half[:, :, 4:], empty[:, :, 4:])
    assert not torch.equal(half[:, :, :4], empty[:, :, :4])
    assert torch.equal(outputs["empty"][0], plain)
    area = comfyui.ConditioningSetArea().append(conds[0], 32, 64, 32, 0, 1.0)[0]
    with pytest.raises(Exception, match="perhaps a crop"):
        toy.draw(model, area, conds[1])


def test_a_foreign_base_and_a_second_token_are_refused(comfyui, spectral, folders, toys):
    toy = toys("sd1")
    rex = trained_adapter(toy.pipe, "<rex>")
    with pytest.raises(Exception, match="<rex> is a token of 'rex' and of 'rex'"):
        loaded(spectral, folders, toy, rex, rex)
    fusion.save(trained_adapter(toys("sd2").pipe, "<owl>"), folders / "owl.safetensors")
    with pytest.raises(Exception, match="does not fit this base"):
        spectral["LoadSpectralAdapter"]().load(toy.model, toy.clip, "owl.safetensors", 1.0, 1.0)
