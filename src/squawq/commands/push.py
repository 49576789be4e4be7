"""`squawq push`: a quantized folder to the Hub, with its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squawq.progress import console


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="One that squawq quantize made, or another AWQ folder")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub id (owner/name), created if it does not exist")],
    source: Annotated[
        str | None, typer.Option(help="The 16-bit model (folder or Hub id): its licence, languages and id for the card")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="For the card, as the Hub writes it: mit")] = None,
    base_model: Annotated[str | None, typer.Option(help="For the card: the original's Hub id")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="For the card: what squawq eval --json printed; default: the evaluation in FOLDER's report"),
    ] = None,
    card_only: Annotated[bool, typer.Option("--card-only", help="Write FOLDER/README.md and send nothing")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository")] = False,
    revision: Annotated[str, typer.Option(help="Branch, created if it does not exist")] = "main",
    token_file: Annotated[
        Path | None, typer.Option(help="A file that holds the token; default: HF_TOKEN or hf auth login")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Overwrite a README.md that squawq did not write or that is of another model, here and on the Hub, "
            "and push to a repository with other weights",
        ),
    ] = False,
) -> None:
    """Upload an AWQ folder to the Hub with a model card. Run it again to resume.

    \b
    Examples:
      squawq push OUT me/Llama-3.1-8B-AWQ --source meta-llama/Llama-3.1-8B --card-only
      squawq push OUT me/Llama-3.1-8B-AWQ --private --token-file ~/.hf-token
    """
    from squawq.errors import ConfigError
    from squawq.publish.card import Origin, write_card
    from squawq.publish.push import push as run

    origin = Origin(source, license_, base_model, evaluation)
    if card_only:
        given = {"--private": private, "--revision": revision != "main", "--token-file": token_file is not None}
        if unused := [option for option, value in given.items() if value]:
            raise ConfigError(f"--card-only sends nothing, so {unused[0]} cannot be meant; leave one of them out")
        print(write_card(folder, repo, origin, force=force, say=console.print))
        return
    done = run(
        folder,
        repo,
        private=private,
        revision=revision,
        token_file=token_file,
        origin=origin,
        force=force,
        say=console.print,
    )
    print(done.url)
