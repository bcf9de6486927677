"""Evaluation of a trained run: scores, intervals, baselines, tables and a plot."""
