"""What is raised for files that are refused."""


class WeightsError(RuntimeError):
    """A file that cannot be read, or does not fit the model.

    Attributes:
        mismatches: what does not fit, one per line; empty if the file could not be read.
    """

    def __init__(self, message: str, mismatches: list[str] | None = None) -> None:
        self.mismatches = mismatches or []
        super().__init__(message + "".join(f"\n  {line}" for line in self.mismatches))


class GraphError(Exception):
    """A graph that makes no sense or does something that is not supported; the message says where, one per line."""
