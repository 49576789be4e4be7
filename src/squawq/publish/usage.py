"""Renders the model card's code blocks: how each engine runs the model. tests/publish/test_usage.py runs them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import jinja2

from squawq.compatibility import ENGINES, tgi_command


def usage(repo: str, chat: bool, engines: Sequence[str] = tuple(ENGINES), *, fused: bool = True) -> str:
    """A block of code for each of the engines (keys of ENGINES), and for clients where one of them is a server.

    Servers listen on port 8000. `chat`: the model has a chat template. `fused`: transformers may run it with do_fuse.
    """
    text = (files("squawq") / "publish" / "usage.md").read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(text)
    return template.render(repo=repo, chat=chat, engines=engines, fused=fused, tgi_command=tgi_command(repo)).strip()
