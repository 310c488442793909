"""What surrounds the model in a run: config preparation and hooks."""
