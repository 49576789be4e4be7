"""mkdocs' hook (mkdocs.yml): in the site's search, the pages that show how to do something come first."""

from __future__ import annotations

from typing import Any

BOOSTS = {"start": 4, "how-to": 2, "reference": 0.25}  # by folder; of other pages 1


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Set a page's boost, which Material's search reads from its metadata."""
    page.meta["search"] = {"boost": BOOSTS.get(page.file.src_uri.partition("/")[0], 1)}
    return markdown
