"""What :func:`fastcnn.optimize` found in a model, and what became of it."""

from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table


class NoGraph(Exception):
    """A call has no graph, and the plain forward has to run; the message says why."""


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
        plain: the modules of which some calls had no graph, and why: by module and reason. What they call may have one.
    """

    layers: list[Entry] = field(default_factory=list)
    graphs: list[Entry] = field(default_factory=list)
    plain: dict[tuple[str, str], Entry] = field(default_factory=dict)

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

    def add(self, module: str, entries: list[Entry]) -> None:
        """What a new graph of a module has shown; the places are those in the module."""
        for entry in entries:
            paths = (f"{module}.{path}".strip(".") for path in entry.where.split(" + "))
            entry = replace(entry, where=" + ".join(paths) or entry.what)
            if entry not in self.graphs:
                self.graphs.append(entry)

    def __str__(self) -> str:
        table = Table("where", "what", "runs as", "left alone because", box=None)
        for entry in self.entries:
            table.add_row(entry.where, entry.what, entry.now, entry.why_not)
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(f"{len(self.replaced)} replaced, {len(self.left)} left alone", table, sep="\n", markup=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())
