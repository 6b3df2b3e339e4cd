"""What :func:`fastcnn.optimize` found in a model, and what became of it."""

import textwrap
from dataclasses import dataclass, field, replace
from itertools import groupby


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
    """What runs fused, what runs as it is, and why. It fills as calls of new kinds come; its ``str()`` tells all of
    it, in lines of 80 characters.

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
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left alone"]
        for (what, now, why_not), entries in groupby(self.entries, lambda e: (e.what, e.now, e.why_not)):
            lines += _wrapped(f"{what} runs as {now}" if now else f"{what} is left alone: {why_not}")
            lines += [line for entry in entries for line in _wrapped(f"  {entry.where}")]
        return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    """Lines of 80 characters, names whole."""
    return textwrap.wrap(line, 80, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
