"""Fills a step's fields from a plan: tokens, positions, pages, sampling. NumPy only.

Names of the fields are those of `BatchLayout`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from valora_jax.engine.plan import Chunk, Plan
from valora_jax.engine.request import ImageSpan, Request
from valora_jax.engine.sampling_params import SamplingParams

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
    _fill_tokens(fields, plan.chunks, sources)
    for d, chunk in enumerate(plan.decodes):
        fields["decode_kv_len"][d] = chunk.start + 1
        _fill_pages(fields["decode_page"][d], chunk.request)
    fields["decode_count"][...] = len(plan.decodes)
    start = len(plan.decodes)
    for c, chunk in enumerate(plan.prefills):
        fields["chunk_start"][c] = start
        fields["chunk_len"][c] = chunk.length
        fields["chunk_kv_len"][c] = chunk.stop
        _fill_pages(fields["chunk_page"][c], chunk.request)
        start += chunk.length
    if plan.prefills:
        fields["chunk_count"][...] = len(plan.prefills)
    ends = itertools.accumulate(chunk.length for chunk in plan.chunks)
    last = {c.request: end - 1 for c, end in zip(plan.chunks, ends, strict=True) if c.samples}
    fields["sample_index"][: len(last)] = [*last.values()]
    _fill_rows(fields, [*last], sources)
    return [*last]


def next_tokens(plan: Plan, tokens: int) -> np.ndarray:
    """The prompt token after each of the plan's tokens; 0 where there is none."""
    next_T = np.zeros(tokens, np.int32)
    start = 0
    for chunk in plan.chunks:
        following = chunk.request.prompt_token_ids[chunk.start + 1 : chunk.stop + 1]
        next_T[start : start + len(following)] = following
        start += chunk.length
    return next_T


def _fill_pages(row_W: np.ndarray, request: Request) -> None:
    row_W[: len(request.pages)] = request.pages


def _fill_tokens(fields: Fields, chunks: Sequence[Chunk], sources: Sources) -> None:
    """Field by field, as a busy step has dozens of chunks of one token."""
    lengths = [chunk.length for chunk in chunks]
    rows = np.array([chunk.request.row for chunk in chunks], np.int32)
    slots = np.array([sources.adapter_slot(chunk.request) for chunk in chunks], np.int32)
    at = [(chunk.request, p) for chunk in chunks for p in range(chunk.start, chunk.stop)]
    where, position_T = slice(len(at)), np.array([position for _, position in at], np.int32)
    fields["token"][where] = [*itertools.chain.from_iterable(map(_tokens, chunks))]
    fields["token_row"][where] = np.repeat(rows, lengths)
    fields["position"][where] = position_T
    fields["page"][where] = [request.pages[p // sources.page_tokens] for request, p in at]
    fields["offset"][where] = position_T % sources.page_tokens
    fields["adapter"][where] = np.repeat(slots, lengths)
    for chunk, end in zip(chunks, itertools.accumulate(lengths), strict=True):
        for index, image in enumerate(chunk.request.images):
            if image.end > chunk.start and image.start < chunk.stop:
                start = end - chunk.length
                _fill_features(fields["feature_row"], chunk, start, image, index, sources)


def _tokens(chunk: Chunk) -> list[int]:
    if chunk.stop <= chunk.request.known:
        return chunk.request.known_tokens(chunk.start, chunk.stop)
    return [-1] * chunk.length  # a decode whose token only the device knows


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
    last = min(image.end, chunk.stop)
    row = sources.image_slot(chunk.request, index) * sources.tokens_per_image
    rows = np.arange(row + first - image.start, row + last - image.start)
    feature_row_T[start + first - chunk.start : start + last - chunk.start] = rows


def _fill_rows(fields: Fields, requests: Sequence[Request], sources: Sources) -> None:
    where, params = slice(len(requests)), [request.params for request in requests]
    # The one that is sampled now is pending already.
    generated = [len(r.output_token_ids) + r.pending - 1 for r in requests]
    fields["state_row"][where] = [request.row for request in requests]
    fields["step"][where] = generated
    fields["seed"][where] = np.array([_seed32(p) for p in params], np.uint32).view(np.int32)
    fields["temperature"][where] = [0 if p.greedy else p.temperature for p in params]
    fields["top_k"][where] = [p.top_k for p in params]
    for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        fields[name][where] = [getattr(p, name) for p in params]
    for row, (request, p) in enumerate(zip(requests, params, strict=True)):
        if generated[row] < p.min_tokens:
            banned = sources.stop_ids(request)
            fields["banned"][row, : len(banned)] = banned
        if p.logprobs is not None:
            fields["wants_logprobs"][...] = 1


def _seed32(params: SamplingParams) -> int:
    """Folds a seed of any size into the 32 bits that a step carries."""
    assert params.seed is not None  # the engine draws one where the caller gave none
    return (params.seed ^ (params.seed >> 32)) & 0xFFFFFFFF
