"""The anchored policy: a race of learning rates, and its rule."""
