"""What a running process needs: launch, signals, attempts, tracking, logs, atomic publishing."""
