"""What a run is told, and what it says of itself: configuration, errors, launch, tracking."""
