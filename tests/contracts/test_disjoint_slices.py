"""What disjoint slices promise, and what they do not (laws 7 and 9)."""

import itertools

import pytest
import torch

from fusion.adapters import ADAPTERS
from fusion.adapters.layer import LayerOptions
from fusion.methods import METHODS
from fusion.spectral.interference import cosines, gram
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import decompose
from trained import moved

ORTHOGONAL = ("rotational", "core", "singular_values", "orthogonal")
LAYOUTS = {
    "contiguous": [SpectralSlice.contiguous(k, 4) for k in range(6)],
    "strided": [SpectralSlice.strided(k, 4, 6) for k in range(6)],
}


def trained_on(kind, weight, slices, scale=0.3):
    spectrum = decompose(weight)
    options = LayerOptions(guard=weight.shape[1])
    return [moved(ADAPTERS[kind].fresh(weight, part, spectrum=spectrum, options=options), scale) for part in slices]


def worst_cosine(layers):
    matrix = cosines(gram([layer.delta().detach() for layer in layers]))
    return float((matrix - torch.eye(len(layers))).abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("kind", ["additive", "guarded", "rotational", "core", "singular_values"])
def test_the_joint_spectral_merge_is_the_direct_sum(kind, shape, layout):
    weight = torch.randn(shape)
    layers = trained_on(kind, weight, LAYOUTS[layout])
    U, S, V = (t.double() for t in decompose(weight))
    M = torch.diag(S)
    columns_U, columns_V = U.clone(), V.clone()
    for layer, part in zip(layers, LAYOUTS[layout], strict=True):
        at = torch.tensor(part.indices)
        t = {name: tensor.double() for name, tensor in layer.state_dict().items()}
        if kind in ("additive", "guarded"):
            columns_U[:, at] += t["dU"]
            columns_V[:, at] += t["dV"]
            M[at, at] += t["dS"]
        else:  # everything these types do is a core between their own singular vectors
            M[at[:, None], at[None, :]] += U[:, at].T @ layer.delta().dense().double() @ V[:, at]
    joint = columns_U @ M @ columns_V.T - (U * S) @ V.T
    total = METHODS["direct_sum"]("layer", [layer.delta() for layer in layers], [1.0] * len(layers)).dense()
    assert (total - joint).norm() <= 1e-5 * joint.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_these_types_are_orthogonal_on_disjoint_slices(kind, layout):
    assert worst_cosine(trained_on(kind, torch.randn(48, 40), LAYOUTS[layout], scale=1.0)) < 1e-6


@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_and_not_on_the_same_slice(kind):
    same = [SpectralSlice.contiguous(0, 4)] * 2
    assert worst_cosine(trained_on(kind, torch.randn(48, 40), same)) > 1e-3


def test_orthogonal_adaptation_reads_through_different_rows():
    first, second = trained_on("orthogonal", torch.randn(48, 40), LAYOUTS["strided"][:2])
    crossed = first.delta().dense() @ second.delta().dense().T
    assert crossed.norm() < 1e-6 * first.delta().norm() * second.delta().norm()


@pytest.mark.parametrize("shape", [(48, 40), (40, 48)])
def test_guarding_removes_the_first_order_overlap_of_additive_changes(shape):
    """Both pull in each other's directions as far as their type lets them."""
    weight = torch.randn(shape)
    spectrum, found = decompose(weight), {}
    slices = LAYOUTS["contiguous"][:2]
    for kind in ("additive", "guarded"):
        layers = trained_on(kind, weight, slices, scale=0)
        for layer, other in itertools.permutations(range(2)):
            U, V = (m[:, list(slices[other].indices)] for m in (spectrum.U, spectrum.V))
            with torch.no_grad():
                layers[layer].dU.copy_(0.01 * (U @ torch.ones(4, 4) + torch.randn_like(layers[layer].dU)))
                layers[layer].dV.copy_(0.01 * (V @ torch.ones(4, 4) + torch.randn_like(layers[layer].dV)))
        found[kind] = worst_cosine(layers)
    assert found["guarded"] <= 1e-3
    assert found["additive"] > 50 * found["guarded"]


def test_a_guarded_layer_saves_what_acts_and_needs_no_guard_to_load():
    weight = torch.randn(48, 40)
    (layer,) = trained_on("guarded", weight, LAYOUTS["contiguous"][1:2])
    spectrum, state = decompose(weight), layer.state_dict()
    assert not [name for name in state if "guard" in name]
    others = [i for i in range(40) if i not in LAYOUTS["contiguous"][1].indices]
    assert (spectrum.U[:, others].T @ state["dU"]).abs().max() < 1e-5
    assert (spectrum.V[:, others].T @ state["dV"]).abs().max() < 1e-5


def test_what_additive_changes_share_is_measured_and_can_be_anything():
    """Disjoint slices are no promise for this type: two concepts can learn the same matrix."""
    weight = torch.randn(48, 40)
    layers = trained_on("additive", weight, LAYOUTS["contiguous"][:2], scale=0)
    direction = torch.randn(48, 1)
    with torch.no_grad():
        for layer in layers:
            layer.dU.copy_(100 * direction @ torch.ones(1, 4))
            layer.dV.copy_(torch.randn(40, 1) @ torch.ones(1, 4) * 100)
        layers[1].dV.copy_(layers[0].dV)
    assert worst_cosine(layers) > 0.99
