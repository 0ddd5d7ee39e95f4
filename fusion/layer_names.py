"""Canonical names of layers, as strings: the component, then the path inside it.

`unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`, `text_encoder.encoder.layers.0.self_attn.q_proj`. The
levels that come and go are left out: `text_model.` of older transformers, `_orig_mod.` of torch.compile, `module.` of
data parallelism, `base_layer.` of PEFT. Nothing here needs torch.
"""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_OPTIONAL_LEVELS = {"text_model", "_orig_mod", "module", "base_layer"}


def canonical(component: str, path: str) -> str:
    """The canonical name of the module at `path` below a component."""
    return ".".join([component, *(level for level in path.split(".") if level not in _OPTIONAL_LEVELS)])


def component_of(layer: str) -> str:
    return layer.partition(".")[0]
