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
    _fill_decodes(fields, plan.decodes, sources)
    start = len(plan.decodes)
    for c, chunk in enumerate(plan.prefills):
        _fill_tokens(fields, chunk, start, sources)
        fields["chunk_start"][c] = start
        fields["chunk_len"][c] = chunk.length
        fields["chunk_kv_len"][c] = chunk.start + chunk.length
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
        following = chunk.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
        next_T[start : start + len(following)] = following
        start += chunk.length
    return next_T


def _fill_pages(row_W: np.ndarray, request: Request) -> None:
    row_W[: len(request.pages)] = request.pages


def _fill_decodes(fields: Fields, decodes: Sequence[Chunk], sources: Sources) -> None:
    """One token each: field by field, as a busy step has dozens of them."""
    requests, where = [chunk.request for chunk in decodes], slice(len(decodes))
    position_B = np.array([chunk.start for chunk in decodes], np.int32)
    fields["token"][where] = [
        # The device alone knows a token that was sampled in a step which is not read yet.
        r.known_tokens(c.start, c.start + 1)[0] if c.start < r.known else -1
        for c, r in zip(decodes, requests, strict=True)
    ]
    fields["token_row"][where] = [request.row for request in requests]
    fields["position"][where] = position_B
    fields["page"][where] = [c.request.pages[c.start // sources.page_tokens] for c in decodes]
    fields["offset"][where] = position_B % sources.page_tokens
    fields["adapter"][where] = [sources.adapter_slot(request) for request in requests]
    fields["decode_kv_len"][where] = position_B + 1
    fields["decode_count"][...] = len(decodes)
    for b, chunk in enumerate(decodes):
        _fill_pages(fields["decode_page"][b], chunk.request)
        _fill_images(fields, chunk, b, sources)


def _fill_tokens(fields: Fields, chunk: Chunk, start: int, sources: Sources) -> None:
    request, where = chunk.request, slice(start, start + chunk.length)
    stop = chunk.start + chunk.length
    position_T = np.arange(chunk.start, stop)
    fields["token"][where] = request.known_tokens(chunk.start, stop)
    fields["token_row"][where] = request.row
    fields["position"][where] = position_T
    fields["page"][where] = np.asarray(request.pages)[position_T // sources.page_tokens]
    fields["offset"][where] = position_T % sources.page_tokens
    fields["adapter"][where] = sources.adapter_slot(request)
    _fill_images(fields, chunk, start, sources)


def _fill_images(fields: Fields, chunk: Chunk, start: int, sources: Sources) -> None:
    for index, image in enumerate(chunk.request.images):
        if image.end > chunk.start and image.start < chunk.start + chunk.length:
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


def _fill_rows(fields: Fields, requests: Sequence[Request], sources: Sources) -> None:
    where, params = slice(len(requests)), [request.params for request in requests]
    # The one that is sampled now is pending already.
    generated = [len(r.output_token_ids) + r.pending - 1 for r in requests]
    fields["state_row"][where] = [request.row for request in requests]
    fields["step"][where] = generated
    fields["seed"][where] = _seeds32(params)
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


def _seeds32(params: Sequence[SamplingParams]) -> np.ndarray:
    """Folds seeds of any size into the 32 bits that a step carries."""
    seeds = [p.seed for p in params if p.seed is not None]  # all: the engine draws those not given
    return np.array([(seed ^ (seed >> 32)) & 0xFFFFFFFF for seed in seeds], np.uint32).view(
        np.int32
    )
