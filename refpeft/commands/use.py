import click


@click.command("eval")
def evaluate():
    "x"


@click.command()
def generate():
    "x"


@click.command()
def merge():
    "x"
