"""Configuration of all stages: schema, loading, errors, units and user code."""
