"""Schedules for tests, of a hundred steps: a paper's run of three stages, and a race."""

from __future__ import annotations

from autolrs_ray.outcome.schedule import LearnedSchedule, Piece

STAGES = LearnedSchedule(100, (Piece(0, 10, 0.5, None, 10), Piece(10, 30, 0.2), Piece(30, 100, 0.05, "linear")))
RACE = LearnedSchedule(100, (Piece(0, 100, 0.3, "quadratic"),))
