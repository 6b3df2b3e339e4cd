"""What :func:`fastcnn.optimize` found in a model, and what became of it."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One place in the model: what is called there, and what runs in its place, or why that runs as it is."""

    where: str
    what: str
    now: str = ""
    why_not: str = ""


@dataclass
class Report:
    """What runs fused, what runs as it is, and why. It fills as calls of new kinds come; its ``str()`` is a table.

    Args:
        layers: the layers that :func:`fastcnn.optimize` may fuse; they count until a graph has shown what becomes
            of them.
        graphs: what was found in the graphs of calls.
        plain: module -> why it, or a kind of its calls, runs without a graph. What it calls may still have one.
    """

    layers: list[Entry] = field(default_factory=list)
    graphs: list[Entry] = field(default_factory=list)
    plain: dict[str, Entry] = field(default_factory=dict)

    @property
    def entries(self) -> list[Entry]:
        """Every place, once for each thing that was found about it."""
        seen = {where for entry in self.graphs for where in entry.where.split(" + ")}
        left = [entry for entry in self.layers if entry.where not in seen]
        return [*self.plain.values(), *self.graphs, *left]

    @property
    def replaced(self) -> list[Entry]:
        """The places where something else runs now."""
        return [entry for entry in self.entries if entry.now]

    @property
    def left(self) -> list[Entry]:
        """The places where what the model calls runs as it is."""
        return [entry for entry in self.entries if not entry.now]

    def add(self, entries: list[Entry]) -> None:
        """What a new graph has shown."""
        self.graphs += [entry for entry in entries if entry not in self.graphs]

    def __str__(self) -> str:
        table = Table("where", "what", "runs as", "left alone because", box=None)
        for entry in self.entries:
            table.add_row(entry.where, entry.what, entry.now, entry.why_not)
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(f"{len(self.replaced)} replaced, {len(self.left)} left alone", table, sep="\n", markup=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())
