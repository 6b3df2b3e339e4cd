"""Benchmarks: the cases, who runs them, the clock, the report.

``cases`` says what is measured, ``inputs`` on which numbers, ``providers`` by whom; ``measure`` checks the outputs and
then takes the times; ``report`` and ``plots`` show the rows it returns. Of networks it is ``networks`` and the modules
``network_*``. ``zoo`` asks whether ``optimize()`` makes any network slower, ``serve`` how it does with several clients.
"""
