"""The algorithm, without Ray: plans, forecasts, the surrogate and the policies.

Everything here can be driven in a plain loop (see :mod:`autolrs_ray.training.local`).
"""
