"""In half precision, slices are those of the weights that the base's files store."""

import pytest
import torch
from toy_training import config, run

import fusion
import tiny
from fusion.errors import ConfigError
from fusion.models.layer_sites import sites
from fusion.models.stored_weights import StoredWeights

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny.pipeline("sd2").save_pretrained(folder)
    return folder


def test_slices_in_half_precision_are_those_of_the_files(folder, pictures, caplog):
    """What a GPU does, on a CPU: the base opened in bfloat16 is taught, and draws, as it was opened."""
    settings = config(pictures, max_train_steps=1)
    exact, adapters = fusion.open_pipeline(folder, device="cpu"), []
    half = fusion.open_pipeline(folder, device="cpu", dtype="bfloat16")
    for pipe, precision in ((exact, "no"), (half, "bf16")):
        steps, _ = run(pipe, settings)
        adapters.append(steps[-1].adapter)
        assert adapters[-1].info.provenance.settings["mixed_precision"] == precision
    one, two = ({n: layer.basis.spectrum() for n, layer in adapter.layers.items()} for adapter in adapters)
    assert all(torch.equal(*parts) for name in one for parts in zip(one[name], two[name], strict=True))
    assert not caplog.records
    drawing = fusion.GenerationConfig(prompt="a <dog>", num_inference_steps=1)
    assert fusion.generate(half, drawing, [adapters[0]])[0].image.size == (16, 16)  # and fits without a warning
    assert not caplog.records


@pytest.mark.slow
def test_a_pipeline_in_half_precision_that_names_no_files_gets_one_warning(folder, pictures, caplog):
    for pipe in (tiny.pipeline("sd1"), fusion.open_pipeline(folder, device="cpu")):
        with torch.no_grad():
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(2)  # unlike the files'
        settings = config(pictures, max_train_steps=1, slice=0)
        run(pipe.to(torch.bfloat16), settings)
    own = [record.getMessage() for record in caplog.records if record.name.startswith("fusion")]
    first, second = (message.split(": ")[1].split(" slices")[0] for message in own)
    assert first.split(" of ")[0] == first.split(" of ")[1] and second.startswith("1 of ")


def test_float16_needs_a_scaler(pictures):
    pipe = tiny.pipeline("sd1").to(torch.float16)
    for precision in ("auto", "no", "bf16"):
        with pytest.raises(ConfigError, match="without a scaler"):
            next(fusion.train(pipe, config(pictures, mixed_precision=precision)))
    stored = StoredWeights(pipe)
    assert all(
        torch.equal(stored.matrix(n, site), site.module.weight.flatten(1).float()) for n, site in sites(pipe).items()
    )
