"""`longview data import` and `longview data check`: your own questions and images as the source data.

longview data check ~/receipts
longview data import ~/receipts
"""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The source data: bring your own, or check it.", no_args_is_help=True)

Source = Annotated[
    Path, typer.Argument(help="A folder with images and JSONL or LLaVA JSON, or one such file.")
]
Images = Annotated[Path | None, typer.Option("--images", help="Folder that image paths are relative to.")]
Share = Annotated[
    float, typer.Option("--max-bad-share", min=0, max=1, help="Share of unusable records allowed.")
]


@app.command("import")
def import_(source: Source, images: Images = None, max_bad_share: Share = 0.1) -> None:
    """Make a folder of questions and images the source data: checked, copied to data/, tracked in data.dvc.

    Records: JSON lines with `id`, `image` or `images`, `question`, `answer` (`choices`, `split` optional), or
    LLaVA-format JSON with `conversations`. What cannot be used is set aside with its reason.

    Examples:

        longview data import ~/receipts

        longview data import questions.jsonl --images ~/scans
    """
    from flows.environment import root
    from tasks import data_import

    source, images = source.expanduser().resolve(), images and images.expanduser().resolve()
    try:
        with chdir(root()):
            done = data_import.import_folder(source, root(), image_root=images, max_bad_share=max_bad_share)
            data_import.print_imported(done)
    except data_import.ImportRefused as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo("next: longview run")


@app.command()
def check(
    source: Annotated[Path | None, typer.Argument(help="What to look at; data/ if left out.")] = None,
    images: Images = None,
) -> None:
    """Look at data and change nothing: counts, problems, what would be set aside. Exit status 1 on errors.

    Examples:

        longview data check

        longview data check ~/receipts
    """
    from flows.environment import root
    from tasks import data_import

    try:
        report = data_import.check(source or root() / "data", image_root=images)
    except data_import.ImportRefused as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    data_import.print_report(report)
    raise typer.Exit(1 if report.errors else 0)
