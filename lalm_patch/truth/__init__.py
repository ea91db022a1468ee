"""Models whose truth is planted, and how well tracing finds it."""
