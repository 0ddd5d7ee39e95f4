"""Gates act in compiled models, bit for bit as they do uncompiled: no prompt, concept or strength is compiled in."""

import shutil
from contextlib import ExitStack

import pytest
import torch

import fusion
import tiny
from fusion.errors import ConfigError
from fusion.models.attachment import attach
from fusion.models.layer_sites import components
from trained import attached, draw, everywhere, trained_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
COMPILERS = {
    "whole": lambda pipe, **o: setattr(pipe, "unet", torch.compile(pipe.unet, **o)),
    "whole, one graph": lambda pipe, **o: setattr(pipe, "unet", torch.compile(pipe.unet, fullgraph=True, **o)),
    "in place": lambda pipe, **o: pipe.unet.compile(**o),
    "regional": lambda pipe, **o: pipe.unet.compile_repeated_blocks(fullgraph=True, **o),
    "text encoder": lambda pipe, **o: pipe.text_encoder.compile(**o),
}
# The first call has no concept, or others than those that follow.
ORDERS = (
    ("a dog", "a <a>", "the snow and a <b>", "a <c>"),
    ("the snow and a <b>", "a <a> and a <b>", "a dog", "<c>"),
    ("a <a> and a <b>", "<c>", "<b>", "a dog"),
    ("<c> in the snow", "a dog", "<b> <a>", "a <a>"),
)


def three(pipe):
    targets = {"<a>": None, "<b>": None, "<c>": everywhere(pipe)}
    return [trained_adapter(pipe, token, k=k, targets=t) for k, (token, t) in enumerate(targets.items())]


def pictures(pipe, prompts, **options):
    return [draw(pipe, prompt, num_inference_steps=1, **options) for prompt in prompts]


@pytest.fixture(scope="module")
def expected():
    pipe = tiny.pipeline("sd1")
    adapters = three(pipe)
    with attached(pipe, *adapters):
        by_prompt = {prompt: pictures(pipe, [prompt])[0] for order in ORDERS for prompt in order}
    assert all(not torch.equal(p, by_prompt["a dog"]) for prompt, p in by_prompt.items() if "<" in prompt)
    return adapters, by_prompt


@pytest.mark.parametrize(
    ("how", "order"),
    [
        *(("regional", order) for order in (ORDERS[0], ORDERS[3])),
        *(pytest.param("regional", order, marks=pytest.mark.long) for order in ORDERS[1:3]),
        ("text encoder", ORDERS[0]),
        pytest.param("whole", ORDERS[0], marks=pytest.mark.slow),
        pytest.param("whole, one graph", ORDERS[0], marks=pytest.mark.long),
        pytest.param("in place", ORDERS[1], marks=pytest.mark.long),
        *(pytest.param("whole", order, marks=pytest.mark.long) for order in ORDERS[1:]),
    ],
)
def test_every_order_of_prompts_is_drawn_as_without_a_compiler(how, order, expected):
    torch._dynamo.reset()
    adapters, by_prompt = expected
    pipe = tiny.pipeline("sd1")
    COMPILERS[how](pipe, backend="eager")
    with attached(pipe, *adapters):
        drawn = pictures(pipe, order)
    assert [torch.equal(picture, by_prompt[prompt]) for prompt, picture in zip(order, drawn, strict=True)] == [True] * 4
    assert torch.equal(draw(pipe, "a dog", num_inference_steps=1), by_prompt["a dog"])


def test_twenty_changes_of_concepts_strengths_and_prompts_compile_nothing_anew(expected):
    torch._dynamo.reset()
    adapters = expected[0][:2]
    pipe, plain = tiny.pipeline("sd1"), tiny.pipeline("sd1")
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    prompts = ("a dog", "a <a> and a <b>", "the snow and a <b>", "<a>")
    graphs = None
    for change in range(20):
        chosen = [a for a, there in zip(adapters, ((1, 1), (1, 0), (0, 1))[change % 3], strict=True) if there]
        with ExitStack() as attached:
            for adapter in chosen[:: 1 - 2 * (change % 2)]:
                for each in (pipe, plain):
                    handle = attached.enter_context(attach(each, adapter))
                    handle.strength(adapter.info.name, (1.0, 0.5, 0.0, -2.0)[change % 4])
            prompt = prompts[change % 4].replace("<a>", "<a>" if adapters[0] in chosen else "a dog")
            assert torch.equal(*(draw(p, prompt, num_inference_steps=1, guidance_scale=1.0) for p in (pipe, plain)))
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        graphs = graphs or compiled
        assert compiled == graphs


@pytest.mark.long
def test_gradients_reach_the_branches_of_a_compiled_unet():
    torch._dynamo.reset()
    gradients = []
    for compiled in (False, True):
        pipe = tiny.pipeline("sd1")
        for part in components(pipe).values():
            part.requires_grad_(False)
        torch.manual_seed(0)
        adapter = trained_adapter(pipe)
        if compiled:
            pipe.unet.compile(backend="eager")
        with attach(pipe, adapter, live=True):
            states = pipe.encode_prompt(["a <rex>"], "cpu", 1, False)[0]
            noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            loss = pipe.unet(noisy, 10, encoder_hidden_states=states).sample.square().mean()
            gradients.append(torch.autograd.grad(loss, list(adapter.parameters())))
    assert all(map(torch.equal, *gradients)) and any(g.any() for g in gradients[0])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_draws_what_the_eager_model_draws(expected):
    torch._dynamo.reset()
    adapters, by_prompt = expected
    pipe = tiny.pipeline("sd1")
    fusion.compile_unet(pipe)
    with attached(pipe, *adapters):
        for prompt, picture in zip(ORDERS[0], pictures(pipe, ORDERS[0]), strict=True):
            assert torch.allclose(picture, by_prompt[prompt], atol=1e-4)


def test_a_missing_compiler_is_said_before_anything_is_drawn(monkeypatch):
    pipe = tiny.pipeline("sd1")
    monkeypatch.setattr("shutil.which", {}.get)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        fusion.compile_unet(pipe)
    monkeypatch.setattr(type(pipe), "device", torch.device("cuda"))  # as on Windows
    monkeypatch.setattr("shutil.which", {"cmd.exe": "cmd.exe"}.get)
    monkeypatch.setattr("fusion.models.compilation.find_spec", {}.get)
    with pytest.raises(ConfigError, match=r"pip install triton-windows$"):
        fusion.compile_unet(pipe)
