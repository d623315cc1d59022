"""A device that runs plans on token ids in place of keys and values.

It writes what each position is made of into pages, and checks before each chunk that the pages
hold everything the chunk attends to. Tokens are a function of all that came before, so an answer is
right only if nothing it read was another request's.
"""

import collections
import dataclasses
import zlib

from valora_jax.engine.kv_blocks import SCRATCH_PAGE
from valora_jax.engine.plan import Chunk, Plan
from valora_jax.engine.request import Request
from valora_jax.engine.scheduler import Scheduler

END_TOKEN = 0
VOCABULARY = 5


def next_token(content: list) -> int:
    return zlib.crc32(repr(content).encode()) % VOCABULARY


def content_of(request: Request, tokens: list[int]) -> list:
    """What each position's keys and values are made of."""
    image_at = {
        position: (image.content_hash, position - image.start)
        for image in request.images
        for position in range(image.start, image.end)
    }
    adapter = request.adapter and request.adapter.version
    return [
        (adapter, position, token, image_at.get(position)) for position, token in enumerate(tokens)
    ]


def answer_alone(request: Request) -> list[int]:
    """The outputs of a request that shares the engine with nobody."""
    tokens = list(request.prompt_token_ids)
    outputs = []
    while len(outputs) < request.output_limit and END_TOKEN not in outputs:
        outputs.append(next_token(content_of(request, tokens + outputs)))
    return outputs


@dataclasses.dataclass
class SimulatedDevice:
    """Runs plans at once; their tokens are read later, as from a queue."""

    scheduler: Scheduler
    page_tokens: int
    cells: dict = dataclasses.field(default_factory=dict)  # (page, offset) -> content
    # What was sampled last in each row, and for each request.
    row_tokens: dict = dataclasses.field(default_factory=dict)
    sampled: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    unread: collections.deque = dataclasses.field(default_factory=collections.deque)

    def run(self, plan: Plan) -> None:
        chunks = plan.decodes + plan.prefills
        tokens_of = {chunk.request: self._tokens(chunk) for chunk in chunks}
        for chunk in chunks:  # before anything is written: chunks do not rely on each other
            self._check_read(chunk.request, tokens_of[chunk.request][: chunk.start])
        for chunk in chunks:
            content = content_of(chunk.request, tokens_of[chunk.request])
            for position in range(chunk.start, chunk.start + chunk.length):
                self.cells[self._cell(chunk.request, position)] = content[position]
        sampled = []
        for chunk in chunks:
            request, tokens = chunk.request, tokens_of[chunk.request]
            self._check_read(request, tokens)
            if chunk.samples:
                token = next_token(content_of(request, tokens))
                self.row_tokens[request.row] = (request, token)
                self.sampled[request].append(token)
                sampled.append((request, token))
        self.unread.append(sampled)

    def read_oldest(self) -> None:
        for request, token in self.unread.popleft():
            if not self.scheduler.append_token(request, token):
                continue
            if token == END_TOKEN:
                self.scheduler.finish(request, "stop")
            elif len(request.output_token_ids) == request.output_limit:
                self.scheduler.finish(request, "length")

    def _tokens(self, chunk: Chunk) -> list[int]:
        """All tokens up to the end of a chunk. What it computes is known to the host or the row."""
        request, end = chunk.request, chunk.start + chunk.length
        tokens = [*request.prompt_token_ids, *self.sampled[request]][:end]
        if end > request.known:
            assert chunk.length == 1
            assert self.row_tokens[request.row] == (request, tokens[-1])
        else:
            assert request.known_tokens(0, end) == tokens
        return tokens

    def _cell(self, request: Request, position: int) -> tuple[int, int]:
        page = request.pages[position // self.page_tokens]
        assert page != SCRATCH_PAGE
        return page, position % self.page_tokens

    def _check_read(self, request: Request, tokens: list[int]) -> None:
        for position, content in enumerate(content_of(request, tokens)):
            assert self.cells.get(self._cell(request, position)) == content
