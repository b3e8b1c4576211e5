"""A training inside a Tune trial."""
