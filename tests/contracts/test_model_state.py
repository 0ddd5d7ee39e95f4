"""What is attached lives on the model: found out once, per thread where it belongs to a call, gone from every copy."""

import copy
import io
import sys
import threading
import warnings

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from torch import nn

import tiny
from fusion.errors import ConfigError
from fusion.generation.config import GenerationConfig, Region
from fusion.generation.prompt_embeddings import embed_prompts
from fusion.generation.regions import Cover, drawing_regions
from fusion.layer_names import TOKENIZERS
from fusion.models import base_check, layer_sites
from fusion.models.adapted_layers import AdaptedLinear
from fusion.models.attachment import attach
from fusion.models.baking import bake
from fusion.models.denoising import Conditioning, predict
from fusion.models.gates import TokenRows
from fusion.models.layer_sites import components, sites
from fusion.models.model_state import state_of
from trained import attached, draw, everywhere, trained_adapter


def counting(function, name, counts):
    def call(*args):
        counts[name] += 1
        return function(*args)

    return call


@pytest.fixture
def counted(monkeypatch):
    """How often modules are walked, and weights held against a basis."""
    counts = {"walk": 0, "residual": 0}
    for module, name in ((layer_sites, "walk"), (base_check, "residual")):
        monkeypatch.setattr(module, name, counting(getattr(module, name), name, counts))
    return counts


def test_modules_are_walked_again_only_when_they_change(pipe, counted):
    once = len(components(pipe))
    first = sites(pipe)
    adapter = trained_adapter(pipe, targets=everywhere(pipe))
    with attached(pipe, adapter):
        assert sites(pipe) == first and isinstance(next(iter(sites(pipe).values())).module, AdaptedLinear)
    assert sites(pipe) == first and counted["walk"] == once
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    other = nn.Linear(first[name].module.in_features, 64, bias=False)
    setattr(*first[name], other)
    assert sites(pipe)[name].module is other and counted["walk"] == once + 1


def test_ten_adapters_are_held_against_a_base_once(counted):
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, f"<c{k}>", k=k % 8, rank=2) for k in range(10)]
    with attached(pipe, *adapters):
        draw(pipe, "a <c3>", num_inference_steps=1)
    assert counted["residual"] == sum(len(adapter.layers) for adapter in adapters)
    with attached(pipe, *adapters):
        assert counted["residual"] == sum(len(adapter.layers) for adapter in adapters)


@pytest.mark.parametrize("change", ["in place", "another tensor", "precision"])
def test_a_check_holds_for_the_weights_it_was_made_of(change, counted):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe)
    attach(pipe, adapter).detach()
    first, layer = counted["residual"], sites(pipe)[adapter.layer_names[0]].module
    if change == "in place":
        with torch.no_grad():
            layer.weight.mul_(1.0)
    elif change == "another tensor":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        pipe.text_encoder.to(torch.bfloat16)
    attach(pipe, adapter).detach()
    assert counted["residual"] == 2 * first


def test_what_is_baked_stays_known_to_pipelines_with_other_text_encoders():
    pipe, other = tiny.pipeline("sd1"), tiny.pipeline("sd1", seed=1)
    adapter = trained_adapter(pipe, targets=["unet.attn2"], gated=False)
    bake(pipe, adapter)
    other.unet = pipe.unet
    digests = state_of(pipe).baked
    assert digests == {adapter.digest()} and state_of(other).baked == digests


@pytest.mark.parametrize("by", [copy.deepcopy, lambda module: torch.load(saved(module), weights_only=False)])
def test_a_copy_of_a_component_is_the_bases_with_nothing_attached(by, pipe, family):
    classes = {n: [type(m) for m in part.modules()] for n, part in components(pipe).items()}
    with attached(pipe, trained_adapter(pipe, targets=everywhere(pipe))):
        copies = {name: by(part) for name, part in components(pipe).items()}
        tokenizers = {name: copy.deepcopy(getattr(pipe, TOKENIZERS[name])) for name in copies if name in TOKENIZERS}
    for name, part in copies.items():
        assert [type(m) for m in part.modules()] == classes[name]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in part.modules())
    twin = type(pipe)(**(pipe.components | copies | {TOKENIZERS[n]: t for n, t in tokenizers.items()}))
    twin.set_progress_bar_config(disable=True)
    for prompt in ("a dog", "a <rex>"):
        assert torch.equal(draw(twin, prompt), draw(tiny.pipeline(family), prompt))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def clones(pipe, count):
    """Pipelines of the same components, a scheduler each, as diffusers' server examples build them."""
    built = []
    for _ in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clone = type(pipe).from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
        clone.set_progress_bar_config(disable=True)
        built.append(clone)
    return built


def in_threads(*functions):
    results = [[] for _ in functions]

    def run(function, out):
        try:
            out.append(function())
        except Exception as error:
            out.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(functions, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [out for (out,) in results if isinstance(out, Exception)], results
    return [out for (out,) in results]


def test_a_tokenizer_that_threads_share_pads_each_prompt_as_asked():
    pipe = tiny.pipeline("sd1")
    interval = sys.getswitchinterval()
    with attached(pipe, trained_adapter(pipe, "<a>")):
        tokenizer = pipe.tokenizer
        ways = [{"padding": "max_length", "max_length": 16, "truncation": True}, {"padding": "longest"}]
        expected = [tokenizer("a <a>", **way).input_ids for way in ways]
        assert len(expected[0]) == 16 and len(expected[1]) < 16
        sys.setswitchinterval(1e-6)
        try:
            encoded = in_threads(
                *(lambda way=way: [tokenizer("a <a>", **way).input_ids for _ in range(500)] for way in ways)
            )
        finally:
            sys.setswitchinterval(interval)
    assert encoded == [[ids] * 500 for ids in expected]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_threads_draw_what_one_draws(family):
    pipe = tiny.pipeline(family)
    with attached(pipe, trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1, targets=everywhere(pipe))):
        one, two = clones(pipe, 2)
        prompts = [["the snow and a <a>", "a <b>"][i % 2] for i in range(12)], ["a <b>", "a dog", "<a> <b>"] * 4
        serial = [
            [draw(clone, p, seed=i) for i, p in enumerate(ps)] for clone, ps in zip((one, two), prompts, strict=True)
        ]
        parallel = in_threads(
            *(
                lambda c=c, ps=ps: [draw(c, p, seed=i) for i, p in enumerate(ps)]
                for c, ps in zip((one, two), prompts, strict=True)
            )
        )
    assert [list(map(torch.equal, *pair)) for pair in zip(serial, parallel, strict=True)] == [[True] * 12] * 2


def test_threads_may_attach_and_detach():
    pipe = tiny.pipeline("sd1")
    one, two = clones(pipe, 2)
    adapters = {"<a>": trained_adapter(pipe, "<a>"), "<b>": trained_adapter(pipe, "<b>", k=1, targets=everywhere(pipe))}

    def pictures(clone, token):
        with attached(clone, adapters[token]):
            return draw(clone, f"a {token}")

    alone = pictures(one, "<a>"), pictures(two, "<b>")
    many = in_threads(*(lambda a=a: [pictures(*a) for _ in range(8)] for a in ((one, "<a>"), (two, "<b>"))))
    assert [[torch.equal(p, a) for p in ps] for ps, a in zip(many, alone, strict=True)] == [[True] * 8] * 2
    assert not any(isinstance(m, AdaptedLinear) for m in pipe.unet.modules())


def test_a_thread_with_regions_leaves_the_other_alone():
    pipe = tiny.pipeline("sd1")
    regions = [Region("a <a>", (0.0, 0.0, 0.5, 1.0)), Region("a <b>", (0.5, 0.0, 1.0, 1.0))]
    with attached(
        pipe, *(trained_adapter(pipe, t, k=k, targets=everywhere(pipe)) for k, t in enumerate(["<a>", "<b>"]))
    ):
        one, two = clones(pipe, 2)

        def with_regions():
            with drawing_regions(one, Cover(regions, 8, 8)):
                return draw(one, None, **embed_prompts(one, GenerationConfig(prompt="a dog", regions=regions)))

        def plain():
            return draw(two, "a <a> and a <b>")

        alone = with_regions(), plain()
        many = in_threads(lambda: [with_regions() for _ in range(8)], lambda: [plain() for _ in range(8)])
    assert not torch.equal(*alone)
    assert [[torch.equal(p, a) for p in ps] for ps, a in zip(many, alone, strict=True)] == [[True] * 8] * 2
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_the_way_back_may_run_in_another_thread():
    """As on a GPU, where autograd has threads of its own; layers are run again there."""
    pipe = tiny.pipeline("sd1")
    for part in components(pipe).values():
        part.requires_grad_(False)
    pipe.unet.train().enable_gradient_checkpointing()
    adapter, noisy = trained_adapter(pipe, targets=["unet.attn2"]), torch.randn(1, 4, 8, 8)
    with attach(pipe, adapter, live=True):
        gradients = []
        for elsewhere in (False, True):
            with torch.no_grad():
                states = [pipe.encode_prompt([p], "cpu", 1, False)[0] for p in ("a <rex>", "a dog and a <rex>")]
            loss = predict(pipe, noisy, torch.tensor([10]), Conditioning(states[0], None)).square().mean()
            predict(pipe, noisy, torch.tensor([10]), Conditioning(states[1], None))  # the rows have moved on

            def back(loss=loss):
                return torch.autograd.grad(loss, list(adapter.parameters()))

            gradients.append(in_threads(back)[0] if elsewhere else back())
    assert all(map(torch.equal, *gradients)) and any(g.any() for g in gradients[0])


def test_fused_projections_are_refused_at_attach_and_at_draw(pipe):
    adapter, base = trained_adapter(pipe), draw(pipe)
    pipe.fuse_qkv_projections()
    with pytest.raises(ConfigError, match=r"fused projections; call pipe.unfuse_qkv_projections\(\)"):
        attach(pipe, adapter)
    pipe.unfuse_qkv_projections()
    with attach(pipe, adapter):
        picture = draw(pipe, "a <rex>")
        pipe.fuse_qkv_projections()
        with pytest.raises(ConfigError, match="fused projections"):
            draw(pipe, "a <rex>")
        pipe.unfuse_qkv_projections()
        assert torch.equal(draw(pipe, "a <rex>"), picture)
    assert torch.equal(draw(pipe), base)


def test_clones_made_while_attached_outlive_it(pipe):
    def redraw(prompt):
        return draw(clone, prompt, image=torch.rand(1, 3, 16, 16, generator=torch.Generator()), strength=1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clone = AutoPipelineForImage2Image.from_pipe(pipe)
        clone.set_progress_bar_config(disable=True)
        spelled = redraw("a <rex>")
        handle = attach(pipe, trained_adapter(pipe))
        clone = AutoPipelineForImage2Image.from_pipe(pipe)
    clone.set_progress_bar_config(disable=True)
    concept = redraw("a <rex>")
    handle.detach()
    assert torch.equal(redraw("a <rex>"), spelled) and not torch.equal(spelled, concept)
    with attach(pipe, trained_adapter(pipe, "<tom>")):
        assert torch.equal(redraw("a <rex>"), spelled) and not torch.equal(redraw("a <tom>"), spelled)


def test_a_pipeline_saved_while_attached_is_the_base(tmp_path):
    pipe = tiny.pipeline("sd1")
    base = draw(pipe, "a <rex>")
    with attached(pipe, trained_adapter(pipe)):
        pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, "a <rex>"), base)


def test_swaps_leave_a_bounded_vocabulary():
    pipe = tiny.pipeline("sd1")
    base, size = draw(pipe, "a <kept> and a dog"), len(pipe.tokenizer)
    one = trained_adapter(pipe, "<kept>", targets=["text_encoder.encoder.layers.0.self_attn.q_proj"])
    two = trained_adapter(pipe, "<c>", k=1, vectors=3, targets=one.layer_names)
    with attached(pipe, one):
        picture, number = draw(pipe, "a <kept>"), pipe.tokenizer.convert_tokens_to_ids("<kept>")
        for i in range(400):
            with attached(pipe, two.renamed({"<c>": f"<c{i}>"})):
                if i % 100 == 99:
                    assert torch.equal(draw(pipe, "a <kept>"), picture)
                    assert not torch.equal(draw(pipe, f"a <c{i}>"), draw(pipe, f"a <c{i - 1}>"))
        assert len(pipe.tokenizer) < size + 100 and pipe.tokenizer.convert_tokens_to_ids("<kept>") == number
    assert len(pipe.tokenizer) == size and torch.equal(draw(pipe, "a <kept> and a dog"), base)


def test_a_layer_asks_only_the_gates_of_tokens_present(monkeypatch):
    pipe = tiny.pipeline("sd1")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    adapters = [trained_adapter(pipe, f"<c{k}>", k=k, rank=1, targets=[name]) for k in range(16)]
    gates, matching = [], TokenRows.matching
    monkeypatch.setattr(TokenRows, "matching", lambda self, gate, x: gates.append(gate) or matching(self, gate, x))
    with attached(pipe, *adapters):
        draw(pipe, "a <c3> and a <c7>", num_inference_steps=1)
        assert gates == [("<c3>",), ("<c7>",)]
        draw(pipe, "a dog", num_inference_steps=1)
        assert len(gates) == 2


def test_keys_and_values_of_a_prompt_are_computed_once_a_picture():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, targets=["unet.attn2.to_k"])
    with attach(pipe, adapter) as handle:
        layer, calls = sites(pipe)[adapter.layer_names[0]].module, []
        real = layer.with_branches
        object.__setattr__(layer, "with_branches", lambda y, x: calls.append(1) or real(y, x))
        four = draw(pipe, "a <rex>", num_inference_steps=4)
        assert len(calls) == 1
        handle.strength("<rex>", 0.5)
        half = draw(pipe, "a <rex>", num_inference_steps=4)
        assert len(calls) == 2 and not torch.equal(four, half)
        embeds = pipe.encode_prompt(["a <rex>"], "cpu", 1, False)[0]
        options = {"prompt_embeds": embeds, "guidance_scale": 1.0, "num_inference_steps": 1}
        first = draw(pipe, None, **options)
        handle.strength("<rex>", 2.0)
        assert not torch.equal(draw(pipe, None, **options), first)  # the same tensor, another strength
        with torch.no_grad():
            layer.weight.add_(0.1)
        assert not torch.equal(draw(pipe, None, **options), first)
