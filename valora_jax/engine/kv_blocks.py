"""Who holds which KV page, and which pages hold a prefix that a later request can share.

    key of a full page = blake2b(key of the page before, its token ids, its images)
    key of no page     = blake2b(adapter and version, cache salt)

A page is the scratch page 0 (where padding writes go), or held by one or more running requests, or
free. A free page keeps its content until it is needed: those without content are taken first, then
the least recently used. Nothing here touches arrays, and every operation costs O(pages it moves).
"""

import bisect
import collections
import hashlib
import itertools
import struct
from collections.abc import Iterable, Iterator

from valora_jax.engine.request import ImageSpan, Request

SCRATCH_PAGE = 0
DIGEST_BYTES = 16


class KVBlocks:
    """Hands out pages to requests, and finds those that hold what a request needs.

    A page may be shared from the moment its content is committed, which the scheduler does before
    it plans the next step; so the chunks of one step never read each other's pages. Pages are
    written in the order in which steps are enqueued, so a page that is freed while a step still
    writes to it can be handed out at once.

    Attributes:
      num_pages: pages of the pool, the scratch page included.
      page_tokens: positions that one page holds.
      queried_tokens: tokens of admitted requests, those admitted again after preemption left out.
      hit_tokens: how many of them the prefix cache had.
    """

    def __init__(self, *, num_pages: int, page_tokens: int, enable_prefix_cache: bool = True):
        """Raises ValueError for a pool without a usable page, or for pages without a token."""
        if num_pages < 2 or page_tokens < 1:
            raise ValueError(
                f"num_pages={num_pages}, page_tokens={page_tokens}; want at least 2 pages (one is "
                "scratch) of at least 1 token"
            )
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self.queried_tokens = self.hit_tokens = 0
        self._enabled = enable_prefix_cache
        self._pack_tokens = struct.Struct(f"<{page_tokens}q").pack
        self._holders = [0] * num_pages  # number of requests that hold each page
        self._blank = list(range(num_pages - 1, SCRATCH_PAGE, -1))  # free, without content
        # Free, with content, least recently used first.
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._computing: dict[bytes, Request] = {}

    @property
    def usable_pages(self) -> int:
        return self.num_pages - 1

    @property
    def free_pages(self) -> int:
        """Pages that no request holds, with or without content."""
        return len(self._blank) + len(self._cached)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def match(self, request: Request) -> int:
        """Number of the request's first tokens whose pages are in the cache.

        Whole pages, and never all tokens: at least one must be computed to sample from.
        """
        if not self._enabled or request.needs_prompt_logits:
            return 0
        self.extend_digests(request)
        digests = request.page_digests[: (request.known - 1) // self.page_tokens]
        hits = itertools.takewhile(self._page_of.__contains__, digests)
        return sum(1 for _ in hits) * self.page_tokens

    def awaits(self, request: Request, matched_tokens: int) -> bool:
        """Whether the page after the matched ones is being computed by a running request.

        Then waiting for it is cheaper than computing it twice. False for a page that the request
        would have to compute anyway.
        """
        if not self._enabled or request.needs_prompt_logits:
            return False
        page = matched_tokens // self.page_tokens
        shareable = (request.known - 1) // self.page_tokens
        return page < shareable and request.page_digests[page] in self._computing

    def admit(self, request: Request, *, reserve_pages: int = 0) -> bool:
        """Gives a request without pages all it needs for its known tokens, or nothing.

        Args:
          request: `computed` is what `match` just returned; those pages are shared, the rest new.
          reserve_pages: must still be free afterwards.
        """
        n_matched = request.computed // self.page_tokens
        shared = [self._page_of[digest] for digest in request.page_digests[:n_matched]]
        n_new = self.pages_for(request.known) - n_matched
        n_free = self.free_pages - sum(page in self._cached for page in shared)
        if n_new + reserve_pages > n_free:
            return False
        for page in shared:
            self._cached.pop(page, None)
            self._holders[page] += 1
        request.pages = shared + [self._take() for _ in range(n_new)]
        request.committed_pages = n_matched
        for digest in request.page_digests[n_matched:]:
            self._computing.setdefault(digest, request)
        if not request.preemptions:
            request.cached_tokens = request.computed
            self.queried_tokens += request.known
            self.hit_tokens += request.computed
        return True

    def allocate(self, request: Request, upto_tokens: int) -> bool:
        """Adds pages until they cover the first `upto_tokens` positions, or none at all."""
        n_new = self.pages_for(upto_tokens) - len(request.pages)
        if n_new > self.free_pages:
            return False
        for _ in range(n_new):
            request.pages.append(self._take())
        return True

    def commit(self, request: Request) -> None:
        """Lets others share the full pages whose tokens are known and computed.

        Costs O(1) where no page became full since the last call.
        """
        full = min(request.computed, request.known) // self.page_tokens
        if not self._enabled or full <= request.committed_pages:
            return
        self.extend_digests(request)
        for i in range(request.committed_pages, full):
            digest, page = request.page_digests[i], request.pages[i]
            self._stop_computing(digest, request)
            # The same content may have been computed twice; the first page stays the shared one.
            if self._page_of.setdefault(digest, page) == page:
                self._digest_of[page] = digest
        request.committed_pages = full

    def free(self, request: Request) -> None:
        """Takes back all pages of a request; what it committed stays findable."""
        for digest in request.page_digests[request.committed_pages :]:
            self._stop_computing(digest, request)
        # Last page first, so that it is reused first: a prefix is of no use without its start.
        for page in reversed(request.pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._digest_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)
        request.pages = []
        request.committed_pages = 0

    def extend_digests(self, request: Request) -> None:
        """Computes the keys of pages that became full; worth calling ahead for a long prompt."""
        digests, size = request.page_digests, self.page_tokens
        if not self._enabled or len(digests) == request.known // size:
            return
        parent = digests[-1] if digests else _root(request)
        for start in range(len(digests) * size, request.known - size + 1, size):
            tokens = self._pack_tokens(*request.known_tokens(start, start + size))
            parts = [parent, tokens]
            for image in _images_in(request.images, start, start + size):
                parts += [
                    struct.pack("<qq", image.start - start, len(image.content_hash)),
                    image.content_hash,
                ]
            parent = hashlib.blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()
            digests.append(parent)

    def check(self, holders: Iterable[Request]) -> None:
        """Raises AssertionError if the books do not agree with the pages that `holders` have."""
        held = collections.Counter(page for request in holders for page in request.pages)
        free = [*self._blank, *self._cached]
        faults = [f"page {p} is free twice" for p, n in collections.Counter(free).items() if n > 1]
        faults += [
            f"page {page}: {held[page]} requests hold it, {counted} are counted"
            for page, counted in enumerate(self._holders)
            if counted != held[page]
        ]
        homes = collections.Counter([SCRATCH_PAGE, *set(free), *held])
        faults += [
            f"page {page} is {homes[page]} of scratch, free and held, want 1"
            for page in range(self.num_pages)
            if homes[page] != 1
        ]
        if self._page_of != {digest: page for page, digest in self._digest_of.items()}:
            faults.append("the two directions of the prefix cache differ")
        with_content = self._digest_of.keys()
        if not (self._cached.keys() <= with_content and with_content.isdisjoint(self._blank)):
            faults.append("a free page is on the wrong list")
        if not held and self._computing:
            faults.append(f"{len(self._computing)} pages are being computed by nobody")
        if faults:
            raise AssertionError("\n  ".join(["the KV pages are in disorder:", *faults]))

    def _take(self) -> int:
        """A free page for new content. The caller has checked that there is one."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._holders[page] = 1
        return page

    def _stop_computing(self, digest: bytes, request: Request) -> None:
        if self._computing.get(digest) is request:
            del self._computing[digest]


def _root(request: Request) -> bytes:
    adapter = request.adapter and (request.adapter.name, request.adapter.version)
    root = repr((adapter, request.cache_salt)).encode()
    return hashlib.blake2b(root, digest_size=DIGEST_BYTES).digest()


def _images_in(images: tuple[ImageSpan, ...], start: int, stop: int) -> Iterator[ImageSpan]:
    """Those that overlap positions `[start, stop)`; `images` are in order."""
    first = bisect.bisect_right(images, start, key=lambda image: image.end)
    return itertools.takewhile(lambda image: image.start < stop, images[first:])
