"""Allocates page numbers of the KV cache, with reference counts, and finds cached prefixes.

A page is vLLM's block. A full one is found by a digest of all tokens up to its end, as in vLLM's prefix caching.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile

ROOT = b""  # parent digest of a prompt's first page


def chain(parent: bytes, ids: Sequence[int]) -> bytes:
    """The digest of a page that holds `ids`, 32 bytes. parent: digest of the page before it, ROOT for the first.

    The hash is cryptographic: a prompt made to collide would read another user's keys and values.
    """
    return blake2b(parent + array("q", ids).tobytes(), digest_size=32).digest()


def root(tenant: str, salt: str) -> bytes:
    """The parent digest of first pages, by which no prefix is shared with another tenant or salt.

    Otherwise the time to first token would reveal what others have asked (CVE-2025-46570). ROOT if both are empty.
    """
    if not tenant and not salt:
        return ROOT
    named = f"{len(tenant)} {tenant}{salt}".encode("utf-8", "surrogatepass")
    return blake2b(named, digest_size=32, person=b"squawq root").digest()  # differs from all page digests


class PagePool:
    """Pages 0 to `num_pages` - 1 of `page_size` tokens. Each is free, referenced, or idle (cached, no reference).

    An idle page is found by its digest until `take` evicts it, least recently released first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._found: dict[bytes, int] = {}  # the prefix cache: digest -> page
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def available(self) -> int:
        """Pages that `take` can give: free or idle."""
        return len(self._free) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self) -> int:
        """A page for new content, with one reference; evicts the least recently released idle one when none is free."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            digest = self._digests[page]
            assert digest is not None
            del self._found[digest]
            self._digests[page] = None
        self._references[page] = 1
        return page

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Cached pages of the longest prefix of `digests`. `share` must reference them."""
        return [self._found[digest] for digest in takewhile(self._found.__contains__, digests)]

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these cached pages are idle."""
        return sum(not self._references[page] for page in pages)

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence references it."""
        return self._references[page] > 1

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each."""
        for page in pages:
            self._idle.pop(page, None)
            self._references[page] += 1

    def register(self, page: int, digest: bytes) -> None:
        """Add a full, computed page to the prefix cache, unless a page with the same content is there."""
        if digest not in self._found:
            self._found[digest] = page
            self._digests[page] = digest

    def forget(self, pages: Iterable[int]) -> None:
        """Take referenced pages out of the prefix cache: their content is not what it should be."""
        for page in pages:
            if (digest := self._digests[page]) is not None:
                del self._found[digest]
                self._digests[page] = None

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each of a sequence's pages, given in their order.

        The last page is released first, so that a prefix is evicted after what follows it.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None
