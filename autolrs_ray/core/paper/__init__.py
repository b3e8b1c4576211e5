"""The paper's policy: stages, probes, forecasts, proposals."""
