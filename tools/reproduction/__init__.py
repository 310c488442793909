"""The paper's tables: planned, run and written beside the published
figures."""
