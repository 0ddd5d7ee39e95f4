"""A trained adapter as a value: the contents of its file, without a model."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fusion.adapters.layer import AdapterLayer
from fusion.config import MAX_STRENGTH, TOKEN
from fusion.errors import BaseMismatch, ConfigError, FusionError, TokenConflict
from fusion.spectral.delta import Delta
from fusion.spectral.slices import SpectralSlice


@dataclass(frozen=True)
class Concept:
    """What the user trains: its token in prompts, and the noun its embedding starts from."""

    token: str  # "<dog>"
    noun: str = ""  # "dog"
    vectors: int = 1  # embedding rows, so the number of text positions the token takes

    def __post_init__(self) -> None:
        if not TOKEN.fullmatch(self.token):
            raise TokenConflict(
                f"'{self.token}' cannot be a concept token: write it in angle brackets with a-z, 0-9, - and _ only, "
                "like <dog>."
            )
        if self.vectors < 1:
            raise TokenConflict(f"{self.token} needs at least 1 embedding vector, got {self.vectors}.")

    @property
    def pieces(self) -> tuple[str, ...]:
        """The tokenizer's words for its vectors, in diffusers' convention: <dog>, <dog>_1, <dog>_2 …"""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.vectors)))


@dataclass(frozen=True)
class BaseInfo:
    """The base model an adapter was trained on."""

    family: str  # "sd1", "sd2" or "sdxl"
    name: str  # last part of the folder or hub id; of a single file, its name without the ending
    prediction: str  # "epsilon" or "v_prediction"
    digest: str = ""  # of the weights, in whatever precision; empty where an earlier version did not store it

    def is_same(self, other: "BaseInfo") -> bool:
        """Whether both are one base: by their weights where both are known, else by family and name."""
        if self.digest and other.digest:
            return self.digest == other.digest
        return (self.family, self.name) == (other.family, other.name)

    def lasting_settings(self) -> dict[str, object]:
        """What has to be the same for a training to be resumed."""
        base = {"family": self.family, "name": self.name, "prediction": self.prediction}
        return {"base": base, "base_digest": self.digest}


@dataclass(frozen=True)
class Provenance:
    """How an adapter came to be."""

    tool: str = ""
    steps: int = 0
    seed: int = 0
    parents: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    run: str = ""  # random id of the training, the same in all its checkpoints


@dataclass(frozen=True)
class AdapterInfo:
    name: str
    base: BaseInfo | None  # None: imported from a file that does not name it
    concepts: tuple[Concept, ...] = ()
    provenance: Provenance = Provenance()


@dataclass(frozen=True)
class Branch:
    """One separately trained change: layers of one type, with its strength and its gate.

    `gate` lists the tokens whose positions let the branch act; empty, it acts everywhere.
    """

    name: str
    type: str  # a row of LAYER_TYPES
    layers: Mapping[str, AdapterLayer]  # canonical layer name -> layer
    slices: tuple[SpectralSlice, ...] = ()
    targets: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    strength: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """Branches, the embeddings of their concept tokens, and their provenance."""

    info: AdapterInfo
    branches: tuple[Branch, ...]
    tokens: Mapping[str, Mapping[str, Tensor]]  # token -> component -> (vectors, dim)
    digest_cache: "DigestCache | None" = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [branch.name for branch in self.branches]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TokenConflict(f"Two branches of '{self.info.name}' are called {sorted(twice)[0]!r}; rename one.")
        tokens = [concept.token for concept in self.info.concepts]
        if twice := {token for token in tokens if tokens.count(token) > 1}:
            raise TokenConflict(f"Two concepts of '{self.info.name}' are called {sorted(twice)[0]}; rename one.")
        known = set(tokens)
        for branch in self.branches:
            if unknown := set(branch.gate) - known:
                raise TokenConflict(f"Branch {branch.name!r} is gated by {sorted(unknown)[0]}, which has no concept.")

    @property
    def layers(self) -> Mapping[str, AdapterLayer]:
        """The layers of an adapter of one branch."""
        if len(self.branches) != 1:
            raise FusionError(
                f"'{self.info.name}' has {len(self.branches)} branches; read .branches, or .deltas() for their sum."
            )
        return self.branches[0].layers

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Every layer any branch changes, in the order of first appearance."""
        return tuple(dict.fromkeys(name for branch in self.branches for name in branch.layers))

    @property
    def gated(self) -> bool:
        """Whether any branch acts at its own tokens only."""
        return any(branch.gate for branch in self.branches)

    @property
    def slices(self) -> tuple[SpectralSlice, ...]:
        return tuple(part for branch in self.branches for part in branch.slices)

    @property
    def rank(self) -> int:
        """The largest rank of ΔW over all layers."""
        return max((delta.rank for delta in self.deltas().values()), default=0)

    @property
    def needs_base(self) -> bool:
        """Whether some ΔW depends on the weights of the base (DoRA): `with_base_weights` provides them."""
        return any(layer.needs_base for branch in self.branches for layer in branch.layers.values())

    def deltas(self) -> dict[str, Delta]:
        """ΔW of every layer: Σ strength · Δ over branches, as if every gate were open. float32, no gradient.

        Raises BaseMismatch where they depend on the weights of a base that are not known.
        """
        if self.needs_base:
            raise BaseMismatch(
                f"'{self.info.name}' is a DoRA, whose change depends on its base: name that with --base, "
                "or from Python take fusion.with_base_weights(pipe, adapter)."
            )
        total: dict[str, Delta] = {}
        with torch.no_grad():
            for branch in self.branches:
                for name, layer in branch.layers.items():
                    delta = float32(layer).delta().detach() * branch.strength
                    total[name] = total[name] + delta if name in total else delta
        return total

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors of all layers; token embeddings not among them."""
        for branch in self.branches:
            for layer in branch.layers.values():
                yield from layer.parameters()

    def digest(self) -> str:
        """SHA-256 over everything that changes a picture: strengths, gates, layers and embeddings."""
        return self.digest_cache.digest(self) if self.digest_cache else digest_of(self)

    def renamed(self, tokens: Mapping[str, str]) -> "Adapter":
        """The same adapter with other tokens: `{"<dog>": "<rex>"}`. Raises TokenConflict for an unknown one."""
        owned = [concept.token for concept in self.info.concepts]
        if unknown := [token for token in tokens if token not in owned]:
            raise TokenConflict(f"'{self.info.name}' has no token {unknown[0]}; it has {', '.join(owned) or 'none'}.")
        new = {token: tokens.get(token, token) for token in owned}
        concepts = tuple(replace(c, token=new[c.token]) for c in self.info.concepts)
        branches = tuple(
            replace(b, name=new.get(b.name, b.name), gate=tuple(new[t] for t in b.gate)) for b in self.branches
        )
        return Adapter(
            replace(self.info, concepts=concepts), branches, {new[t]: rows for t, rows in self.tokens.items()}
        )


def digest_of(adapter: Adapter) -> str:
    """`Adapter.digest`, computed anew."""
    sha = hashlib.sha256()
    for branch in adapter.branches:
        sha.update(repr((branch.type, branch.gate, branch.strength)).encode())
        for name in sorted(branch.layers):
            for key, tensor in sorted(branch.layers[name].state_dict().items()):
                sha.update(f"{name}.{key}".encode() + content(tensor))
    for token in sorted(adapter.tokens):
        for component, rows in sorted(adapter.tokens[token].items()):
            sha.update(f"{token} {component}".encode() + content(rows))
    return sha.hexdigest()


class DigestCache:
    """The digest of an adapter, for as long as it consists of the same tensors and none of them changes."""

    def __init__(self) -> None:
        # State, digest, and the tensors: kept alive, so that no other tensor has the id of one of them.
        self._latest: tuple[object, str, list[Tensor]] = (None, "", [])

    def digest(self, adapter: Adapter) -> str:
        layers = [layer for branch in adapter.branches for layer in branch.layers.values()]
        tensors = [tensor for layer in layers for tensor in layer.tensors()]
        tensors += [row for rows in adapter.tokens.values() for row in rows.values()]
        if any(tensor.is_inference() for tensor in tensors):  # their changes are not counted
            return digest_of(adapter)
        names = [(branch.type, branch.gate, branch.strength, *branch.layers) for branch in adapter.branches]
        names += [(token, *rows) for token, rows in adapter.tokens.items()]
        versions = [(id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors]
        # Fused optimizers do not count versions up, but move the first number of every layer.
        firsts = [next(layer.parameters()).detach().reshape(-1)[:1].tolist() for layer in layers]
        state = (names, versions, firsts)
        latest = self._latest
        if state != latest[0]:
            latest = self._latest = (state, digest_of(adapter), tensors)
        return latest[1]


def float32(layer: AdapterLayer) -> AdapterLayer:
    """The layer itself when it computes in float32 or better, else a copy in float32: only files are in half."""
    state = layer.state_dict()
    if all(torch.promote_types(t.dtype, torch.float32) == t.dtype for t in state.values()):
        return layer
    return type(layer).from_tensors({name: tensor.float() for name, tensor in state.items()})


def content(tensor: Tensor) -> bytes:
    """Shape, dtype and exact bits."""
    raw = tensor.detach().cpu().contiguous()
    return (
        f"{tuple(raw.shape)} {raw.dtype}".encode() + raw.flatten().view(torch.uint8).numpy().tobytes()
        if raw.numel()
        else b""
    )


def checked_strengths(adapters: Sequence[Adapter], strengths: Sequence[float] | None) -> list[float]:
    """One strength for each adapter, 1 where none are given. Raises ConfigError for another number or no number."""
    values = [1.0] * len(adapters) if strengths is None else [float(strength) for strength in strengths]
    if len(values) != len(adapters):
        raise ConfigError(f"Give one strength for each of the {len(adapters)} adapters; got {len(values)}.")
    if wrong := [value for value in values if not abs(value) <= MAX_STRENGTH]:  # NaN is not
        bounds = f"from -{MAX_STRENGTH} to {MAX_STRENGTH}"
        raise ConfigError(f"A strength is a number {bounds}, such as 0.8; got {wrong[0]:g}.")
    return values


def nouns(adapters: Iterable[Adapter]) -> dict[str, str]:
    """The noun of every concept by its token; "thing" where the file has none."""
    return {concept.token: concept.noun or "thing" for adapter in adapters for concept in adapter.info.concepts}
