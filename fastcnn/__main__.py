"""The command ``fastcnn``, also ``python -m fastcnn``."""

import sys


def main() -> None:
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit('fastcnn: the command needs typer and rich: pip install "fastcnn[cli]"')
    app(prog_name="fastcnn")


if __name__ == "__main__":
    main()
