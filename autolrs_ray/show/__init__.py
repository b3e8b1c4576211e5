"""What is drawn and printed of a run."""
