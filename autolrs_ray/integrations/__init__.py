"""Trainables from the training loops of other libraries: `integrations.lightning`, `integrations.huggingface`, and
`integrations.follower` for any loop. Each module imports its own library; none is imported by the package itself."""
