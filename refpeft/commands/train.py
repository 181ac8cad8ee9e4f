import click


@click.command()
def train():
    "x"
