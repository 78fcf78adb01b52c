"""Quality of generation on compacted caches: tasks, methods, fidelity, report. docs/quality.md says
how to use it.
"""
