"""The command `longview`: run the pipeline, see where it stands, look at the results.

longview --help          # every command has examples under --help
python -m flows.cli run
"""

from __future__ import annotations

import typer

from flows.commands import compare, data, deploy, doctor, explain, gc, model, run, servers, status

app = typer.Typer(
    name="longview",
    help="From questions about images to a pair of agents that reason about them: run, watch and look.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(run.run)
app.command()(status.status)
app.command()(status.report)
app.command()(compare.compare)
app.command()(servers.up)
app.command()(servers.down)
app.command()(deploy.deploy)
app.command()(deploy.worker)
app.command()(doctor.doctor)
app.command()(explain.explain)
app.command()(gc.gc)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")

if __name__ == "__main__":
    app()
