"""Benchmarks: what is measured, who runs it, the clock, the report.

``operators`` and ``networks`` have a record for each; ``operator_workload`` and ``network_workload`` make of a case its
inputs, its calls and their check; ``providers`` says who runs it. ``measure`` checks the outputs and then takes the
times, where wanted with each provider in a process of its own (``isolate``); ``report`` and ``plots`` show its rows.
``zoo`` asks whether ``optimize()`` makes any network slower, ``serve`` how it does with several clients.
"""
