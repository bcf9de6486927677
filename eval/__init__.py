"""From a trained run to a report: scores, intervals, baselines, tables and a plot."""
