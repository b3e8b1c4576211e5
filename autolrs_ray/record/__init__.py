"""What lies on disk or on an object store, and that it can be trusted."""
