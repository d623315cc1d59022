"""Arithmetic on adapters: weighted sums, and replaced weights as differences from the base.

K input width, N output width, R rank, V vocabulary rows, D model width.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from valora_jax.lora.adapter import Adapter, Linear, LoraPair, TaskHead

Kind = Literal["cat", "linear"]
_Weighted = Sequence[tuple[LoraPair, float]]


def combine(name: str, parts: Sequence[tuple[Adapter, float]], *, kind: Kind = "cat") -> Adapter:
    """Makes one adapter of several, each with a weight.

    "cat" is the exact sum of the updates, sum_i w_i s_i B_i A_i: ranks are concatenated and the
    factors go into B, in float32. "linear" is PEFT's formula, which mixes the factors themselves
    (A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i, B = sum_i sqrt|w_i s_i| B_i), so it has cross terms
    between the parts; it keeps the rank, which must be equal.

    A task head is taken from the one part that has it, whatever that part's weight. A replaced
    `lm_head` is taken from the one part that has it if its weight is 1, since W + 1 * (W' - W) is
    W' for every base W; other weights would need the base.

    Raises:
      ValueError: no parts, weights that are no finite numbers, parts that still need the base,
        several heads, or different ranks in "linear".
    """
    if not parts:
        raise ValueError(f"adapter {name!r} combines nothing; give at least one part")
    for adapter, weight in parts:
        if not math.isfinite(weight):
            raise ValueError(f"adapter {adapter.name!r} has the weight {weight}, want a number")
        if adapter.needs_base:
            raise ValueError(f"adapter {adapter.name!r} has replaced weights; call with_base first")
    join = {"cat": _concatenated, "linear": _mixed}[kind]
    return Adapter(
        name=name,
        source=f"{kind} of " + ", ".join(f"{weight:g} * {a.name}" for a, weight in parts),
        pairs={
            site: {layer: join(f"{site} {layer}", pairs) for layer, pairs in layers.items()}
            for site, layers in _weighted_pairs(parts).items()
        },
        replaced_head_VD=_only_head(parts),
        task_head=_only_task_head(parts),
    )


def _weighted_pairs(parts: Sequence[tuple[Adapter, float]]) -> dict[str, dict[int, list]]:
    out: dict[str, dict[int, list]] = {}
    for adapter, weight in parts:
        for site, layers in adapter.pairs.items():
            for layer, pair in layers.items():
                out.setdefault(site, {}).setdefault(layer, []).append((pair, weight))
    return out


def _concatenated(_where: str, pairs: _Weighted) -> LoraPair:
    if len(pairs) == 1:  # nothing to fold, so nothing is rounded
        pair, weight = pairs[0]
        bias_N = _bias_sum(pairs)
        return dataclasses.replace(pair, scale=weight * pair.scale, bias_N=bias_N)
    return LoraPair(
        a_RK=np.concatenate([pair.a_RK for pair, _ in pairs]),
        b_RN=np.concatenate(
            [
                np.float32(weight * pair.scale) * pair.b_RN.astype(np.float32)
                for pair, weight in pairs
            ]
        ),
        scale=1.0,
        bias_N=_bias_sum(pairs),
    )


def _mixed(where: str, pairs: _Weighted) -> LoraPair:
    if len(ranks := {pair.rank for pair, _ in pairs}) > 1:
        raise ValueError(
            f"{where} has the ranks {sorted(ranks)}; 'linear' needs equal ones, or 'cat'"
        )
    if any(pair.bias_N is not None for pair, _ in pairs):
        raise ValueError(f"{where} has a bias, which 'linear' cannot mix; use 'cat'")
    factors = [weight * pair.scale for pair, weight in pairs]
    roots = [np.float32(math.sqrt(abs(factor))) for factor in factors]
    signed = [np.float32(math.copysign(r, f)) for r, f in zip(roots, factors, strict=True)]
    a = [s * pair.a_RK.astype(np.float32) for s, (pair, _) in zip(signed, pairs, strict=True)]
    b = [r * pair.b_RN.astype(np.float32) for r, (pair, _) in zip(roots, pairs, strict=True)]
    return LoraPair(a_RK=np.sum(a, axis=0), b_RN=np.sum(b, axis=0), scale=1.0)


def _bias_sum(pairs: _Weighted) -> np.ndarray | None:
    biases = [np.float32(weight) * p.bias_N for p, weight in pairs if p.bias_N is not None]
    return np.sum(biases, axis=0) if biases else None


def _only_head(parts: Sequence[tuple[Adapter, float]]) -> np.ndarray | None:
    having = [(a, weight) for a, weight in parts if a.replaced_head_VD is not None]
    if not having:
        return None
    if len(having) > 1 or having[0][1] != 1:
        listed = ", ".join(f"{weight:g} * {a.name}" for a, weight in having)
        raise ValueError(f"only one part may replace the head, and with weight 1; got {listed}")
    return having[0][0].replaced_head_VD


def _only_task_head(parts: Sequence[tuple[Adapter, float]]) -> TaskHead | None:
    having = [adapter for adapter, _ in parts if adapter.task_head is not None]
    if len(having) > 1:
        raise ValueError(f"several parts have a task head: {', '.join(a.name for a in having)}")
    return having[0].task_head if having else None


def with_base(
    adapter: Adapter,
    *,
    linear_of: Callable[[str, int], Linear],
    head_VD: Callable[[], np.ndarray],
) -> Adapter:
    """Settles what only the base can tell, so that the result has `needs_base` False.

    A replaced linear becomes a pair of full rank that adds the difference D = W' - W: a_RK = I and
    b_RN = D^T where K <= N, else a_RK = D and b_RN = I. The difference is taken in float32, which
    is exact for 16-bit weights of similar size. A bias cannot be a low-rank product, so its
    difference is the pair's `bias_N`; whoever serves the pair adds it or refuses the adapter. LoRA
    on the same linear is kept, by concatenating ranks.

    A copy of the base head that equals the base's, in the dtype that the base is served in, is
    dropped; one that differs becomes the replaced head. So does one that was only rounded when it
    was saved: PEFT puts it in the base's place, and answers with it.

    Args:
      adapter: any; returned as it is if it does not need the base.
      linear_of: site name and layer -> the base's linear, in any float dtype.
      head_VD: the base's head, asked for only if it is needed.

    Raises:
      ValueError: the adapter brings a bias to a linear that has none.
    """
    if not adapter.needs_base:
        return adapter
    pairs = {site: dict(layers) for site, layers in adapter.pairs.items()}
    for site, layers in adapter.replaced_linears.items():
        for layer, linear in layers.items():
            full = _difference(f"{adapter.name}: {site} {layer}", linear, linear_of(site, layer))
            known = pairs.setdefault(site, {}).get(layer)
            both = [(full, 1.0)] if known is None else [(full, 1.0), (known, 1.0)]
            pairs[site][layer] = _concatenated("", both)
    head = adapter.replaced_head_VD
    if (copy_VD := adapter.base_head_copy_VD) is not None:
        base_VD = head_VD()
        head = head if np.array_equal(copy_VD.astype(base_VD.dtype), base_VD) else copy_VD
    return dataclasses.replace(
        adapter,
        pairs=pairs,
        replaced_linears={},
        replaced_head_VD=head,
        base_head_copy_VD=None,
    )


def _difference(where: str, ours: Linear, base: Linear) -> LoraPair:
    d_NK = ours.weight_NK.astype(np.float32) - base.weight_NK.astype(np.float32)
    N, K = d_NK.shape
    if K <= N:
        a_RK, b_RN = np.eye(K, dtype=np.float32), np.ascontiguousarray(d_NK.T)
    else:
        a_RK, b_RN = d_NK, np.eye(N, dtype=np.float32)
    bias_N = None
    if ours.bias_N is not None:
        if base.bias_N is None:
            raise ValueError(f"{where} brings a bias, the base's linear has none")
        bias_N = ours.bias_N.astype(np.float32) - base.bias_N.astype(np.float32)
    return LoraPair(a_RK=a_RK, b_RN=b_RN, scale=1.0, bias_N=bias_N)
