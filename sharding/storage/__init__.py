"""The only package that reads or publishes datasets: local folders, memory, object stores."""
