"""Steps as the device sees them: a device that reads nothing but the fields gives every answer."""

import dataclasses
import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.engine.simulated_device import END_TOKEN, answer_alone, next_token
from valora_jax.engine.batch import BatchLayout
from valora_jax.engine.buckets import MAX_CHUNKS, Buckets
from valora_jax.engine.fill import Sources, fill, neutral
from valora_jax.engine.image_cache import ImageCache
from valora_jax.engine.kv_blocks import SCRATCH_PAGE, KVBlocks
from valora_jax.engine.plan import Plan
from valora_jax.engine.request import ImageSpan, Request
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.engine.scheduler import Scheduler
from valora_jax.lora.host_store import AdapterRef

PAGE, PAGES, REQUESTS, TOKENS, PER_IMAGE, VOCABULARY = 4, 9, 4, 12, 3, 50
MAX_REQUEST_TOKENS = (PAGES - 1) * PAGE
ADAPTERS = [AdapterRef(name=name, version=10 + i) for i, name in enumerate("ab")]


class AdapterSlots:
    """A gate that always opens: the slot of an adapter is its place in `ADAPTERS`."""

    def acquire(self, request: Request) -> bool:
        return True

    def release(self, request: Request) -> None:
        pass

    def slot(self, request: Request) -> int:
        return -1 if request.adapter is None else ADAPTERS.index(request.adapter)


@dataclasses.dataclass
class FieldsDevice:
    """Computes from a step's arrays alone. Keys and values are what their position is made of."""

    cells: dict = dataclasses.field(default_factory=dict)  # (page, offset) -> content
    features: dict = dataclasses.field(default_factory=dict)  # row -> (content hash, number)
    last_token_R: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(REQUESTS + 1))

    def run(self, fields) -> list[int]:
        """Returns the token of each sampled row."""
        token_T = np.where(
            fields["token"] >= 0, fields["token"], self.last_token_R[fields["token_row"]]
        )
        written = set()
        for t, token in enumerate(token_T.tolist()):
            cell = (int(fields["page"][t]), int(fields["offset"][t]))
            if cell[0] == SCRATCH_PAGE:
                continue
            assert cell not in written
            written.add(cell)
            adapter, row = int(fields["adapter"][t]), int(fields["feature_row"][t])
            version = None if adapter < 0 else ADAPTERS[adapter].version
            image = None if row < 0 else self.features[row]
            self.cells[cell] = (version, int(fields["position"][t]), int(token), image)
        attended = self._attended(fields)
        tokens = []
        for index, row in zip(fields["sample_index"].tolist(), fields["state_row"], strict=True):
            if row == REQUESTS:
                break  # padding
            tokens.append(next_token(attended[index]))
            self.last_token_R[row] = tokens[-1]
        return tokens

    def _attended(self, fields) -> dict[int, list]:
        """Flat index -> what its token attends to."""
        sequences = [
            (d, 1, int(fields["decode_kv_len"][d]), fields["decode_page"][d])
            for d in range(int(fields["decode_count"]))
        ]
        sequences += [
            (
                int(fields["chunk_start"][c]),
                int(fields["chunk_len"][c]),
                int(fields["chunk_kv_len"][c]),
                fields["chunk_page"][c],
            )
            for c in range(int(fields.get("chunk_count", 0)))
        ]
        attended = {}
        for start, length, kv_len, page_W in sequences:
            content = [self.cells.get((int(page_W[i // PAGE]), i % PAGE)) for i in range(kv_len)]
            for t in range(length):
                attended[start + t] = content[: kv_len - length + t + 1]
        return attended


class Machine:
    """The scheduler and the engine's gates over a `FieldsDevice`, read one step late."""

    def __init__(self):
        self.images = ImageCache(slots=4, changes_vision=lambda ref: ref == ADAPTERS[1])
        self.adapters = AdapterSlots()
        self.scheduler = Scheduler(
            KVBlocks(num_pages=PAGES, page_tokens=PAGE),
            max_tokens_per_step=TOKENS,
            max_requests=REQUESTS,
            max_prefill_chunks=MAX_CHUNKS,
            max_waiting=100,
            max_request_tokens=MAX_REQUEST_TOKENS,
            gates=[self.adapters, self.images],
        )
        self.buckets = Buckets(
            max_requests=REQUESTS, max_tokens_per_step=TOKENS, tokens_per_image=3, spacing="fine"
        )
        self.sources = Sources(
            page_tokens=PAGE,
            tokens_per_image=PER_IMAGE,
            image_slot=self.images.slot,
            adapter_slot=self.adapters.slot,
            stop_ids=lambda request: [END_TOKEN],
        )
        self.device, self.unread = FieldsDevice(), []

    def step(self) -> None:
        plan = self.scheduler.plan()
        if plan is not None and plan.tokens:
            for new in self.images.take_new():
                content_hash = new.request.images[new.index].content_hash
                for i in range(PER_IMAGE):
                    self.device.features[new.slot * PER_IMAGE + i] = (content_hash, i)
            fields, requests = self.filled(plan)
            tokens = self.device.run(fields)
            self.unread.append(list(zip(requests, tokens, strict=True)))
            for chunk in (*plan.decodes, *plan.prefills):
                images = chunk.request.images
                if images and chunk.request.computed >= images[-1].end:
                    self.images.release(chunk.request)
        if len(self.unread) > 1 or (self.unread and (plan is None or not plan.tokens)):
            for request, token in self.unread.pop(0):
                if not self.scheduler.append_token(request, token):
                    continue
                if token == END_TOKEN:
                    self.scheduler.finish(request, "stop")
                elif len(request.output_token_ids) == request.output_limit:
                    self.scheduler.finish(request, "length")

    def filled(self, plan: Plan):
        bucket = self.buckets.choose(
            decodes=len(plan.decodes), prompt_tokens=plan.tokens - len(plan.decodes)
        )
        layout = BatchLayout.of(bucket, request_pages=PAGES - 1)
        _, fields = layout.buffer()
        neutral(fields, vocab_rows=VOCABULARY, padding_row=REQUESTS)
        return fields, fill(fields, plan, self.sources)


def request_of(tokens, max_tokens=4, **fields) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return Request(id="r", prompt_token_ids=tokens, params=params, **fields)


@st.composite
def requests(draw) -> Request:
    tokens = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1][: draw(st.integers(0, 10))]
    tokens += draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    hashes = draw(st.lists(st.sampled_from([b"cat", b"dog"]), max_size=len(tokens) // 4))
    images = tuple(
        ImageSpan(content_hash=content_hash, start=1 + 4 * i, length=PER_IMAGE)
        for i, content_hash in enumerate(hashes[:2])
    )
    adapter = draw(st.sampled_from([None, *ADAPTERS]))
    return request_of(tokens, draw(st.integers(1, 12)), images=images, adapter=adapter)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    arriving=st.lists(requests(), min_size=1, max_size=12), rng=st.randoms(use_true_random=False)
)
def test_what_the_device_reads_gives_each_request_its_answer_alone(
    arriving: list[Request], rng: random.Random
):
    machine, added = Machine(), []
    for request in arriving:
        machine.scheduler.add(request)
        added.append(request)
        for _ in range(rng.randint(0, 4)):
            machine.step()
        if rng.random() < 0.15:
            machine.scheduler.finish(rng.choice(added), "abort")
    while machine.scheduler.has_work or machine.unread:
        machine.step()
    for request in added:
        alone = answer_alone(request)
        if request.finish_reason == "abort":
            alone = alone[: len(request.output_token_ids)]
        assert request.output_token_ids == alone
    assert machine.images.held_slots == 0


def first_fields(request: Request):
    machine = Machine()
    machine.scheduler.add(request)
    fields, sampled = machine.filled(machine.scheduler.plan())
    assert sampled == [request]
    return fields


def test_padding_writes_to_the_scratch_page_and_wants_nothing():
    fields = first_fields(request_of([5, 6, 7]))
    assert set(fields["page"][3:].tolist()) == {SCRATCH_PAGE}
    assert set(fields["adapter"].tolist()) == {-1}
    assert set(fields["feature_row"].tolist()) == {-1}
    assert set(fields["state_row"][1:].tolist()) == {REQUESTS}
    assert set(fields["repetition_penalty"].tolist()) == set(fields["top_p"].tolist()) == {1}
    assert set(fields["temperature"][1:].tolist()) == {0}
    assert (fields["banned"] == VOCABULARY).all()


def test_sampling_settings_arrive_in_the_row():
    params = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3,
        repetition_penalty=1.5, seed=-1, min_tokens=2, logprobs=1,
    )  # fmt: skip
    fields = first_fields(Request(id="r", prompt_token_ids=[1, 2], params=params))
    got = {name: fields[name][0].item() for name in fields if hasattr(params, name)}
    want = {name: getattr(params, name) for name in got} | dict(seed=0)
    assert got == pytest.approx(want)
    assert len(got) == 8
    assert fields["banned"][0].tolist()[:2] == [END_TOKEN, VOCABULARY]
    assert fields["wants_logprobs"] == 1


def test_a_temperature_that_counts_as_zero_is_zero():
    params = SamplingParams(temperature=1e-6, seed=0)
    assert first_fields(Request(id="r", prompt_token_ids=[1], params=params))["temperature"][0] == 0


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), np.int64(-5)])
def test_seeds_of_64_bits_fold_into_32(seed):
    params = SamplingParams(seed=seed)
    got = first_fields(Request(id="r", prompt_token_ids=[1], params=params))["seed"][0]
    assert got == np.uint32((int(seed) ^ (int(seed) >> 32)) % 2**32).view(np.int32)
