"""Fills a step's fields from a plan: tokens, positions, pages, sampling. NumPy only.

Names of the fields are those of `BatchLayout`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from valora_jax.engine.plan import Chunk, Plan
from valora_jax.engine.request import ImageSpan, Request

type Fields = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where a request's things lie on the device.

    Attributes:
      page_tokens: tokens of a key-value page.
      tokens_per_image: feature rows of an image slot.
      image_slot: request and image index -> feature slot.
      adapter_slot: request -> slot in the adapter pool, -1 for the base model.
      stop_ids: request -> tokens that may not be sampled before `min_tokens`.
    """

    page_tokens: int
    tokens_per_image: int
    image_slot: Callable[[Request, int], int]
    adapter_slot: Callable[[Request], int]
    stop_ids: Callable[[Request], list[int]]


def neutral(fields: Fields, *, vocab_rows: int, padding_row: int) -> None:
    """Sets what zero would misread: tokens have no features and no adapter, weights none in them,
    rows no penalties; they sample greedily and write to the padding row of the sampler's state."""
    fields["feature_row"][:] = -1
    fields["adapter"][:] = -1
    fields["merged"][...] = -1
    fields["top_p"][:] = 1
    fields["repetition_penalty"][:] = 1
    fields["banned"][:] = vocab_rows
    fields["state_row"][:] = padding_row


def fill(fields: Fields, plan: Plan, sources: Sources) -> list[Request]:
    """Writes the plan's chunks, decodes first; returns the request of each sampled row."""
    sampled: list[Request] = []
    start = 0
    for chunk in plan.chunks:
        _fill_tokens(fields, chunk, start, sources)
        if chunk.samples:
            _fill_row(fields, chunk.request, len(sampled), sources)
            fields["sample_index"][len(sampled)] = start + chunk.length - 1
            sampled.append(chunk.request)
        start += chunk.length
    for d, chunk in enumerate(plan.decodes):
        fields["decode_kv_len"][d] = chunk.start + 1
        _fill_pages(fields["decode_page"][d], chunk.request)
    fields["decode_count"][...] = len(plan.decodes)
    start = len(plan.decodes)
    for c, chunk in enumerate(plan.prefills):
        fields["chunk_start"][c] = start
        fields["chunk_len"][c] = chunk.length
        fields["chunk_kv_len"][c] = chunk.start + chunk.length
        _fill_pages(fields["chunk_page"][c], chunk.request)
        start += chunk.length
    if plan.prefills:
        fields["chunk_count"][...] = len(plan.prefills)
    return sampled


def next_tokens(plan: Plan, tokens: int) -> np.ndarray:
    """The prompt token after each of the plan's tokens; 0 where there is none."""
    next_T = np.zeros(tokens, np.int32)
    start = 0
    for chunk in plan.chunks:
        following = chunk.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
        next_T[start : start + len(following)] = following
        start += chunk.length
    return next_T


def _fill_pages(row_W: np.ndarray, request: Request) -> None:
    row_W[: len(request.pages)] = request.pages


def _fill_tokens(fields: Fields, chunk: Chunk, start: int, sources: Sources) -> None:
    request, where = chunk.request, slice(start, start + chunk.length)
    stop = chunk.start + chunk.length
    if stop <= request.known:
        fields["token"][where] = request.known_tokens(chunk.start, stop)
    else:  # a decode whose token only the device knows
        fields["token"][where] = -1
    fields["token_row"][where] = request.row
    position_T = np.arange(chunk.start, stop)
    fields["position"][where] = position_T
    fields["page"][where] = np.asarray(request.pages)[position_T // sources.page_tokens]
    fields["offset"][where] = position_T % sources.page_tokens
    fields["adapter"][where] = sources.adapter_slot(request)
    for index, image in enumerate(request.images):
        if image.end > chunk.start and image.start < stop:
            _fill_features(fields["feature_row"], chunk, start, image, index, sources)


def _fill_features(
    feature_row_T: np.ndarray,
    chunk: Chunk,
    start: int,
    image: ImageSpan,
    index: int,
    sources: Sources,
) -> None:
    """Points the chunk's tokens that lie in an image to the rows of its slot."""
    first = max(image.start, chunk.start)
    last = min(image.end, chunk.start + chunk.length)
    row = sources.image_slot(chunk.request, index) * sources.tokens_per_image
    rows = np.arange(row + first - image.start, row + last - image.start)
    feature_row_T[start + first - chunk.start : start + last - chunk.start] = rows


def _fill_row(fields: Fields, request: Request, row: int, sources: Sources) -> None:
    params = request.params
    assert params.seed is not None  # the engine draws one where the caller gave none
    generated = len(request.output_token_ids) + request.pending - 1  # this one is pending already
    fields["state_row"][row] = request.row
    fields["step"][row] = generated
    fields["seed"][row] = _seed32(params.seed)
    fields["temperature"][row] = 0 if params.greedy else params.temperature
    fields["top_k"][row] = params.top_k
    for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        fields[name][row] = getattr(params, name)
    if generated < params.min_tokens:
        banned = sources.stop_ids(request)
        fields["banned"][row, : len(banned)] = banned
    if params.logprobs is not None:
        fields["wants_logprobs"][...] = 1


def _seed32(seed: int) -> np.int32:
    """Folds a seed of any size into the 32 bits that a step carries."""
    return np.uint32((seed ^ (seed >> 32)) & 0xFFFFFFFF).view(np.int32)
