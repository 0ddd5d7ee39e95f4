"""Gated concepts on shared slices: tokens keep them apart as disjoint slices cannot, so a spectrum has room for any
number of them.
"""

import torch

import fusion
import tiny
from fusion.library.library_folder import Library
from fusion.models.pipelines import base_info
from trained import attached, draw, trained_adapter


def test_concepts_on_shared_slices_are_exact_alone_and_leave_the_base_as_it_is(tmp_path):
    pipe, library, count, slots = tiny.pipeline("sd1"), Library(tmp_path), 11, 4
    for number in range(count):
        with library.reserve(base_info(pipe), 8, capacity=8 * slots, gated=True, share=True) as reservation:
            k = reservation.slice.start // 8
            adapter = trained_adapter(pipe, f"<pet-{number}>", k=k, rank=8, targets=["unet.attn2", "text_encoder"])
            library.save(adapter, f"pet-{number}", "float32")
    owners = [entry.slice.start // 8 for entry in library.slice_map(base_info(pipe))]
    assert sorted(owners.count(k) for k in range(slots)) == [2, 3, 3, 3]
    adapters = [fusion.load(entry.path) for entry in library.adapters()]
    assert fusion.compatibility(adapters).verdict == "compatible"
    alone = {}
    for adapter in adapters:
        prompt = f"a {adapter.info.concepts[0].token} in the snow"
        with attached(pipe, adapter):
            alone[prompt] = draw(pipe, prompt)
    base = draw(pipe)
    with attached(pipe, *adapters):
        assert torch.equal(draw(pipe), base)
        assert all(torch.equal(draw(pipe, prompt), picture) for prompt, picture in alone.items())
    with attached(pipe, fusion.fuse(adapters)):
        assert torch.equal(draw(pipe), base)
        assert all(torch.equal(draw(pipe, prompt), picture) for prompt, picture in alone.items())
