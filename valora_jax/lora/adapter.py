"""An adapter on the host: low-rank pairs by site and layer, and what else came with them.

A site is a kind of linear, such as `decoder.q`, with one instance a layer. Its update is

    y_TN += scale * (x_TK @ a_RK.T) @ b_RN  (+ bias_N)

T tokens, K input width, N output width, R rank, V vocabulary rows, D model width, C classes.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraSite:
    """A kind of linear that can carry LoRA.

    `module` is its path in the checkpoint's canonical names with `{i}` for the layer, such as
    `model.language_model.layers.{i}.self_attn.q_proj`; without `{i}` there is one instance.
    """

    name: str
    module: str
    layers: int
    in_width: int
    out_width: int

    def module_of(self, layer: int) -> str:
        return self.module.replace("{i}", str(layer))

    def layer_in(self, module: str) -> int | None:
        """The layer number in a path of this kind, in the model or not; None for other paths."""
        pattern = re.escape(self.module).replace(re.escape("{i}"), "([0-9]+)")
        if (match := re.fullmatch(pattern, module)) is None:
            return None
        return int(match[1]) if match.groups() else 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTarget:
    """What a model offers to adapters.

    `canonical_name` maps a module path or tensor name of any key layout to the names that `sites`
    and `head_module` use, and returns a name it does not know as it is.
    """

    sites: Sequence[LoraSite]
    head_module: str
    width: int
    vocab_rows: int
    canonical_name: Callable[[str], str]

    def instances(self) -> dict[str, tuple[LoraSite, int]]:
        """Module path -> site and layer, for every linear of the model."""
        return {
            site.module_of(layer): (site, layer)
            for site in self.sites
            for layer in range(site.layers)
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraPair:
    """One low-rank update. Rank rows are contiguous in both arrays.

    `a_RK` and `b_RN` are float32 or bfloat16. `bias_N`, float32, is added unscaled; only a
    replaced linear brings one.
    """

    a_RK: np.ndarray
    b_RN: np.ndarray
    scale: float
    bias_N: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a_RK.shape[0]

    def arrays(self) -> Iterable[np.ndarray]:
        return (a for a in (self.a_RK, self.b_RN, self.bias_N) if a is not None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Linear:
    """A whole linear: weight as checkpoints store it, and bias if the linear has one."""

    weight_NK: np.ndarray
    bias_N: np.ndarray | None = None

    def arrays(self) -> Iterable[np.ndarray]:
        return (a for a in (self.weight_NK, self.bias_N) if a is not None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskHead:
    """A new linear on the last hidden state (after the final norm): C numbers a request."""

    module: str
    weight_CD: np.ndarray
    bias_C: np.ndarray | None = None

    def arrays(self) -> Iterable[np.ndarray]:
        return (a for a in (self.weight_CD, self.bias_C) if a is not None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """Everything an adapter folder binds to a model; arrays are never written to.

    `replaced_linears` are full weights in place of the base's, and `base_head_copy_VD` is the base
    head that PEFT writes beside a LoRA on it. What they mean for the device depends on the base:
    `combine.with_base` turns both into the other fields, and a server must call it.
    """

    name: str
    source: str
    pairs: Mapping[str, Mapping[int, LoraPair]]
    replaced_linears: Mapping[str, Mapping[int, Linear]] = dataclasses.field(default_factory=dict)
    replaced_head_VD: np.ndarray | None = None
    base_head_copy_VD: np.ndarray | None = None
    task_head: TaskHead | None = None

    def rank_of(self, site: str) -> int:
        """The largest rank over the layers of a site; 0 where the adapter does not touch it."""
        return max((pair.rank for pair in self.pairs.get(site, {}).values()), default=0)

    @property
    def needs_base(self) -> bool:
        """Whether `combine.with_base` has something to do."""
        return bool(self.replaced_linears) or self.base_head_copy_VD is not None

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for _, array in self._labelled_arrays())

    def bound(self) -> str:
        """One line for people: what is bound, such as `decoder q, v of 32 layers, rank 8`."""
        parts = [*_described(self.pairs), *_described(self.replaced_linears)]
        if self.replaced_head_VD is not None:
            parts.append(f"replaced head of {self.replaced_head_VD.shape[0]} rows")
        if (head := self.task_head) is not None:
            parts.append(f"task head {head.module} of {head.weight_CD.shape[0]} classes")
        return "; ".join(parts)

    def fingerprint(self) -> str:
        """A hash of the contents, equal for equal adapters whatever their names."""
        digest = hashlib.blake2b(digest_size=16)
        for label, array in self._labelled_arrays():
            digest.update(f"{label} {array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def _labelled_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        for site, layers in sorted(self.pairs.items()):
            for layer, pair in sorted(layers.items()):
                for array in pair.arrays():
                    yield f"{site} {layer} {pair.scale!r}", array
        for site, layers in sorted(self.replaced_linears.items()):
            for layer, linear in sorted(layers.items()):
                for array in linear.arrays():
                    yield f"replaced {site} {layer}", array
        for label in ("replaced_head_VD", "base_head_copy_VD"):
            if (head := getattr(self, label)) is not None:
                yield label, head
        if self.task_head is not None:
            for array in self.task_head.arrays():
                yield f"task head {self.task_head.module}", array


def _described(bound: Mapping[str, Mapping[int, LoraPair | Linear]]) -> list[str]:
    """Sites with the same layers and ranks share a phrase: `decoder q, v of 32 layers, rank 8`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, layers in bound.items():
        part, _, kind = site.rpartition(".")
        groups.setdefault((part, _extent(layers)), []).append(kind)
    return [f"{part} {', '.join(kinds)}".strip() + how for (part, how), kinds in groups.items()]


def _extent(layers: Mapping[int, LoraPair | Linear]) -> str:
    numbers = sorted(layers)
    if numbers == list(range(len(numbers))):
        where = f" of {len(numbers)} layer{'s' * (len(numbers) > 1)}"
    else:
        where = f" of layers {', '.join(map(str, numbers))}"
    ranks = sorted({item.rank for item in layers.values() if isinstance(item, LoraPair)})
    if not ranks:
        return f"{where}, replaced"
    return f"{where}, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
