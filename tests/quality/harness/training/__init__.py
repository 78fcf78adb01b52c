"""Trains, from scratch, a small Llama-architecture model that retrieves. docs/quality.md says how
to use it.
"""
