"""Causal tracing of large audio language models: when and where sound becomes words."""
