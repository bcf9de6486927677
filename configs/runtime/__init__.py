"""Runtime of a process: launch, signals, attempts, tracking, logs, atomic publishing."""
