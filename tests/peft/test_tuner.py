"""Spectral adapters as a method of PEFT, in the real classes of PEFT, transformers and diffusers at toy size.

One test for each thing that users of PEFT do; the last ones are what is refused, in one line.
"""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fusion
import tiny
from fusion.adapters import ADAPTERS
from fusion.errors import BaseMismatch, ConfigError, FormatError, SliceConflict, UnknownName
from fusion.peft import (
    SpectralConfig,
    SpectralLinear,
    add_native_adapter,
    parameter_groups,
    save_as_lora,
    to_adapter,
)
from fusion.peft import directions as decomposition
from fusion.spectral.spectrum import decompose, residual

# PEFT 0.21 asks transformers 5.23 by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(1))


def llama(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=16, **sizes)).to(dtype).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16)).eval()


def logits(model, **options):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def train(model, steps=3, rate=1e-2, autocast=False):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def trained(**options):
    model = get_peft_model(llama(), SpectralConfig(r=4, **options))
    train(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained additive adapter, saved."""
    path = tmp_path_factory.mktemp("additive")
    trained().save_pretrained(path)
    return path


def forbid_svd(monkeypatch):
    def fail(*_args, **_options):
        raise AssertionError("an SVD was computed")

    for name in ("svd", "svd_lowrank"):
        monkeypatch.setattr(torch.linalg if name == "svd" else torch, name, fail)
    monkeypatch.setattr("fusion.peft.layer.leading_directions", fail)


def largest(difference):
    return float(difference.abs().max())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_type_trains_and_comes_back_from_its_folder_without_an_svd(kind, tmp_path, monkeypatch):
    base = logits(llama())
    model = get_peft_model(llama(), SpectralConfig(r=4, adapter_type=kind))
    assert torch.equal(logits(model), base)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".spectral_layers.default." in name
    }
    losses = train(model)
    assert losses[-1] < losses[0] and not torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    forbid_svd(monkeypatch)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_what_the_folder_has(folder):
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "SPECTRAL" and settings["slice"] == 0 and settings["basis"] == "file"
    keys = load_file(folder / "adapter_model.safetensors").keys()
    prefix = "base_model.model.model.layers.0.mlp.up_proj.spectral_layers."
    parts = {"dU", "dS", "dV", "basis.U", "basis.S", "basis.V"}
    assert {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} == parts
    assert (folder / "README.md").read_text().count("import fusion.peft") == 1


def test_the_config_is_read_by_pefts_own_class(folder):
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, SpectralConfig) and config.peft_type == config.peft_type.value == "SPECTRAL"


def test_low_cpu_mem_usage(folder):
    ways = [PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=low) for low in (True, False)]
    assert torch.equal(*map(logits, ways))


def test_disabled_it_is_the_base(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("base", [llama, gpt2])
def test_merging_is_the_sum_and_unmerging_exact(base):
    model = get_peft_model(base(), SpectralConfig(r=4))
    train(model)
    branch = logits(model)
    model.merge_adapter()
    assert largest(logits(model) - branch) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), branch)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base()) and largest(logits(merged) - branch) < 1e-5
    assert not any("spectral" in name for name, _ in merged.named_modules())
    assert {*merged.state_dict()} == {*base().state_dict()}


def test_several_adapters_own_slices_add_up_and_are_saved_apart(tmp_path):
    model = get_peft_model(llama(), SpectralConfig(r=4), adapter_name="one")
    train(model)
    only_one = logits(model)
    model.add_adapter("two", SpectralConfig(r=4, adapter_type="rotational"))
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(llama()))
    train(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), only_one)
    assert {name: config.slice for name, config in model.peft_config.items()} == {"one": 0, "two": 1}
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    again.load_adapter(tmp_path / "two", adapter_name="two")
    again.base_model.set_adapter(["one", "two"])
    assert torch.equal(logits(again), both)
    again.delete_adapter("two")
    again.set_adapter("one")
    assert torch.equal(logits(again), only_one)
    again.add_adapter("three", SpectralConfig(r=2))
    assert again.peft_config["three"].slice == 2  # directions 4 and 5: two's are free again
    with pytest.raises(SliceConflict, match="owns"):
        again.add_adapter("four", SpectralConfig(r=8, slice=0))
    with pytest.warns(UserWarning, match="directions 0-3"):
        again.load_adapter(tmp_path / "one", adapter_name="once_more")
    with pytest.raises(SliceConflict, match="narrowest"):
        again.add_adapter("five", SpectralConfig(r=30))


def test_a_base_in_bfloat16_is_decomposed_and_trained_in_float32(tmp_path):
    model = get_peft_model(llama(dtype=torch.bfloat16), SpectralConfig(r=4))
    losses = train(model)
    layer = next(module for module in model.modules() if isinstance(module, SpectralLinear)).spectral_layers["default"]
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32}
    assert losses[-1] < losses[0] and logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path)), logits(model))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(dtype=torch.bfloat16), tmp_path)), logits(model))


def test_training_under_autocast_and_casting_afterwards():
    model = get_peft_model(llama(), SpectralConfig(r=4, adapter_type="rotational"))
    losses = train(model, autocast=True)
    exact = logits(model)
    assert losses[-1] < losses[0]
    assert largest(logits(model.to(torch.bfloat16)).float() - exact) < 0.05


def test_conv1d_of_gpt2(tmp_path):
    model = get_peft_model(gpt2(), SpectralConfig(r=4))
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    layers = {name for name, module in again.named_modules() if isinstance(module, SpectralLinear)}
    again.add_adapter("second", SpectralConfig(r=4))
    adapted = {name for name, module in again.named_modules() if "second" in getattr(module, "spectral_layers", ())}
    assert len(layers) == 8 and adapted == layers


@pytest.mark.parametrize("base", [llama, gpt2])
def test_a_lora_that_peft_loads_without_this_package_has_equal_outputs(base, tmp_path):
    model = get_peft_model(base(), SpectralConfig(r=4, modules_to_save=["ln_f" if base is gpt2 else "norm"]))
    train(model)
    save_as_lora(model, tmp_path / "lora")
    again = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert type(again.peft_config["default"]) is LoraConfig and again.peft_config["default"].r == 8
    assert largest(logits(again) - logits(model)) < 1e-5
    plain = get_peft_model(base(), SpectralConfig(r=4))
    train(plain)
    peft.save_as_lora(tmp_path / "pefts", plain, rank=8)  # PEFT's own way, by an SVD of every ΔW
    if base is llama:  # of Conv1D, PEFT's way forgets fan_in_fan_out
        assert largest(logits(PeftModel.from_pretrained(base(), tmp_path / "pefts")) - logits(plain)) < 1e-4


def test_transformers_own_methods(tmp_path):
    model = llama()
    model.add_adapter(SpectralConfig(r=4))
    train(model)
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    again.disable_adapters()
    assert torch.equal(logits(again), logits(llama()))
    foreign = llama(seed=5)
    foreign.load_adapter(str(tmp_path))
    with pytest.raises(BaseMismatch, match="another base"):
        logits(foreign)


def unet_output(unet):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    prompt = torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, 7, prompt).sample


def randomise(model):
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(noise, alpha=0.02)


def test_diffusers_unet_with_convolutions_and_adapter_files_of_this_toolkit(tmp_path):
    pipe = tiny.pipeline("sd1")
    base = unet_output(pipe.unet)
    targets = ["to_k", "to_v", "proj_in", "conv1"]
    pipe.unet.add_adapter(SpectralConfig(r=4, slice=1, target_modules=targets))
    assert torch.equal(unet_output(pipe.unet), base)
    randomise(pipe.unet)
    adapted = unet_output(pipe.unet)
    pipe.unet.set_adapters("default", 0.5)
    half = unet_output(pipe.unet)
    assert min(largest(half - base), largest(half - adapted), largest(adapted - base)) > 1e-4
    pipe.unet.set_adapters("default", 1.0)
    assert torch.equal(unet_output(pipe.unet), adapted)

    adapter = to_adapter(pipe.unet)
    fusion.save(adapter, tmp_path / "unet.safetensors", "float32")
    native = tiny.pipeline("sd1")
    fusion.attach(native, fusion.load(tmp_path / "unet.safetensors"))
    assert largest(unet_output(native.unet) - adapted) < 1e-5
    back = tiny.pipeline("sd1").unet
    add_native_adapter(back, fusion.load(tmp_path / "unet.safetensors"))
    assert torch.equal(unet_output(back), adapted)
    assert {*get_peft_model_state_dict(back)} == {*get_peft_model_state_dict(pipe.unet)}


def test_rows_of_a_batch_with_adapters_of_their_own():
    model = trained()
    model.add_adapter("two", SpectralConfig(r=4))
    model.set_adapter("two")
    train(model)
    alone = {"__base__": logits(llama()), "two": logits(model)}
    model.set_adapter("default")
    alone["default"] = logits(model)
    names = ["two", "__base__", "default", "two"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        assert largest(mixed[row] - alone[name][row]) < 1e-5
    beams = {"max_new_tokens": 2, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    assert model.generate(input_ids=IDS, adapter_names=names, **beams).shape == (4, 14)
    assert torch.equal(logits(model), alone["default"])  # no hook is left
    for error, wrong in ((UnknownName, ["three"] * 4), (ConfigError, ["two"] * 3)):
        with pytest.raises(error):
            logits(model, adapter_names=wrong)
    with pytest.raises(ConfigError, match="inference"):
        model.train()(input_ids=IDS, adapter_names=names)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_trainer_resumes_from_a_checkpoint_to_the_same_bits(tmp_path):
    rows = [{"input_ids": IDS[i % 4], "labels": IDS[i % 4]} for i in range(16)]

    def run(steps, resume=None):
        model = get_peft_model(llama(), SpectralConfig(r=4))
        settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, **settings, **quiet)
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    whole = run(4)
    assert torch.equal(logits(run(4, resume=str(tmp_path / "checkpoint-2"))), logits(whole))


def test_another_name_a_copy_and_a_pickle(folder):
    model = PeftModel.from_pretrained(llama(), folder, adapter_name="other")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), folder)))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert pickle.loads(pickle.dumps(model.peft_config["other"])) == model.peft_config["other"]


def test_gradient_checkpointing_and_modules_to_save(tmp_path):
    model = get_peft_model(llama(), SpectralConfig(r=4, modules_to_save=["lm_head"]))
    model.base_model.model.activation_checkpointing_enable()
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    assert model.get_model_status().peft_types == {"default": "SPECTRAL"}
    groups = parameter_groups(model, 1e-3)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_torch_compile_in_one_graph(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    layer, x = model.base_model.model.model.layers[0].mlp, torch.randn(2, 3, 32)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_another_base_of_equal_shape_is_refused_and_a_relative_warned_of(folder):
    with pytest.raises(BaseMismatch, match=r"another base: at .*layers.0.* the residual is"):
        PeftModel.from_pretrained(llama(seed=5), folder)
    relative = llama()
    with torch.no_grad():
        for parameter in relative.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std(), alpha=0.1)
    with pytest.warns(UserWarning, match="relative"):
        PeftModel.from_pretrained(relative, folder)


# What is beyond the cases of PEFT's own methods.


def test_without_a_stored_basis_the_directions_are_computed_again(tmp_path, folder):
    model = trained(save_basis=False)
    model.save_pretrained(tmp_path)
    size = {path: (path / "adapter_model.safetensors").stat().st_size for path in (tmp_path, folder)}
    assert size[tmp_path] < 0.65 * size[folder]
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    with pytest.raises(BaseMismatch):
        PeftModel.from_pretrained(llama(seed=5), tmp_path)


def test_a_guarded_adapter_is_trained_on_with_its_guard(tmp_path):
    trained(adapter_type="guarded", guard=8).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    layer = next(module for module in again.modules() if isinstance(module, SpectralLinear)).spectral_layers["default"]
    assert layer.guard_U.shape[1] == 4  # eight less the four of its own slice


def test_learning_rates_make_up_for_small_singular_values():
    model = get_peft_model(llama(), SpectralConfig(r=4, slice=5))
    rates = {id(p): group["lr"] for group in parameter_groups(model, 1e-3) for p in group["params"]}
    for module in model.modules():
        if isinstance(module, SpectralLinear):
            layer = module.spectral_layers["default"]
            head = torch.linalg.svdvals(module.get_base_layer().weight)[:4]
            gain = float(head.square().mean().sqrt() / layer.basis.S.square().mean().sqrt())
            assert rates[id(layer.dU)] == pytest.approx(1e-3 * gain, rel=1e-4) and rates[id(layer.dS)] == 1e-3
    frozen = get_peft_model(llama(), SpectralConfig(r=4)).requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable"):
        parameter_groups(frozen, 1e-3)


def test_large_weights_are_decomposed_by_a_randomised_svd_that_is_checked(monkeypatch):
    monkeypatch.setattr(decomposition, "FULL_SVD", 64)
    left, right = (torch.linalg.qr(torch.randn(320, 320))[0] for _ in range(2))
    for decay in (0.5, 0.0):  # without any decay only the whole SVD will do
        weight = (left * torch.arange(1, 321).pow(-decay)) @ right
        whole, quick = decompose(weight, 24), decomposition.leading_directions(weight, 24)
        assert residual(weight, quick) < decomposition.LOW_RANK_TOLERANCE
        if decay:
            assert largest(quick.S - whole.S) < 1e-4 and largest(quick.V - whole.V) < 2e-2


def test_a_bar_counts_layers_where_their_directions_take_a_while(folder, monkeypatch, capsys):
    get_peft_model(llama(), SpectralConfig(r=4))
    assert not capsys.readouterr().err
    monkeypatch.setattr("fusion.peft.model._SILENCE", 0)
    PeftModel.from_pretrained(llama(), folder)  # no SVD
    assert "directions" not in capsys.readouterr().err
    model = get_peft_model(llama(), SpectralConfig(r=4))
    assert "Computing singular directions" in (shown := capsys.readouterr().err) and "/14" in shown
    assert pickle.loads(pickle.dumps(copy.deepcopy(model.base_model)))._bar is None


def test_importing_fusion_does_not_import_peft():
    code = "import sys, fusion; print('peft' in sys.modules)"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# What cannot be, in one line each.


def one_line(error):
    return "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: SpectralConfig(adapter_type="additiv"), UnknownName),
        (lambda: SpectralConfig(r=0), ConfigError),
        (lambda: SpectralConfig(slice=-1), ConfigError),
        (lambda: get_peft_model(llama(), SpectralConfig(r=4), mixed=True), ValueError),  # PEFT's own tuple of types
        (lambda: trained().add_adapter("second", LoraConfig(r=2)), ValueError),  # PEFT's own: one type in a model
        (lambda: trained().add_weighted_adapter(["default"], [1.0], "sum"), ConfigError),
        (lambda: get_peft_model(llama(), SpectralConfig(r=4, target_modules=["embed_tokens"])), ConfigError),
        (lambda: get_peft_model(llama(), SpectralConfig(r=40)), SliceConflict),
        (lambda: get_peft_model(Attention(), SpectralConfig(r=4, target_modules=["out_proj"])), ConfigError),
        (lambda: get_peft_model(packed(), SpectralConfig(r=4, target_modules=["linear"])), ConfigError),
        (lambda: peft.utils.register_peft_method(
            name="spectral", config_cls=SpectralConfig, model_cls=fusion.peft.SpectralModel), ValueError),
    ],
)  # fmt: skip
def test_refused_in_one_line(wrong, error):
    with pytest.raises(error) as raised:
        wrong()
    assert one_line(raised)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)


def packed():
    """A linear layer whose weight has codes in 8 bits with a scale somewhere, as some quantisers leave it."""
    model = nn.Module()
    model.linear = nn.Linear(16, 16).requires_grad_(False)
    model.linear.weight.data = model.linear.weight.data.to(torch.float8_e4m3fn)
    return model


def test_a_model_with_lora_is_refused_unchanged():
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    before = logits(model)
    with pytest.raises(ConfigError, match="another PEFT method"), pytest.warns(UserWarning):
        model.add_adapter(SpectralConfig(r=4, target_modules=["q_proj"]), "spectral")
    assert not any(isinstance(module, SpectralLinear) for module in model.modules())
    assert {*model.peft_config} == {"lora"} and torch.equal(logits(model), before)


def test_a_config_of_a_file_without_its_tensors_is_refused(folder):
    with pytest.raises(ConfigError, match="not its tensors"):
        logits(get_peft_model(llama(), PeftConfig.from_pretrained(folder)))


def test_an_incomplete_file_is_refused(folder):
    model = PeftModel.from_pretrained(llama(), folder)
    state = get_peft_model_state_dict(model)
    del state[next(key for key in state if key.endswith("basis.V"))]
    with pytest.raises(FormatError, match=r"lacks basis\.V"):
        peft.set_peft_model_state_dict(model, state)
    narrower = {key: tensor[..., :2] for key, tensor in get_peft_model_state_dict(model).items()}
    with pytest.raises(BaseMismatch, match="in the file"):
        peft.set_peft_model_state_dict(model, narrower)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_is_decomposed_from_dequantised_weights(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, plain, x = nn.Module(), nn.Linear(64, 128), torch.randn(8, 64)
    options = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}
    model.linear = getattr(bnb.nn, f"Linear{bits}bit" if bits == 4 else "Linear8bitLt")(64, 128, **options)
    model.linear.load_state_dict(plain.state_dict())
    model.linear.to("cpu")  # this is what quantises
    before = model.linear(x)
    adapted = get_peft_model(model, SpectralConfig(r=4, target_modules=["linear"]))
    layer = adapted.base_model.model.linear
    basis = layer.spectral_layers["default"].basis.spectrum()
    assert residual(layer.matrix(), basis) < 1e-5 < residual(plain.weight, basis)
    assert layer.get_base_layer().weight.dtype in (torch.uint8, torch.int8) and torch.equal(layer(x), before)
    randomise(adapted)
    assert largest((layer(x) - before).detach()) > 1e-2
    layer(x).square().mean().backward()
    assert layer.spectral_layers["default"].dU.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="rounded again"):
        adapted.merge_adapter()
